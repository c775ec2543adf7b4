"""What a line picture shows of a sheet: a curve for each thing that varies besides x, and a level for what has no x."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

from dass_exp.report.load import Record
from dass_exp.report.protocol_check import made_by
from dass_exp.report.table import Entry, ResultTable

_TELLING = (
    "model.name",
    "method.name",
    "pattern.name",
    "scope",
    "calibration.name",
    "calibration.num_samples",
    "calibration.seq_len",
)


def curves_of(sheet: ResultTable, axis: str) -> tuple[dict[str, dict[float, Entry]], dict[str, Entry]]:
    """Values over seeds by label and x; and, for the records without the setting, by label.

    Args:
        sheet: with its records.
        axis: dotted path into their config of what is drawn along x.
    """
    scored = {record["key"]: record for record in sheet.records if _score(record, sheet.metric) is not None}
    pruned = [record for record in scored.values() if record["config"]["method"]["name"] != "dense"]
    own = dict.fromkeys(f"method.{name}" for record in pruned for name in record["config"]["method"] if name != "name")
    parts = [
        part
        for part in (*_TELLING[:2], *own, *_TELLING[2:])
        if part != axis and len({str(_setting(record, part)) for record in pruned} - {"None"}) > 1
    ]
    curves: dict[str, dict[float, tuple[float, ...]]] = {}
    levels: dict[str, tuple[float, ...]] = {}
    for record in scored.values():
        x, value = _setting(record, axis), _score(record, sheet.metric)
        name, numeric = record["config"]["method"]["name"], isinstance(x, (int, float)) and not isinstance(x, bool)
        shown = [
            part for part in parts if part != "pattern.name" or not (numeric and axis.startswith("pattern."))
        ]  # there x is the pattern
        told = [
            str(text) if part.endswith("name") else f"{part.rsplit('.', 1)[-1]}={text}"
            for part in shown
            if (text := _setting(record, part)) is not None
        ]
        told += [
            f"{field}={made_by(record)[field]}"
            for field in sheet.mixed
            if field in made_by(record) and field not in shown and field != axis
        ]
        label = " ".join(dict.fromkeys([*told, name] if name == "dense" or not told else told))
        place: dict[Any, tuple[float, ...]] = curves.setdefault(label, {}) if numeric else levels
        where = x * (100 if axis.endswith("sparsity") else 1) if numeric else label
        place[where] = (*place.get(where, ()), value or 0.0)
    in_order = {label: {x: Entry(curve[x]) for x in sorted(curve)} for label, curve in curves.items()}
    return in_order, {
        label: Entry(values)
        for label, values in sorted(levels.items(), key=lambda level: not level[0].endswith("dense"))
    }


def _setting(record: Record, path: str) -> Any:
    return reduce(
        lambda found, part: found.get(part) if isinstance(found, dict) else None, path.split("."), record["config"]
    )


def _score(record: Record, metric: str) -> float | None:
    """The one finite number of a record that a line shows: perplexity, or mean accuracy in percent."""
    metrics = record["metrics"]
    found = (
        next(iter(metrics.get("perplexity", {}).values()), None)
        if metric == "perplexity"
        else metrics.get(f"mean_{metric}")
    )
    return (
        None if found is None or not math.isfinite(found) else float(found) if metric == "perplexity" else 100 * found
    )
