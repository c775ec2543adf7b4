"""Compare our scores with published ones of the same model, scope, pattern, method, metric, data set and context."""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dass_exp.errors import UserError
from dass_exp.report.load import Record, asked_tasks, is_dense, model_name, windows_of
from dass_exp.report.write import markdown_table

PERPLEXITY_TOLERANCE = 0.02  # relative
ACCURACY_TOLERANCE = 1.0  # points
NOTHING_PUBLISHED = (
    "No published number on file for this model, scope and protocol (results/reference/published_numbers.csv)."
)
_COLUMNS = ("source", "model", "scope", "pattern", "method", "metric", "dataset", "context", "value")
_NO_VERDICT = ("not stated", "not verified", "disagrees")


@dataclass(frozen=True)
class Published:
    """One published number and its counterpart among ours."""

    label: str  # model, method, pattern and data set
    ours: float
    value: float
    source: str
    verdict: str  # whether they agree within the tolerance, or why that cannot be said


def read(path: Path) -> list[dict[str, str]]:
    """Read published_numbers.csv, to which users may add rows (``source=dass-paper``).

    Raises:
        UserError: a column is missing, or a value is not a number; the message names the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # Excel puts a byte-order mark first
            reader = csv.DictReader(file)
            if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
                raise UserError(f"{path}: no column {', '.join(missing)}; it needs {', '.join(_COLUMNS)}")
            return [_checked(row, f"{path}, line {reader.line_num}") for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: it is no CSV file in UTF-8 ({error})") from error


def _checked(row: dict[str, str], place: str) -> dict[str, str]:
    try:
        number = math.isfinite(float(row["value"] or ""))
    except ValueError:
        number = False
    if not number or (row["metric"] == "perplexity" and float(row["value"]) <= 0):
        raise UserError(f"{place}: value={row['value']!r}: expected a number{' above 0' if number else ''}")
    return {name: text or "" for name, text in row.items() if name is not None}


def counterparts(records: list[Record], rows: list[dict[str, str]]) -> list[Published]:
    """Return every published number that has a counterpart among the records."""
    matches = []
    for record in records:
        for described, ours in _scores(record):
            for row in rows:
                if described.items() <= {**row, "model": _normalised(row["model"])}.items():
                    label = f"{row['model']} {row['method']} {row['pattern']} {row['dataset']}"
                    matches.append(Published(label, ours, float(row["value"]), row["source"], _verdict(row, ours)))
    return matches


def _scores(record: Record) -> Iterator[tuple[dict[str, str], float]]:
    """Each score of a record, described in the columns of the reference file."""
    config, metrics, tasks = record["config"], record["metrics"], asked_tasks(record)
    described = {
        "model": _normalised(model_name(record).partition("@")[0]),  # without what tells it from another of that name
        "method": config["method"]["name"],
        "pattern": config["pattern"]["name"] if config["pattern"] else "dense",
        **({} if is_dense(record) else {"scope": config["scope"]}),
    }
    for dataset, value in metrics.get("perplexity", {}).items():
        context = str(windows_of(record["protocol"], dataset)["context"])
        yield {**described, "metric": "perplexity", "dataset": dataset, "context": context}, value
    if record["protocol"].get("num_fewshot") or any(scores["limit"] is not None for scores in tasks.values()):
        return  # the published ones are of all documents, without examples
    accuracies = {task: scores["acc"] for task, scores in tasks.items() if "acc" in scores}
    if len(tasks) == 5:
        accuracies["mean5"] = metrics["mean_acc"]
    for task, value in accuracies.items():
        yield {**described, "metric": "accuracy_percent", "dataset": task, "context": ""}, 100 * value


def _normalised(model: str) -> str:
    """``llama3.1_8b`` and ``llama31_8b`` are one model."""
    return model.replace(".", "").lower()


def _verdict(row: dict[str, str], ours: float) -> str:
    note, value = row.get("note") or "", float(row["value"])
    if any(words in note for words in _NO_VERDICT):
        return f"no verdict: {note}"
    if row["metric"] == "perplexity":
        off = abs(ours / value - 1)
        return f"{'within' if off <= PERPLEXITY_TOLERANCE else 'outside'} {PERPLEXITY_TOLERANCE:.0%} ({off:.1%})"
    off = abs(ours - value)
    return f"{'within' if off <= ACCURACY_TOLERANCE else 'outside'} {ACCURACY_TOLERANCE:g} point ({off:.1f})"


def as_rows(published: list[Published]) -> list[list[str]]:
    """Return a header and one line per published number."""
    lines = [
        [row.label, f"{row.ours:.2f}", f"{row.value:.2f}", f"{row.ours - row.value:+.2f}", row.source, row.verdict]
        for row in published
    ]
    return [["published", "ours", "theirs", "difference", "source", "verdict"], *lines]


def as_markdown(published: list[Published]) -> str:
    """Return the comparison as a Markdown table, or :data:`NOTHING_PUBLISHED`."""
    header, *lines = as_rows(published)
    return markdown_table(header, lines) if lines else NOTHING_PUBLISHED
