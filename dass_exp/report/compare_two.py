"""Compare two records: settings that differ, scores with paired intervals, overlap of the masks."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dass_exp.paths import MASKS
from dass_exp.report.load import Record, block_of, documents, windows_of
from dass_exp.report.scores import outcomes_lost
from dass_exp.report.significance import paired_interval
from dass_exp.report.write import markdown_table


def compare_records(first: Record, second: Record, results: Path) -> str:
    """Return the comparison of two records as Markdown."""
    keys = (first["key"], second["key"])
    lines = [f"# {keys[0]} and {keys[1]}", "", "## Settings that differ", ""]
    lines += _table(("setting", *keys), _differences(first["identity"], second["identity"]))
    lines += ["", "## Scores", ""]
    header = ("score", *keys, "difference", "95 % interval (paired t)")
    lines += _table(header, [_score_row(score) for score in _scores(first, second, results)])
    if flips := _flips(first, second, results):
        heads = ("task", "documents", *(f"only {key} is right, %" for key in keys))
        lines += ["", "## Answers that differ", "", *_table(heads, flips)]
    lines += ["", "## Masks", "", *_mask_overlap(first, second, results)]
    return "\n".join(lines) + "\n"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [markdown_table(header, rows)] if rows else ["none"]


def _differences(first: Any, second: Any, path: str = "") -> list[tuple[str, ...]]:
    if isinstance(first, dict) and isinstance(second, dict):
        return [
            row
            for key in sorted({*first, *second})
            for row in _differences(first.get(key), second.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if first == second else [(path, str(first), str(second))]


class _Score(NamedTuple):
    """One score of both records; ``pairs`` are its outcomes where both were scored on the same windows or documents."""

    name: str
    first: float
    second: float
    pairs: tuple[list[float], list[float]] | None


def _score_row(score: _Score) -> tuple[str, ...]:
    if score.pairs is not None:
        _, low, high = paired_interval(*score.pairs)
        interval = f"{low:+.4f} to {high:+.4f}" if low > -float("inf") else "one pair"
    else:
        interval = "see nats per token" if score.name.startswith("perplexity") else "not paired"
    return score.name, f"{score.first:.4f}", f"{score.second:.4f}", f"{score.first - score.second:+.4f}", interval


def _scores(first: Record, second: Record, results: Path) -> Iterator[_Score]:
    ours, theirs = first["metrics"], second["metrics"]
    for name in set(ours.get("perplexity", {})) & set(theirs.get("perplexity", {})):
        windows = [windows_of(record["protocol"], name)["windows_sha256"] for record in (first, second)]
        same_windows = windows[0] == windows[1]
        nll = ours["window_nll"][name], theirs["window_nll"][name]
        means = (sum(nll[0]) / len(nll[0]), sum(nll[1]) / len(nll[1]))
        yield _Score(f"perplexity {name}", ours["perplexity"][name], theirs["perplexity"][name], None)
        yield _Score(f"nats per token {name}", *means, nll if same_windows else None)
        yield from _divergences(name, ours, theirs, same_windows)
    our_documents, their_documents = documents(results, first["key"]), documents(results, second["key"])
    for task in sorted(set(ours.get("tasks", {})) & set(theirs.get("tasks", {}))):
        our_scores, their_scores = ours["tasks"][task], theirs["tasks"][task]
        our_outcomes, their_outcomes = our_documents.get(task, {}), their_documents.get(task, {})
        for metric in ("acc", "acc_norm", "exact_match", "bits_per_byte", "ece"):
            if metric in our_scores and metric in their_scores:
                pairs = our_outcomes.get(metric, []), their_outcomes.get(metric, [])
                paired = pairs if len(pairs[0]) == len(pairs[1]) > 0 else None
                yield _Score(f"{task} {metric}", our_scores[metric], their_scores[metric], paired)


def _divergences(text: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], same_windows: bool) -> Iterator[_Score]:
    for name in ("kl", "agreement"):
        first, second = (metrics.get("divergence", {}).get(text, {}).get(name) for metrics in (ours, theirs))
        if first is not None and second is not None:
            pairs = tuple(metrics.get(f"window_{name}", {}).get(text, []) for metrics in (ours, theirs))
            yield _Score(f"{name} {text}", first, second, pairs if same_windows and len(pairs[0]) > 0 else None)


def _flips(first: Record, second: Record, results: Path) -> list[tuple[str, ...]]:
    """Share of the documents of each task that only one of the records answers right, in percent."""
    ours, theirs = documents(results, first["key"]), documents(results, second["key"])
    rows = []
    for task in sorted(set(ours) & set(theirs)):
        if (lost := outcomes_lost(ours[task], theirs[task])) is not None:
            rows.append((task, str(len(lost)), *(f"{100 * (lost == sign).mean():.1f}" for sign in (1, -1))))
    return rows


def _mask_overlap(first: Record, second: Record, results: Path) -> list[str]:
    """Jaccard overlap of the kept weights, one row per block and one column per role."""
    from dass_exp.storage.mask_file import iter_masks, mask_names  # torch, which reports without masks do not need

    paths = [results / "runs" / record["key"] / MASKS for record in (first, second)]
    if missing := [record["key"] for record, path in zip((first, second), paths, strict=True) if not path.is_file()]:
        return [f"No masks were kept for {' and '.join(missing)}: run it again with `save_masks=true`."]
    common = sorted({*mask_names(paths[0])} & {*mask_names(paths[1])})
    if not common:
        return ["The two records have no linear in common."]
    roles = {layer["name"]: layer["role"] for layer in first["sparsity"]["layers"]}
    both, either = Counter[tuple[str, str]](), Counter[tuple[str, str]]()  # weights kept in both records, in either
    for (name, keep), (_, other) in zip(iter_masks(paths[0], common), iter_masks(paths[1], common), strict=True):
        if keep.shape != other.shape:
            return [f"{name} has another shape in {second['key']}: the masks cannot be compared."]
        role, block = roles.get(name, "other"), block_of(name)
        places = ((block, role), (block, "all"), ("all", role), ("all", "all"))
        both.update(dict.fromkeys(places, int((keep & other).sum())))
        either.update(dict.fromkeys(places, int((keep | other).sum())))
    # all blocks first, then those outside the decoder, then by index
    blocks = sorted({row for row, _ in both}, key=lambda row: (row != "all", int(row) if row.isdigit() else -1))
    columns = [*dict.fromkeys(role for role in roles.values() if ("all", role) in both), "all"]
    overlap = {place: f"{both[place] / either[place]:.4f}" if either[place] else "" for place in both}
    rows = [(block, *(overlap.get((block, column), "") for column in columns)) for block in blocks]
    explanation = "Jaccard overlap: weights that both keep / weights that either keeps."
    return [explanation, "", *_table(("block", *columns), rows)]
