"""The leaderboard: whatever was scored under one protocol, ranked. One table per model, pattern, scope and protocol."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dass_exp.config.settings import OPTIONAL_GROUPS
from dass_exp.errors import UserError
from dass_exp.report.console import calibration_label, windows_label
from dass_exp.report.frame import matching
from dass_exp.report.load import Record, evaluation_of, is_dense, load, model_identity
from dass_exp.report.metric_table import build_metric_table
from dass_exp.report.scores import main_text
from dass_exp.report.styles import display
from dass_exp.report.table import ResultTable, TableValue, is_finite
from dass_exp.report.write import format_value, markdown_table
from dass_exp.storage.durable import write_text

_INTRODUCTION = (
    "# Leaderboard",
    "Each table holds what was scored under one protocol, best perplexity first. In parentheses the rank; several "
    "(1-3) where noise does not separate them: a paired t over windows, or Welch's t over seeds, 5 %, Holm's "
    "correction within a column. ± is the standard deviation over seeds. Seconds depend on the load; each record "
    "has its own.",
    "Made by `dass-report leaderboard` from records of committed code. To add a line, run the method, copy the folder "
    "of its record (`results/runs/<key>`) into `runs/` here, and run the command again.",
)
_METRICS = ("perplexity", "kl", "agreement")
_RANKED = "perplexity"
# parts of an identity that belong to a row, to one of its repetitions, or to what stands beside it
_VARIED = {"method", *OPTIONAL_GROUPS, "code", "seed", "repeat", "trained", "model", "calibration"}


def write_leaderboard(results: Path, output: Path, where: Sequence[str] = ()) -> Path:
    """Write ``leaderboard.md``.

    Args:
        results: the folder whose ``runs/`` holds the records.
        output: the folder to write to.
        where: filters (:func:`dass_exp.report.frame.matching`).

    Returns:
        the path of the page.

    Raises:
        UserError: there is nothing to rank, a record is damaged or newer, or a filter is wrong.
    """
    loaded = load(results)
    if damaged := [problem for problem in loaded.problems if "/runs/" in problem]:
        raise UserError(damaged[0])
    admitted = matching(loaded.records.values(), where)
    scored = [record for record in admitted if main_text(record) in record["metrics"].get("perplexity", {})]
    records = sorted(filter(_is_of_committed_code, scored), key=lambda record: record["key"])
    pruned = [record for record in records if not is_dense(record)]
    if not pruned:
        raise UserError(f"{results}: no record of a pruned model that was scored on a text and made by committed code")
    sections = [*_INTRODUCTION]
    for group in _of_one_protocol(pruned):
        evaluation = evaluation_of(group[0])
        dense = [record for record in records if is_dense(record) and evaluation_of(record) == evaluation]
        sections.append(_section(group, dense, results))
    if left_out := len(scored) - len(records):
        sections.append(f"{left_out} records of uncommitted code were left out.")
    return write_text(output / "leaderboard.md", "\n\n".join(sections) + "\n")


def _is_of_committed_code(record: Record) -> bool:
    environment = record["environment"]
    return bool(environment.get("git_commit")) and environment.get("git_dirty") is False


def _of_one_protocol(records: list[Record]) -> list[list[Record]]:
    """Group records by model, pattern and protocol; one without calibration joins all that differ in nothing else."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault((*_protocol(record), json.dumps(record["identity"].get("calibration"))), []).append(record)
    for (*protocol, calibration), group in list(groups.items()):
        others = [key for key in groups if [*key[:-1]] == protocol and key[-1] != calibration]
        if calibration == "null" and others:
            for key in others:
                groups[key] += group
            del groups[(*protocol, calibration)]
    return [groups[key] for key in sorted(groups)]


def _protocol(record: Record) -> tuple[str, str, str]:
    """Return what must be equal within a table: model, pattern, and the identity without what may differ."""
    identity: Mapping[str, Any] = record["identity"]
    compared = {name: value for name, value in identity.items() if name not in _VARIED}
    windows = json.dumps([compared, record["protocol"].get("windows_sha256")], sort_keys=True)
    return model_identity(record), record["config"]["pattern"]["name"], windows


def _section(records: list[Record], dense: list[Record], results: Path) -> str:
    """Return the table of one protocol under its heading."""
    config, protocol = records[0]["config"], records[0]["protocol"]
    table = build_metric_table(
        "leaderboard", {"rows": "method", "title": ""}, [*dense, *records], [], results, mix=True
    )
    columns = [column for column in table.columns if table.metric_in(column) in _METRICS]
    by_key = {record["key"]: record for record in (*dense, *records)}
    rows = [_row(row, columns, table, by_key) for row in sorted(table.rows, key=lambda row: _place(row, table))]
    note = f" ({protocol['model_note']})" if protocol["model_note"] else ""
    heading = f"## {config['pattern']['name']}, {config['scope']}, {config['model']['name']}"
    parts = [f"{model_identity(records[0])}{note}, {protocol['dtype']} on {protocol['device']}"]
    parts += [f"calibration {label}" for label in _different(map(calibration_label, records))]
    parts += [windows_label(protocol), f"beginning-of-sequence token: {protocol['bos']}"]
    return "\n\n".join([heading, "; ".join(parts) + ".", markdown_table(["", *columns, "records"], rows)])


def _row(row: str, columns: list[str], table: ResultTable, records: Mapping[str, Record]) -> list[str]:
    values = [table.cells.get((row, column), "") for column in columns]
    texts = [format_value(value, table.metric_in(column)) for value, column in zip(values, columns, strict=True)]
    keys = _different(key for value in values if isinstance(value, TableValue) for key in value.keys)
    pattern = next((config["pattern"]["name"] for key in keys if (config := records[key]["config"])["pattern"]), "")
    links = ", ".join(f"[{key[:8]}](runs/{key}/result.json)" for key in keys)
    label = display(row.removeprefix(f"{pattern} "))
    return [label, *texts, links]


def _place(row: str, table: ResultTable) -> tuple[bool, float]:
    """Sort by perplexity, dense first; what is no number stands last."""
    (column,) = (column for column in table.columns if table.metric_in(column) == _RANKED)
    value = table.cells.get((row, column))
    return not row.endswith("dense"), value.mean if is_finite(value) else float("inf")


def _different(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(filter(None, texts)))
