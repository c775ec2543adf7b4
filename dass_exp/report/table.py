"""Lay records of a sweep out as a table: rows, columns, values with their noise, marks."""

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from dass_exp.config.settings import STAGE_GROUPS
from dass_exp.errors import UserError
from dass_exp.report.console import method_label
from dass_exp.report.load import Record, SweepCell, documents, is_dense, model_name, setting, varying_settings
from dass_exp.report.protocol_check import Protocols
from dass_exp.report.significance import pairs_differ, seeds_differ

HIGHER_IS_BETTER = {"acc": True, "acc_norm": True, "perplexity": False, "cost": False}
# Columns of a cost table: label and unit of each field of a record's cost.
_COSTS = {
    "prune_s": ("seconds to prune", 1.0),
    "peak_rss_bytes": ("peak memory GB", 1e-9),
    "peak_gpu_bytes": ("peak GPU memory GB", 1e-9),
}


@dataclass(frozen=True)
class TableValue:
    """One value of a table, over seeds or repeats."""

    values: tuple[float, ...]
    stderr: float | None = None  # of a single accuracy, in the same unit
    keys: tuple[str, ...] = ()  # of its records
    outcomes: tuple[float, ...] = field(default=(), repr=False)  # of a single record, by window or document
    mark: str = ""  # best or second, only if it differs from the next by more than noise

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over seeds or repeats, None for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def spread(self) -> float | None:
        """The number after the ± sign: the standard deviation, or the standard error of a single value."""
        return self.sd if self.sd is not None else self.stderr


def is_finite(value: TableValue | str | None) -> TypeGuard[TableValue]:
    """Check whether a value is a finite number."""
    return isinstance(value, TableValue) and math.isfinite(value.mean)


Cells = dict[tuple[str, str], TableValue | str]


@dataclass(frozen=True)
class ResultTable:
    """A table of a sweep; title, metric, figure and note are those of the sweep's file."""

    name: str
    title: str
    metric: str
    rows: list[str]
    columns: list[str]
    cells: Cells  # by row and column: a value, or a word such as "failed"
    records: list[Record]
    failed: list[SweepCell]  # cells without a record
    figure: Mapping[str, Any] | None
    mixed: tuple[str, ...] = ()  # settings in which the records differ, though no axis shows them
    note: str = ""
    axes: tuple[str, ...] = ()  # settings that rows and columns show


def build_table(
    name: str,
    layout: Mapping[str, Any],
    records: list[Record],
    failed: list[SweepCell],
    results: Path,
    mix: bool = False,
) -> ResultTable:
    """Lay the records of a sweep out as a table, as the ``sweep`` block of its file says.

    Raises:
        UserError: the records differ in a setting that no axis shows. With ``mix`` the rows show it instead.
    """
    grid = _Grid(layout, records, failed, results)
    differing = grid.protocols.differing(grid.axes)
    differing |= grid.protocols.conflicts(scores.keys() for scores in grid.scores(tuple(differing)).values())
    if differing and not mix:
        shown = "; ".join(f"{where}: {', '.join(sorted(values))}" for where, values in differing.items())
        advice = "use another results_dir for one of them, or add --mix"
        raise UserError(f"{name}: its records differ in settings that the table does not show ({shown}); {advice}")
    mixed = tuple(differing)
    scores = grid.scores(mixed)
    cells: Cells = {(place.row, place.column): _pooled(repeats) for place, repeats in scores.items()}
    groups = {place.row: place.group for place in scores}
    columns = list(dict.fromkeys((*grid.columns, *(column for _, column in cells)))) or [""]
    for place in grid.failures(columns):
        cells.setdefault(place, "failed")
    rows = grid.ordered(row for row, _ in cells)
    columns = [column for column in columns if any((row, column) in cells for row in rows)]
    marked = dict(cells)
    for group in dict.fromkeys(groups.values()):
        ranked = [row for row in rows if groups.get(row) == group and not row.endswith("dense")]
        marked |= _marks(cells, ranked, columns, HIGHER_IS_BETTER[grid.metric])
    title, figure, note = str(layout["title"]), layout.get("figure"), str(layout.get("note") or "").strip()
    return ResultTable(name, title, grid.metric, rows, columns, marked, records, failed, figure, mixed, note, grid.axes)


class _Place(NamedTuple):
    """The position of a value; rows of one group are ranked together."""

    group: tuple[str, ...]
    row: str
    column: str


class _Score(NamedTuple):
    """One number of one record."""

    column: str
    value: float
    stderr: float | None = None
    outcomes: tuple[float, ...] = ()


class _Grid:
    """Assigns records to rows and columns of a table."""

    def __init__(
        self, layout: Mapping[str, Any], records: list[Record], failed: list[SweepCell], results: Path
    ) -> None:
        self.metric, self.column, self.records, self.results = layout["metric"], layout["columns"], records, results
        self.rows = layout["rows"] if isinstance(layout["rows"], list) else [layout["rows"]]
        self.axes = (*self.rows, self.column)
        self.protocols = Protocols(records)
        self.intended: list[Record] = [{"config": cell.config} for cell in failed if cell.config]
        self.varying = varying_settings([*records, *self.intended])
        self.models = list(dict.fromkeys(map(model_name, [*records, *self.intended])))

    @cached_property
    def columns(self) -> list[str]:
        """Labels of the columns in the order of the sweep, where they are settings and not tasks or costs."""
        if self.metric != "perplexity":
            return []
        pruned = [record for record in (*self.records, *self.intended) if not is_dense(record)]
        return list(dict.fromkeys(filter(None, (axis_label(record, self.column, self.varying) for record in pruned))))

    def scores(self, mixed: tuple[str, ...]) -> dict[_Place, dict[str, _Score]]:
        """Return by place the scores by the key of their record."""
        places: dict[_Place, dict[str, _Score]] = {}
        for record in self.records:
            outer = axis_label(record, self.rows[0], self.varying) if len(self.rows) > 1 else ""
            extra = self.protocols.label(record, mixed)
            group, row = (model_name(record), outer, extra), self._row(record, extra)
            for score in self._scores(record):
                places.setdefault(_Place(group, row, score.column), {})[record["key"]] = score
        return places

    def failures(self, columns: list[str]) -> Iterator[tuple[str, str]]:
        """Yield row and column of each failed cell; all columns if the column is known only after the evaluation."""
        for record in self.intended:
            column = axis_label(record, self.column, self.varying) if self.metric == "perplexity" else ""
            for place in [column] if column in columns else columns:
                yield self._row(record), place

    def ordered(self, rows: Iterator[str]) -> list[str]:
        """Sort rows by model, dense first, each once."""

        def position(row: str) -> tuple[int, bool]:
            model = next((number for number, name in enumerate(self.models) if row.startswith(f"{name} ")), 0)
            return model, not row.endswith("dense")

        return sorted(dict.fromkeys(rows), key=position)

    def _row(self, record: Record, extra: str = "") -> str:
        labels = [label for axis in self.rows if (label := axis_label(record, axis, self.varying))]
        if is_dense(record):
            row = f"{extra} dense".lstrip()
        else:
            row = " ".join(labels) or axis_label(record, "method", self.varying)
            row = f"{row}, {extra}" if extra else row
        return f"{model_name(record)} {row}" if len(self.models) > 1 else row

    def _scores(self, record: Record) -> list[_Score]:
        metrics, cost = record["metrics"], record["cost"]
        if self.metric == "cost":
            known = {name: column for name, column in _COSTS.items() if cost.get(name) is not None}
            return [_Score(label, cost[name] * unit) for name, (label, unit) in known.items()]
        if self.metric == "perplexity":
            label = axis_label(record, self.column, self.varying)
            columns = [label] if label else self.columns  # dense has no pattern: it is in every column
            return [
                _Score(column, value, None, tuple(metrics["window_nll"][dataset]))
                for column in columns
                for dataset, value in metrics.get("perplexity", {}).items()
            ]
        return self._accuracies(record)

    def _accuracies(self, record: Record) -> list[_Score]:
        """Return accuracies in percent by task, and their mean."""
        outcomes, scores = documents(self.results, record["key"]), []
        for task, values in record["metrics"].get("tasks", {}).items():
            name = self.metric if self.metric in values else "acc"
            paired = tuple(outcomes.get(task, {}).get(name, ()))
            scores.append(_Score(task, 100 * values[name], 100 * values[f"{name}_stderr"], paired))
        if scores:
            variance = sum(score.stderr**2 for score in scores if score.stderr is not None)  # tasks are independent
            scores.append(_Score("mean", 100 * record["metrics"][f"mean_{self.metric}"], variance**0.5 / len(scores)))
        return scores


def _pooled(scores: Mapping[str, _Score]) -> TableValue:
    """Pool the scores of several seeds or repeats; keep error and outcomes only of a single one."""
    values = tuple(score.value for score in scores.values())
    single = next(iter(scores.values())) if len(scores) == 1 else _Score("", 0.0)
    return TableValue(values, single.stderr, tuple(scores), single.outcomes)


def axis_label(record: Mapping[str, Any], axis: str, varying: Mapping[str, list[str]]) -> str:
    """Return a record's label along an axis: ``method`` with varying hyper-parameters, ``pattern``, or any setting."""
    config = record["config"]
    if axis == "method":
        return method_label(config, varying)
    if axis in STAGE_GROUPS:
        return str((config.get(axis) or {"name": "none"})["name"])
    value = setting(config, "pattern.name" if axis == "pattern" else axis)
    if value is None:
        return ""
    return f"{axis.rsplit('.', 1)[-1]}={value}" if isinstance(value, (int, float)) else str(value)


def _marks(cells: Cells, rows: list[str], columns: list[str], higher: bool) -> Cells:
    """Mark the best and second of these rows per column, each only if it differs from the next by more than noise."""
    marked: Cells = {}
    for column in columns:
        finite = [(row, value) for row in rows if is_finite(value := cells.get((row, column)))]
        ranked = sorted(finite, key=lambda pair: pair[1].mean, reverse=higher)
        for (row, value), (_, following), mark in zip(ranked, ranked[1:], ("best", "second"), strict=False):
            if not _differ(value, following):
                break
            marked[(row, column)] = replace(value, mark=mark)
    return marked


def _differ(first: TableValue, second: TableValue) -> bool:
    if len(first.values) > 1 and len(second.values) > 1:
        return seeds_differ(first.values, second.values)
    return pairs_differ(first.outcomes, second.outcomes)
