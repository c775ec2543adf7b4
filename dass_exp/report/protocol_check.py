"""Whether records were made alike, so that one table may hold them, and what differs where they were not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dass_exp.report.load import Record, model_of
from dass_exp.storage.record_schema import flatten

_PER_MODEL = (
    "weights",
    "dtype",
    "bos",
    "split",
    "windows_sha256",
)  # a model may determine these: they must be equal among its own rows only
_FIXED = (
    "pattern",
    "scope",
    "calibration.sampling",
    "calibration.name",
    "calibration.num_samples",
    "calibration.seq_len",
    "context",
    "dataset",
    "windows",
    "limit",
    "tasks",
    "lm_eval",
    "device",
)


def told(record: Record, differing: tuple[str, ...]) -> str:
    """A record's values of the fields that differ, as rows of a mixed table name them."""
    if not differing:
        return ""
    made = made_by(record) | flatten(record["identity"])
    return ", ".join(f"{field}={made[field]}" for field in differing if field in made)


def colliding(places: Iterable[Sequence[Record]]) -> dict[str, set[str]]:
    """What differs between records of one cell beside the seeds and repeat: they are no repetitions of one run."""
    found: dict[str, set[str]] = {}
    for records in places:
        identities = [
            flatten({**record["identity"], "model": model_of(record)})
            for record in {record["key"]: record for record in records}.values()
        ]
        for name in dict.fromkeys(name for identity in identities for name in identity):
            values = {identity.get(name, "none") for identity in identities}
            if len(values) > 1 and name not in ("seed", "repeat", "trained.seed"):
                found.setdefault(name, set()).update(values)
    return found


def made_by(record: Record) -> dict[str, Any]:
    """What must be equal in all rows of one table, as far as the record has it."""
    config, calibration = record["config"], record["calibration"] or {}
    known = {
        "pattern": (config["pattern"] or {}).get("name"),
        "scope": config["scope"],
        "weights": model_of(record),
        "calibration.sampling": (config.get("calibration") or {}).get("sampling"),
        **{f"calibration.{key}": calibration.get(key) for key in ("name", "num_samples", "seq_len")},
        **record["protocol"],
    }
    return {name: known[name] for name in (*_FIXED, *_PER_MODEL) if known.get(name) is not None}


def differing_in(records: list[Record], axes: set[str]) -> dict[str, set[str]]:
    """What is not equal in all rows and is no axis of the table: the field and its values."""
    seen: dict[tuple[str, str], set[str]] = {}
    for record in records:
        for name, value in made_by(record).items():
            seen.setdefault((name, record["config"]["model"]["name"] if name in _PER_MODEL else ""), set()).add(
                str(value)
            )
    shown = {name for name, _ in seen for axis in axes if axis == name or axis.startswith(f"{name}.")}
    found: dict[str, set[str]] = {}
    for (name, _), values in seen.items():
        if len(values) > 1 and name not in shown:
            found.setdefault(name, set()).update(values)
    return found
