"""Lay records of a sweep out as a table: rows, columns, values with their noise, marks."""

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from dass_exp.config.settings import OPTIONAL_GROUPS
from dass_exp.errors import UserError
from dass_exp.report.console import method_label, removes_nothing
from dass_exp.report.load import Record, SweepCell, is_dense, model_name, setting, told_apart, varying_settings
from dass_exp.report.metrics import metric_of
from dass_exp.report.protocol_check import Protocols
from dass_exp.report.scores import Score, Scores, step_label
from dass_exp.report.significance import Outcomes, paired_p_value, seeds_p_value, separated

_BY_SETTING = "pattern"  # columns of a metric that has one number per record, where a sweep's file names none
_BY_TASK = ("task", "cost")  # columns that a metric brings with it
STEP = "step"  # as columns of a layout: the steps of a retraining behind which models were scored
HEADLINE = "headline"  # as columns of a layout: one column, the number that stands for a record, with ranks


@dataclass(frozen=True)
class TableValue:
    """One value of a table, over seeds or repeats."""

    values: tuple[float, ...]
    stderr: float | None = None  # of a single accuracy, in the same unit
    keys: tuple[str, ...] = ()  # of its records
    outcomes: Outcomes = field(
        default=Outcomes(), repr=False, compare=False
    )  # of a single record, by window or document
    mark: str = ""  # best or second, only if it differs from the next by more than noise
    rank: str = ""  # 1, or 1-3 if noise does not separate the best three

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
    headlines: Mapping[str, float] = field(default_factory=dict)  # by key, the number that stands for a record
    arguments: str = ""  # of dass-report that make this table, its name if empty
    by_column: Mapping[str, str] = field(default_factory=dict)  # metrics of columns that have one of their own

    def metric_in(self, column: str) -> str:
        """Return the metric that a column shows."""
        return self.by_column.get(column, self.metric)


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
    records, failed = told_apart(records, failed)
    grid = _Grid(layout, records, failed, results)
    differing = grid.protocols.differing(grid.axes)
    differing |= grid.protocols.conflicts(scores.keys() for scores in grid.scores(tuple(differing)).values())
    if differing and not mix:
        shown = "; ".join(f"{where}: {', '.join(sorted(values))}" for where, values in differing.items())
        advice = "choose some of them with --where, show the setting with --rows or --columns, or add --mix"
        raise UserError(f"{name}: its records differ in settings that the table does not show ({shown}); {advice}")
    mixed = tuple(differing)
    scores = grid.scores(mixed)
    cells: Cells = {(place.row, place.column): _pooled(repeats) for place, repeats in scores.items()}
    groups = {place.row: place.group for place in scores}
    columns = list(dict.fromkeys((*grid.columns, *(column for _, column in cells)))) or [""]
    for row, column, word in grid.unscored(columns, mixed):
        cells.setdefault((row, column), word)
    for place in grid.failures(columns):
        cells.setdefault(place, "failed")
    rows = grid.ordered(row for row, _ in cells)
    columns = [column for column in columns if any((row, column) in cells for row in rows)]
    marked, unranked = dict(cells), grid.unranked(mixed)
    for group in dict.fromkeys(groups.values()):
        ranked = [row for row in rows if groups.get(row) == group and row not in unranked]
        marked |= _marks(cells, ranked, columns, metric_of(grid.metric).higher)
        if grid.column == HEADLINE:
            marked |= _ranks(marked, ranked, columns, metric_of(grid.metric).higher)
    title, figure, note = str(layout["title"]), layout.get("figure"), str(layout.get("note") or "").strip()
    return ResultTable(
        name, title, grid.metric, rows, columns, marked, records, failed, figure, mixed, note, grid.axes, grid.headlines
    )


def with_metric(layout: Mapping[str, Any], metric: str, sweep: str) -> dict[str, Any]:
    """Return the layout of a sweep's table for another metric: the same axes, of which tasks take the columns.

    Where the file names no axes, the rows are methods and the columns patterns.

    Raises:
        UserError: there is no such metric.
    """
    described = metric_of(metric)
    rows = layout.get("rows", "method")
    rows, columns = (rows if isinstance(rows, list) else [rows]), str(layout.get("columns", _BY_SETTING))
    if (described.one_number and columns in _BY_TASK) or (columns == STEP and not described.has_steps):
        first, *others = rows
        rows, columns = (others, first) if others else (rows, _BY_SETTING)
    elif not described.one_number:
        rows = rows if columns in _BY_TASK else [columns, *rows]
        columns = "cost" if described.source == "cost" else "task"
    figure = None if described.source == "cost" else layout.get("figure")
    if figure is not None and figure.get("kind") == "steps" and columns != STEP:
        figure = {"kind": "bars"}
    title = f"{described.title}: {layout.get('title', sweep)}" if metric != layout.get("metric") else layout["title"]
    return {**layout, "metric": metric, "rows": rows, "columns": columns, "figure": figure, "title": title}


class _Place(NamedTuple):
    """The position of a value; rows of one group are ranked together."""

    group: tuple[str, ...]
    row: str
    column: str


class _Grid:
    """Assigns records to rows and columns of a table."""

    def __init__(
        self, layout: Mapping[str, Any], records: list[Record], failed: list[SweepCell], results: Path
    ) -> None:
        self.metric, self.column, self.records = str(layout["metric"]), _axis(layout["columns"]), records
        self.reader = Scores(self.metric, records, results, by_step=self.column == STEP)
        # columns are values of a setting
        self.by_setting = metric_of(self.metric).one_number and self.column not in (HEADLINE, STEP)
        self.rows = list(map(_axis, layout["rows"] if isinstance(layout["rows"], list) else [layout["rows"]]))
        self.axes = (*self.rows, self.column)
        self.protocols = Protocols(records)
        self.intended: list[Record] = [{"config": cell.config} for cell in failed if cell.config]
        self.varying = _without_axes(varying_settings([*records, *self.intended]), self.axes)
        self.models = list(dict.fromkeys(map(model_name, [*records, *self.intended])))

    @cached_property
    def columns(self) -> list[str]:
        """Labels of the columns in the order of the sweep, where they are settings and not tasks or costs."""
        if self.column == HEADLINE:
            return [metric_of(self.metric).label]
        if self.column == STEP:
            curves = [record["metrics"].get("retrain", {}).get("curve", ()) for record in self.records]
            return [step_label(step) for step in sorted({entry["step"] for curve in curves for entry in curve})]
        if not self.by_setting:
            return []
        pruned = [record for record in (*self.records, *self.intended) if not is_dense(record)]
        return list(dict.fromkeys(filter(None, (axis_label(record, self.column, self.varying) for record in pruned))))

    def unranked(self, mixed: tuple[str, ...]) -> set[str]:
        """Return the rows of models whose weights are all there."""
        whole = [record for record in self.records if is_dense(record) or removes_nothing(record["config"])]
        return {self._row(record, self.protocols.label(record, mixed)) for record in whole}

    @property
    def headlines(self) -> dict[str, float]:
        """The number that stands for each record, by key, where it has one."""
        scores = {record["key"]: self.reader.headline(record) for record in self.records}
        return {key: score.value for key, score in scores.items() if score is not None}

    def scores(self, mixed: tuple[str, ...]) -> dict[_Place, dict[str, Score]]:
        """Return by place the scores by the key of their record."""
        places: dict[_Place, dict[str, Score]] = {}
        for record in self.records:
            outer = axis_label(record, self.rows[0], self.varying) if len(self.rows) > 1 else ""
            extra = self.protocols.label(record, mixed)
            model = "" if self.column == "model" else model_name(record)
            group, row = (model, outer, extra), self._row(record, extra)
            for score in self._scores(record):
                places.setdefault(_Place(group, row, score.column), {})[record["key"]] = score
        return places

    def unscored(self, columns: list[str], mixed: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
        """Yield row, column and a word for records of pruned models that hold nothing of the metric."""
        for record in self.records:
            if not is_dense(record) and not self.reader.of(record):
                row, word = self._row(record, self.protocols.label(record, mixed)), self.reader.absence(record)
                label = axis_label(record, self.column, self.varying) if self.by_setting else ""
                yield from ((row, column, word) for column in ([label] if label in columns else columns))

    def failures(self, columns: list[str]) -> Iterator[tuple[str, str]]:
        """Yield row and column of each failed cell; all columns if the column is known only after the evaluation."""
        for record in self.intended:
            column = axis_label(record, self.column, self.varying) if self.by_setting else ""
            for place in [column] if column in columns else columns:
                yield self._row(record), place

    def ordered(self, rows: Iterator[str]) -> list[str]:
        """Sort rows by model, dense first, each once."""

        def position(row: str) -> tuple[int, bool]:
            model = next((number for number, name in enumerate(self.models) if row.startswith(f"{name} ")), 0)
            return model, not row.endswith("dense")

        return sorted(dict.fromkeys(rows), key=position)

    def _row(self, record: Record, extra: str = "") -> str:
        shown = [axis for axis in self.rows if axis != "model"]
        labels = [label for axis in shown if (label := axis_label(record, axis, self.varying))]
        if is_dense(record):
            row = f"{extra} dense".lstrip()
        else:
            row = " ".join(labels)
            if not row and self.column != "method":
                row = axis_label(record, "method", self.varying)
            row = ", ".join(filter(None, (row, extra)))
        several = len(self.models) > 1 and self.column != "model"
        return f"{model_name(record)} {row}".strip() if several or "model" in self.rows else row

    def _scores(self, record: Record) -> list[Score]:
        if self.column == HEADLINE:
            score = self.reader.headline(record)
            return [] if score is None else [score._replace(column=self.columns[0], stderr=None)]
        scores = self.reader.of(record)
        if self.column == STEP and "retrain" not in record["metrics"]:  # dense, or not trained: the same in all
            return [score._replace(column=column) for column in self.columns for score in scores]
        if not self.by_setting:
            return scores
        label = axis_label(record, self.column, self.varying)
        columns = [label] if label else self.columns or [""]  # dense has no pattern: it is in every column
        return [score._replace(column=column) for column in columns for score in scores]


def _axis(name: Any) -> str:
    return "model" if name == "model.name" else str(name)


def _without_axes(varying: Mapping[str, list[str]], axes: tuple[str, ...]) -> dict[str, list[str]]:
    """Leave out the hyper-parameters that an axis shows: a label need not repeat them."""
    shown = {axis.rpartition(".")[2] for axis in axes if axis.partition(".")[0] in ("method", *OPTIONAL_GROUPS)}
    return {part: [name for name in names if name not in shown] for part, names in varying.items()}


def _pooled(scores: Mapping[str, Score]) -> TableValue:
    """Pool the scores of several seeds or repeats; keep error and outcomes only of a single one."""
    values = tuple(score.value for score in scores.values())
    single = next(iter(scores.values())) if len(scores) == 1 else Score("", 0.0)
    return TableValue(values, single.stderr, tuple(scores), single.outcomes)


def axis_label(record: Mapping[str, Any], axis: str, varying: Mapping[str, list[str]]) -> str:
    """Return a record's label along an axis: ``method`` with varying hyper-parameters, ``pattern``, or any setting."""
    config = record["config"]
    if axis == "method":
        return method_label(config, varying)
    if axis == "pattern" and removes_nothing(config):
        return ""  # it stands beside every pattern, as dense does
    if axis == "model":
        return model_name(record)
    if axis in OPTIONAL_GROUPS:
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
        apart = separated([value for _, value in ranked], _p_value)
        for place, mark in enumerate(("best", "second")):
            if (place, place + 1) not in apart:
                break
            row, value = ranked[place]
            marked[(row, column)] = replace(value, mark=mark)
    return marked


def _ranks(cells: Cells, rows: list[str], columns: list[str], higher: bool) -> Cells:
    """Rank these rows per column; a value that noise does not separate from others has all ranks that it may have."""
    ranked: Cells = {}
    for column in columns:
        values = [(row, value) for row in rows if is_finite(value := cells.get((row, column)))]
        apart = separated([value for _, value in values], _p_value)
        for place, (row, value) in enumerate(values):
            others = [other for number, (_, other) in enumerate(values) if (place, number) in apart]
            better = sum((other.mean > value.mean) == higher for other in others)
            first, last = 1 + better, len(values) - len(others) + better
            ranked[(row, column)] = replace(value, rank=str(first) if first == last else f"{first}-{last}")
    return ranked


def _p_value(first: TableValue, second: TableValue) -> float | None:
    if len(first.values) > 1 and len(second.values) > 1:
        return seeds_p_value(first.values, second.values)
    return paired_p_value(first.outcomes, second.outcomes)
