"""A table of a sweep before it is written: rows, columns, values with their noise, and how they were made."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dass_exp.errors import UserError
from dass_exp.report.load import Cell, Record, documents, varying_settings
from dass_exp.report.protocol_check import colliding, differing_in, told
from dass_exp.report.significance import pairs_differ, seeds_differ

HIGHER_IS_BETTER = {"acc": True, "acc_norm": True, "perplexity": False, "cost": False}
_COSTS = {"prune_s": "seconds to prune", "peak_rss_bytes": "peak memory GB", "peak_gpu_bytes": "peak GPU memory GB"}


@dataclass(frozen=True)
class Entry:
    """One value of a table.

    Args:
        values: one number per seed or repeat.
        stderr: standard error of a single accuracy, in the unit of the values.
        keys: of the records it came from.
        outcomes: per window or document, for a paired test; empty where there are several seeds.
        mark: ``best``, ``second`` or nothing; set only outside the noise.
    """

    values: tuple[float, ...]
    stderr: float | None = None
    keys: tuple[str, ...] = ()
    outcomes: tuple[float, ...] = field(default=(), repr=False)
    mark: str = ""

    @property
    def mean(self) -> float:
        """Mean over seeds or repeats."""
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over seeds or repeats, None for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class ResultTable:
    """A table: ``cells`` by row and column label hold an :class:`Entry`, or a word such as ``failed``; ``mixed`` names what its protocols differ in.

    ``note`` is what its sweep says of what it can and cannot show.
    """

    name: str
    title: str
    metric: str
    rows: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], Entry | str]
    records: list[Record]
    failed: list[Cell]
    figure: Mapping[str, Any] | None
    mixed: tuple[str, ...] = ()
    note: str = ""


def build(
    name: str, layout: Mapping[str, Any], records: list[Record], failed: list[Cell], results: Path, mix: bool = False
) -> ResultTable:
    """Lay records out as a table.

    Args:
        name: of the sweep.
        layout: its ``sweep`` block: title, rows, columns, metric, figure.
        records: of its cells, dense ones included.
        failed: its failed cells.
        results: the folder that holds the records, for the outcomes of documents.
        mix: put records of different protocols into one table, with what differs in the row's name.

    Raises:
        UserError: the records differ in their protocol, scope or calibration, and ``mix`` was not asked for.
    """
    rows = layout["rows"] if isinstance(layout["rows"], list) else [layout["rows"]]
    intended: list[Record] = [{"config": cell.config} for cell in failed if cell.config]
    laid = _Layout(str(layout["metric"]), rows, str(layout["columns"]), records, intended, results)
    differing = differing_in(records, {*rows, laid.column})
    places = laid.places(tuple(differing))
    differing |= colliding([record for record, *_ in found] for found in places.values())
    if differing and not mix:
        shown = "; ".join(f"{name}: {', '.join(sorted(values))}" for name, values in differing.items())
        raise UserError(
            f"{name}: its records were not made alike ({shown}); run one of them into another results_dir, or ask for --mix"
        )
    places = laid.places(tuple(differing))
    cells: dict[tuple[str, str], Entry | str] = {
        (row, column): _entry(found) for (_, row, column), found in places.items()
    }
    groups = {row: group for group, row, _ in places}
    columns = list(dict.fromkeys((*laid.columns, *(column for _, column in cells)))) or [""]
    for cell in intended:
        row, column = laid.row(cell, ()), laid.label(cell, laid.column) if laid.metric == "perplexity" else ""
        for place in [column] if column in columns else columns:
            cells.setdefault((row, place), "failed")
    models = [record["config"]["model"]["name"] for record in (*records, *intended)]
    order = {
        row: next((number for number, model in enumerate(models) if row.startswith(f"{model} ")), 0) for row, _ in cells
    }
    labels = sorted(dict.fromkeys(row for row, _ in cells), key=lambda row: (order[row], not row.endswith("dense")))
    columns = [column for column in columns if any((row, column) in cells for row in labels)]
    marked = dict(cells)
    for group in dict.fromkeys(groups.values()):
        ranked = [row for row in labels if groups.get(row) == group and not row.endswith("dense")]
        marked |= _marks(cells, ranked, columns, HIGHER_IS_BETTER[laid.metric])
    title, note = str(layout["title"]), str(layout.get("note") or "").strip()
    return ResultTable(
        name, title, laid.metric, labels, columns, marked, records, failed, layout.get("figure"), tuple(differing), note
    )


Found = tuple[Record, float, float | None, tuple[float, ...]]


class _Layout:
    """Which record goes where in a table."""

    def __init__(
        self,
        metric: str,
        rows: Sequence[str],
        column: str,
        records: list[Record],
        intended: list[Record],
        results: Path,
    ) -> None:
        self.metric, self.rows, self.column, self.records, self.results = metric, rows, column, records, results
        self.varying = varying_settings([*records, *intended])
        self.several_models = len({record["config"]["model"]["name"] for record in (*records, *intended)}) > 1
        self.columns = _columns({"metric": metric, "columns": column}, [*records, *intended])

    def places(self, differing: tuple[str, ...]) -> dict[tuple[tuple[str, ...], str, str], list[Found]]:
        """Values by group of rows that are ranked together, row and column."""
        found: dict[tuple[tuple[str, ...], str, str], list[Found]] = {}
        for record in self.records:
            outer = self.label(record, self.rows[0]) if len(self.rows) > 1 else ""
            group, row = (
                (record["config"]["model"]["name"], outer, told(record, differing)),
                self.row(record, differing),
            )
            for column, *value in _values(record, self.metric, self.column, self.columns, self.varying, self.results):
                found.setdefault((group, row, column), []).append((record, *value))  # type: ignore[arg-type]
        return found

    def row(self, record: Record, differing: tuple[str, ...]) -> str:
        """What a record's row is called."""
        dense = record["config"]["method"]["name"] == "dense"
        row = (
            "dense"
            if dense
            else " ".join(filter(None, (self.label(record, axis) for axis in self.rows)))
            or self.label(record, "method")
        )
        if extra := told(record, differing):
            row = f"{extra} {row}" if dense else f"{row}, {extra}"
        return f"{record['config']['model']['name']} {row}" if self.several_models else row

    def label(self, record: Record, axis: str) -> str:
        """What a record is called along an axis."""
        return _label(record, axis, self.varying)


def _entry(found: list[tuple[Record, float, float | None, tuple[float, ...]]]) -> Entry:
    unique = {record["key"]: (value, stderr, outcomes) for record, value, stderr, outcomes in found}
    alone = len(unique) == 1
    _, (_, stderr, outcomes) = next(iter(unique.items()))
    return Entry(
        tuple(value for value, _, _ in unique.values()),
        stderr if alone else None,
        tuple(unique),
        outcomes if alone else (),
    )


def _values(
    record: Record, metric: str, axis: str, all_columns: Sequence[str], varying: Mapping[str, list[str]], results: Path
) -> list[tuple[str, float, float | None, tuple[float, ...]]]:
    """The values of a record as column, number, standard error and paired outcomes."""
    metrics = record["metrics"]
    if metric == "cost":
        scale = {"prune_s": 1.0, "peak_rss_bytes": 1e-9, "peak_gpu_bytes": 1e-9}
        return [
            (label, record["cost"][name] * scale[name], None, ())
            for name, label in _COSTS.items()
            if record["cost"].get(name) is not None
        ]
    if metric == "perplexity":
        column = _label(record, axis, varying)
        columns = (
            [column] if column else list(all_columns)
        )  # dense has no pattern and no calibration: it stands in every column
        return [
            (column, value, None, tuple(metrics["window_nll"][dataset]))
            for column in columns
            for dataset, value in metrics.get("perplexity", {}).items()
        ]
    outcomes, found = documents(results, record["key"]), []
    for task, scores in metrics.get("tasks", {}).items():
        name = metric if metric in scores else "acc"
        paired = tuple(outcomes.get(task, {}).get(name, ()))
        found.append((task, 100 * scores[name], 100 * scores[f"{name}_stderr"], paired))
    if found:
        spread = sum(stderr**2 for _, _, stderr, _ in found) ** 0.5 / len(found)  # the tasks are independent
        found.append(("mean", 100 * metrics[f"mean_{metric}"], spread, ()))
    return found


def _columns(layout: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Column labels of the pruned records, in the order in which the sweep ran them."""
    if layout["metric"] != "perplexity":
        return []
    labels = [
        _label(record, str(layout["columns"]), {})
        for record in records
        if record["config"]["method"]["name"] != "dense"
    ]
    return list(dict.fromkeys(filter(None, labels)))


def _label(record: Mapping[str, Any], axis: str, varying: Mapping[str, list[str]]) -> str:
    """What a record is called along an axis: ``method``, ``pattern``, or a dotted path into its config."""
    config = record["config"]
    if axis == "method":
        method = config["method"]
        return " ".join(
            [method["name"], *(f"{key}={method[key]}" for key in varying.get(method["name"], ()) if key in method)]
        )
    if axis == "pattern":
        return config["pattern"]["name"] if config["pattern"] else ""
    found: Any = config
    for part in axis.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return (
        "" if found is None else f"{axis.rsplit('.', 1)[-1]}={found}" if isinstance(found, (int, float)) else str(found)
    )


def _marks(
    cells: Mapping[tuple[str, str], Entry | str], rows: list[str], columns: list[str], higher: bool
) -> dict[tuple[str, str], Entry | str]:
    """The best and the second of these rows in each column, each marked only if it stands apart from the next."""
    marked: dict[tuple[str, str], Entry | str] = {}
    for column in columns:
        ranked = [
            (row, entry)
            for row in rows
            if isinstance(entry := cells.get((row, column)), Entry) and math.isfinite(entry.mean)
        ]
        ranked.sort(key=lambda pair: pair[1].mean, reverse=higher)
        for (row, entry), (_, following), mark in zip(ranked, ranked[1:], ("best", "second"), strict=False):
            if not _apart(entry, following):
                break
            marked[(row, column)] = replace(entry, mark=mark)
    return marked


def _apart(first: Entry, second: Entry) -> bool:
    if len(first.values) > 1 and len(second.values) > 1:
        return seeds_differ(first.values, second.values)
    return pairs_differ(first.outcomes, second.outcomes)
