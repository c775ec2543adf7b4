"""Records as a pandas frame: one row a record, scores and settings as columns; and filters on them."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dass_exp.config.settings import OPTIONAL_GROUPS
from dass_exp.errors import UserError
from dass_exp.report.console import calibration_label, method_label, pattern_label
from dass_exp.report.load import Record, load, model_name, setting
from dass_exp.report.scores import main_text
from dass_exp.storage.record_numbers import flat_metrics

_LABELS = ("key", "created", "name", "model", "method", "pattern", "scope", "seed")
_LISTED = (*_LABELS, "perplexity", "kl", "mean_acc", "tags")


def records_frame(results: str | Path = "results", where: Sequence[str] = ()) -> pd.DataFrame:
    """Return the records of a results folder, the newest last.

    Args:
        results: the folder.
        where: filters such as ``method=dass`` (:func:`matching`).

    Returns:
        one row a record: key, created, name, tags, model, method, stages, pattern, scope, seed; its numbers
        (``perplexity`` of the tables' text, ``perplexity/NAME``, ``piqa/acc``, ``cost/prune_s``); and every setting by
        its dotted name (``method.alpha``, ``calibration.num_samples``).

    Raises:
        UserError: a filter is wrong.
    """
    admitted = matching(load(Path(results)).records.values(), where)
    records = sorted(admitted, key=lambda record: str(record["created"]))
    settings = pd.json_normalize([record["config"] for record in records])
    nested = settings[[name for name in settings if "." in name]]  # the others are among the labels
    return pd.concat([nested, pd.DataFrame([as_row(record) for record in records])], axis=1)


def as_row(record: Record) -> dict[str, Any]:
    """Return labels and numbers of a record by column."""
    config, metrics = record["config"], record["metrics"]
    text = main_text(record)
    row: dict[str, Any] = {"key": record["key"], "created": record["created"], "name": record.get("name", "")}
    row |= {"tags": ",".join(record.get("tags", ())), "model": model_name(record), "method": config["method"]["name"]}
    row |= {group: config[group]["name"] if config.get(group) else "none" for group in OPTIONAL_GROUPS}
    row |= {"pattern": pattern_label(config), "scope": config["scope"] or "", "seed": config["seed"]}
    row |= {"label": method_label(config, {}), "calibration": calibration_label(record)}
    if (perplexity := metrics.get("perplexity", {}).get(text)) is not None:
        row["perplexity"] = perplexity
    if (divergence := metrics.get("divergence", {}).get(text)) is not None:
        row |= {"kl": divergence["kl"], "agreement": divergence["agreement"]}
    return {**flat_metrics(record), **row}


def matching(records: Iterable[Record], where: Sequence[str]) -> list[Record]:
    """Return the records that all filters admit.

    A filter is ``FIELD=VALUE``, or ``FIELD=A,B`` for any of several values. A field is key or date (their beginning is
    enough: ``date=2026-12``), name, tag, notes (a part of them), model, method, a stage, pattern (``2:4`` or ``2of4``),
    scope, seed, label, calibration, or any setting by its dotted name.

    Raises:
        UserError: a filter has no value, or no record has its field.
    """
    chosen = [(record, as_row(record)) for record in records] if where else [(record, {}) for record in records]
    for text in where:
        field, equals, value = text.partition("=")
        if not equals or not field:
            raise UserError(f"--where {text}: expected FIELD=VALUE, such as method=dass or calibration.num_samples=16")
        values = [_value(record, row, field) for record, row in chosen]
        if chosen and all(known is None for known in values):
            fields = (
                "key, date, name, tag, notes, model, method, pattern, scope, seed, a stage, or a setting such as "
                "method.alpha"
            )
            raise UserError(f"--where {text}: no record has {field}; expected {fields}")
        pairs = zip(chosen, values, strict=True)
        chosen = [each for each, known in pairs if known is not None and _admits(known, field, value.split(","))]
    return [record for record, _ in chosen]


def _admits(value: Any, field: str, allowed: Sequence[str]) -> bool:
    if field in ("key", "date", "created"):
        return any(str(value).startswith(start) for start in allowed)
    if field == "notes":
        return any(part.lower() in str(value).lower() for part in allowed)
    if field == "pattern":
        allowed = [*allowed, *(re.sub(r"^(\d+)of(\d+)", r"\1:\2", text).replace("_", " ") for text in allowed)]
    if field == "calibration":
        return any(str(value).lower() == text.lower() or str(value).endswith(f" of {text}") for text in allowed)
    if field == "tag":
        return bool({*allowed} & {*value})
    return any(_same(value, each) for each in allowed)


def _same(value: Any, text: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).lower() == text.lower()
    try:
        return float(value) == float(text)
    except ValueError:
        return False


def _value(record: Record, row: dict[str, Any], field: str) -> Any:
    if field in ("tag", "notes"):
        return record.get("tags", []) if field == "tag" else record.get("notes", "")
    if field == "date":
        return row["created"]
    known = row[field] if field in row else setting(record["config"], field)
    return setting(record["identity"], field) if known is None else known  # such as code.method, of a plugin


def listed(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of a list of records, as text; those that are empty in all are left out."""
    shown = pd.DataFrame(index=frame.index)
    for column in _LISTED:
        source = "label" if column == "method" else column
        if source in frame and not frame[source].isin(["", None]).all() and not frame[source].isna().all():
            shown[column] = [_shown(column, value) for value in frame[source]]
    return shown


def _shown(column: str, value: Any) -> str:
    if value is None or value != value:  # noqa: PLR0124 - NaN
        return ""
    if column in ("perplexity", "kl", "mean_acc"):
        return {"perplexity": f"{value:.2f}", "kl": f"{value:.3f}", "mean_acc": f"{100 * value:.1f}"}[column]
    if column == "seed":
        return f"{value:.0f}"
    return str(value)[: {"key": 8, "created": 10}.get(column)]
