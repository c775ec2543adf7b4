"""Two records side by side: settings that differ, scores with a paired bootstrap, and the overlap of their masks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dass_exp.report.load import Record, block_of, documents
from dass_exp.report.significance import bootstrap
from dass_exp.storage.mask_file import iter_masks, mask_names


def pair(first: Record, second: Record, results: Path) -> str:
    """Markdown that compares two records."""
    lines = [f"# {first['key']} and {second['key']}", "", "## Settings that differ", ""]
    lines += _table(("setting", first["key"], second["key"]), _differences(first["identity"], second["identity"]))
    lines += ["", "## Scores", ""]
    lines += _table(
        ("score", first["key"], second["key"], "difference", "95 % interval (paired bootstrap)"),
        _scores(first, second, results),
    )
    lines += ["", "## Masks", "", *_overlap(first, second, results)]
    return "\n".join(lines) + "\n"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return ["none"]
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _differences(first: Any, second: Any, path: str = "") -> list[tuple[str, ...]]:
    if isinstance(first, dict) and isinstance(second, dict):
        return [
            row
            for key in sorted({*first, *second})
            for row in _differences(first.get(key), second.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if first == second else [(path, str(first), str(second))]


def _scores(first: Record, second: Record, results: Path) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, one, other, pairs in _paired(first, second, results):
        interval = "see nats per token" if name.startswith("perplexity") else "not paired"
        if pairs is not None:
            _, low, high = bootstrap(*pairs)
            interval = f"{low:+.4f} to {high:+.4f}"
        rows.append((name, f"{one:.4f}", f"{other:.4f}", f"{one - other:+.4f}", interval))
    return rows


def _paired(
    first: Record, second: Record, results: Path
) -> Iterator[tuple[str, float, float, tuple[list[float], list[float]] | None]]:
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


def _overlap(first: Record, second: Record, results: Path) -> list[str]:
    """Jaccard overlap of the kept weights, a line a block and a column a role."""
    paths = [results / "runs" / record["key"] / "masks.safetensors" for record in (first, second)]
    if missing := [record["key"] for record, path in zip((first, second), paths, strict=True) if not path.is_file()]:
        return [f"No masks were kept for {' and '.join(missing)}: run it again with `save_masks=true`."]
    common = sorted({*mask_names(paths[0])} & {*mask_names(paths[1])})
    roles = {layer["name"]: layer["role"] for layer in first["sparsity"]["layers"]}
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for (name, keep), (_, other) in zip(iter_masks(paths[0], common), iter_masks(paths[1], common), strict=True):
        if keep.shape != other.shape:
            return [f"{name} has another shape in {second['key']}: there is no overlap to speak of."]
        both, either = int((keep & other).sum()), int((keep | other).sum())
        role, block = roles.get(name, "other"), block_of(name)
        for place in ((block, role), (block, "all"), ("all", role), ("all", "all")):
            before = counts.get(place, (0, 0))
            counts[place] = before[0] + both, before[1] + either
    if not counts:
        return ["The two records have no linear in common."]
    blocks = sorted(
        {block for block, _ in counts}, key=lambda block: (block != "all", int(block) if block.isdigit() else -1)
    )
    columns = [*dict.fromkeys(role for role in roles.values() if ("all", role) in counts), "all"]
    lines = [(block, *(_jaccard(counts.get((block, column))) for column in columns)) for block in blocks]
    return [
        "Jaccard overlap: weights that both keep / weights that either keeps.",
        "",
        *_table(("block", *columns), lines),
    ]


def _jaccard(counted: tuple[int, int] | None) -> str:
    return "" if counted is None or not counted[1] else f"{counted[0] / counted[1]:.4f}"
