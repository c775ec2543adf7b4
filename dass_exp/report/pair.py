"""Two records side by side: settings that differ, scores with a paired bootstrap, and the overlap of their masks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dass_exp.report.load import Record, documents
from dass_exp.report.noise import bootstrap


def pair(first: Record, second: Record, results: Path) -> str:
    """Markdown that compares two records."""
    lines = [f"# {first['key']} and {second['key']}", "", "## Settings that differ", ""]
    lines += _table(("setting", first["key"], second["key"]), _differences(first["identity"], second["identity"]))
    lines += ["", "## Scores", ""]
    lines += _table(("score", first["key"], second["key"], "difference", "95 % interval (paired bootstrap)"), _scores(first, second, results))
    overlap = _overlap(first, second, results)
    lines += ["", "## Masks", ""]
    lines += (
        _table(("role", "weights that both keep / that either keeps (Jaccard)"), overlap) if overlap else ["Masks were not kept for both (`save_masks=true`)."]
    )
    return "\n".join(lines) + "\n"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return ["none"]
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows)]


def _differences(first: Any, second: Any, path: str = "") -> list[tuple[str, ...]]:
    if isinstance(first, dict) and isinstance(second, dict):
        return [row for key in sorted({*first, *second}) for row in _differences(first.get(key), second.get(key), f"{path}.{key}".lstrip("."))]
    return [] if first == second else [(path, str(first), str(second))]


def _scores(first: Record, second: Record, results: Path) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, one, other, pairs in _paired(first, second, results):
        interval = "not paired"
        if pairs is not None:
            _, low, high = bootstrap(*pairs)
            interval = f"{low:+.4f} to {high:+.4f}"
        rows.append((name, f"{one:.4f}", f"{other:.4f}", f"{one - other:+.4f}", interval))
    return rows


def _paired(first: Record, second: Record, results: Path) -> Iterator[tuple[str, float, float, tuple[list[float], list[float]] | None]]:
    """Name, both values, and the paired outcomes where both were scored on the same windows or documents."""
    ours, theirs = first["metrics"], second["metrics"]
    for name in set(ours.get("perplexity", {})) & set(theirs.get("perplexity", {})):
        same = first["protocol"]["windows_sha256"] == second["protocol"]["windows_sha256"]
        nll = ours["window_nll"][name], theirs["window_nll"][name]
        yield f"perplexity {name}", ours["perplexity"][name], theirs["perplexity"][name], None
        yield f"nats per token {name}", sum(nll[0]) / len(nll[0]), sum(nll[1]) / len(nll[1]), nll if same else None
    one, other = documents(results, first["key"]), documents(results, second["key"])
    for task in sorted(set(ours.get("tasks", {})) & set(theirs.get("tasks", {}))):
        for metric in ("acc", "acc_norm"):
            if metric in ours["tasks"][task] and metric in theirs["tasks"][task]:
                outcomes = one.get(task, {}).get(metric, []), other.get(task, {}).get(metric, [])
                paired = outcomes if len(outcomes[0]) == len(outcomes[1]) > 0 else None
                yield f"{task} {metric}", ours["tasks"][task][metric], theirs["tasks"][task][metric], paired


def _overlap(first: Record, second: Record, results: Path) -> list[tuple[str, ...]]:
    """Jaccard overlap of the kept weights per role, and over all."""
    from safetensors.torch import load_file

    paths = [results / "runs" / record["key"] / "masks.safetensors" for record in (first, second)]
    if not all(path.is_file() for path in paths):
        return []
    one, other = (load_file(path) for path in paths)
    roles = {layer["name"]: layer["role"] for layer in first["sparsity"]["layers"]}
    both: dict[str, int] = {}
    either: dict[str, int] = {}
    for name in sorted(set(one) & set(other)):
        for role in (roles.get(name, "other"), "all"):
            both[role] = both.get(role, 0) + int((one[name] & other[name]).sum())
            either[role] = either.get(role, 0) + int((one[name] | other[name]).sum())
    return [(role, f"{both[role] / either[role]:.4f}") for role in both if either[role]]
