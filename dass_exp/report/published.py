"""Published numbers beside ours: the same model, scope, pattern, method, metric, data set and context, or none."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from dass_exp.errors import UserError
from dass_exp.report.load import Record

PERPLEXITY_TOLERANCE = 0.02  # relative
ACCURACY_TOLERANCE = 1.0  # points
NOTHING_PUBLISHED = (
    "No published number on file for this model, scope and protocol (results/reference/published_numbers.csv)."
)
_COLUMNS = ("source", "model", "scope", "pattern", "method", "metric", "dataset", "context", "value")
_NO_VERDICT = ("not stated", "not verified", "disagrees")


@dataclass(frozen=True)
class Published:
    """One published figure of the same kind as one of ours.

    Args:
        label: model, method, pattern and metric.
        ours, value: the two figures.
        source: the first column of the table.
        verdict: within the tolerance or not, or why there is none.
    """

    label: str
    ours: float
    value: float
    source: str
    verdict: str


def read(path: Path) -> list[dict[str, str]]:
    """The rows of published_numbers.csv; a user's own rows (``source=dass-paper``) count like any other.

    Raises:
        UserError: a column is missing, or a value is no number; the message names the line.
    """
    with _readable(path) as file:
        reader = csv.DictReader(file)
        if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
            raise UserError(f"{path}: no column {', '.join(missing)}; it needs {', '.join(_COLUMNS)}")
        rows = []
        for row in reader:
            if not _is_number(row["value"]) or (row["metric"] == "perplexity" and float(row["value"]) <= 0):
                raise UserError(
                    f"{path}, line {reader.line_num}: value={row['value']!r}: expected a number"
                    + " above 0" * _is_number(row["value"])
                )
            rows.append({name: text or "" for name, text in row.items() if name is not None})
        return rows


@contextmanager
def _readable(path: Path) -> Iterator[TextIO]:
    """The file, with or without the mark that Excel puts at its head."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: it is no CSV file in UTF-8 ({error})") from error


def _is_number(text: str | None) -> bool:
    try:
        return math.isfinite(float(text or ""))
    except ValueError:
        return False


def beside(records: list[Record], rows: list[dict[str, str]]) -> list[Published]:
    """Every published figure that has a counterpart among the records."""
    return [
        match
        for record in records
        for metric, dataset, context, ours in _figures(record)
        for match in _matches(record, metric, dataset, context, ours, rows)
    ]


def _figures(record: Record) -> Iterator[tuple[str, str, str, float]]:
    """Metric, data set, context and value of each score of a record, in the terms of the table."""
    metrics = record["metrics"]
    for dataset, value in metrics.get("perplexity", {}).items():
        yield "perplexity", dataset, str(record["protocol"]["context"]), value
    tasks = metrics.get("tasks", {})
    if all(scores["limit"] is None for scores in tasks.values()):
        for task, scores in tasks.items():
            yield "accuracy_percent", task, "", 100 * scores["acc"]
        if len(tasks) == 5:
            yield "accuracy_percent", "mean5", "", 100 * metrics["mean_acc"]


def _matches(
    record: Record, metric: str, dataset: str, context: str, ours: float, rows: list[dict[str, str]]
) -> Iterator[Published]:
    config = record["config"]
    method, pattern = config["method"]["name"], config["pattern"]["name"] if config["pattern"] else "dense"
    for row in rows:
        same = (row["metric"], row["dataset"], row["context"], row["method"], row["pattern"]) == (
            metric,
            dataset,
            context,
            method,
            pattern,
        )
        if (
            same
            and _plain(row["model"]) == _plain(config["model"]["name"])
            and (method == "dense" or row["scope"] == config["scope"])
        ):
            value = float(row["value"])
            yield Published(
                f"{row['model']} {method} {pattern} {dataset}",
                ours,
                value,
                row["source"],
                _verdict(metric, ours, value, row.get("note") or ""),
            )


def _plain(name: str) -> str:
    """``llama3.1_8b`` and ``llama31_8b`` are one model."""
    return name.replace(".", "").lower()


def _verdict(metric: str, ours: float, value: float, note: str) -> str:
    if any(words in note for words in _NO_VERDICT):
        return f"no verdict: {note}"
    if metric == "perplexity":
        off, tolerance = abs(ours / value - 1), PERPLEXITY_TOLERANCE
        return f"{'within' if off <= tolerance else 'outside'} {tolerance:.0%} ({off:.1%})"
    off, tolerance = abs(ours - value), ACCURACY_TOLERANCE
    return f"{'within' if off <= tolerance else 'outside'} {tolerance:g} point ({off:.1f})"


def as_rows(found: list[Published]) -> list[list[str]]:
    """A header and one line per figure."""
    head = ["published", "ours", "theirs", "difference", "source", "verdict"]
    return [
        head,
        *(
            [row.label, f"{row.ours:.2f}", f"{row.value:.2f}", f"{row.ours - row.value:+.2f}", row.source, row.verdict]
            for row in found
        ),
    ]


def as_markdown(found: list[Published]) -> str:
    """The comparison as a Markdown table, or a line that says that there is nothing to compare with."""
    if not found:
        return NOTHING_PUBLISHED
    head, *rows = as_rows(found)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
