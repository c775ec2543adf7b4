"""Records as a pandas frame: one row a record, scores and settings as columns; and filters on them."""

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
from dass_exp.storage.record_schema import flatten

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
    records = matching(load(Path(results)).records.values(), where)
    return pd.DataFrame([as_row(record) for record in sorted(records, key=lambda record: str(record["created"]))])


def as_row(record: Record) -> dict[str, Any]:
    """Return labels, numbers and settings of a record by column."""
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
    settings = {name: _number(value) for name, value in flatten(config).items() if "." in name}
    return {**settings, **flat_metrics(record), **row}


def _number(text: str) -> Any:
    """Return a leaf of the settings as the number or truth value that it was."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None if text == "None" else text


def matching(records: Iterable[Record], where: Sequence[str]) -> list[Record]:
    """Return the records that all filters admit.

    A filter is ``FIELD=VALUE``, or ``FIELD=A,B`` for any of several values. A field is key (its beginning is enough),
    name, tag, model, method, a stage, pattern, scope, seed, label, calibration, or any setting by its dotted name.

    Raises:
        UserError: a filter has no value, or no record has its field.
    """
    chosen = list(records)
    for text in where:
        field, equals, value = text.partition("=")
        if not equals or not field:
            raise UserError(f"--where {text}: expected FIELD=VALUE, such as method=dass or calibration.num_samples=16")
        allowed = value.split(",")
        known = [record for record in chosen if _value(record, field) is not None]
        if chosen and not known:
            fields = "key, name, tag, model, method, pattern, scope, seed, a stage, or a setting such as method.alpha"
            raise UserError(f"--where {text}: no record has {field}; expected {fields}")
        chosen = [record for record in known if _admits(record, field, allowed)]
    return chosen


def _admits(record: Record, field: str, allowed: Sequence[str]) -> bool:
    value = _value(record, field)
    if field == "key":
        return any(str(value).startswith(start) for start in allowed)
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


def _value(record: Record, field: str) -> Any:
    if field == "tag":
        return record.get("tags", [])
    row = as_row(record)
    return row[field] if field in row else setting(record["config"], field)


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
