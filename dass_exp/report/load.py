"""Read records and the cells of a sweep from a results folder. What cannot be read is named and passed over."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dass_exp.storage.record_schema import is_config, record_problem

Record = dict[str, Any]

# Settings that do not tell one cell from another.
_NOT_THE_CELL = {
    "results_dir",
    "tracker",
    "threads",
    "rerun",
    "sweeps",
    "plugins",
    "save_masks",
    "save",
    "plan",
    "calibration.batch_size",
    "eval.batch_size",
}


@dataclass(frozen=True)
class Loaded:
    """Records by key, and a line for each file that is no record."""

    records: dict[str, Record]
    problems: list[str]


@dataclass(frozen=True)
class Cell:
    """How a cell of a sweep last ended: ``done`` with the key of its record, or ``failed`` with its error and what it was meant to be.

    Args:
        overrides: that tell it from other cells.
        status: ``done`` or ``failed``.
        key: of its record.
        error: in one line.
        config: of a failed cell, in the form of a record's; empty where it is not known.
    """

    overrides: tuple[str, ...]
    status: str
    key: str | None
    error: str | None
    config: dict[str, Any] = field(default_factory=dict)


def load(results: Path) -> Loaded:
    """All records of a results folder."""
    records: dict[str, Record] = {}
    problems: list[str] = []
    for path in sorted(results.glob("runs/*/result.json")):
        try:
            found = _object(path)
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{path}: not read ({error})")
            continue
        if (problem := record_problem(found, path.parent.name)) is not None:
            problems.append(f"{path}: not a record of this project ({problem})")
            continue
        records[path.parent.name] = found
    return Loaded(records, problems)


def cells_of(results: Path, sweep: str) -> list[Cell]:
    """The cells of every launch of a sweep, each as it last ended, in the order of the launch that ran most of them.

    So the order does not tell whether a sweep was interrupted, or on how many workers it ran.
    """
    found: dict[tuple[str, ...], Cell] = {}
    launches: dict[Path, list[tuple[str, ...]]] = {}
    for path in _notes(results):
        try:
            note = _object(path)
        except (OSError, ValueError, RecursionError):
            continue  # a cell that was killed while it wrote; its next launch writes another
        cell = (
            _cell(note)
            if isinstance(overrides := note.get("overrides"), list) and f"sweeps={sweep}" in overrides
            else None
        )
        if cell is not None:
            found[cell.overrides] = cell
            launches.setdefault(path.parent.parent, []).append(cell.overrides)
    largest_first = sorted(launches.values(), key=len, reverse=True)
    return [found[named] for named in dict.fromkeys(named for launch in largest_first for named in launch)]


def _cell(note: dict[str, Any]) -> Cell | None:
    """What a note says, None if it is of no finished cell."""
    texts = [str(override) for override in note["overrides"]]
    named = tuple(text for text in texts if text.lstrip("+~").partition("=")[0] not in _NOT_THE_CELL)
    if note.get("status") == "done" and isinstance(record := note.get("record"), str):
        return Cell(named, "done", Path(record).parent.name, None)
    if note.get("status") == "failed":
        config = note.get("config")
        return Cell(
            named,
            "failed",
            None,
            str(note.get("error")),
            config if isinstance(config, dict) and is_config(config) else {},
        )
    return None


def repaired(cell: Cell, records: Iterable[Record]) -> bool:
    """Whether a failed cell has a record by now, made with other settings of no consequence (a smaller batch, say)."""
    meant = _consequent(cell.config)
    return bool(cell.config) and any(
        meant == {name: value for name, value in _consequent(record["config"]).items() if name in meant}
        for record in records
    )


def _consequent(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that tell what a cell is, in a record's config or in what a failed cell was meant to be."""
    found = {
        name: config[name] for name in ("method", "pattern", "scope", "seed", "calibration", "eval") if name in config
    }
    for name in ("calibration", "eval"):
        if isinstance(found.get(name), dict):
            found[name] = {key: value for key, value in found[name].items() if key != "batch_size"}
    if "model" in config:
        found["model"] = {name: config["model"].get(name) for name in ("name", "path", "training_seed", "roles")}
    return found


def model_of(record: Record) -> str:
    """Which weights a record is about; of a model that was trained several times, the recipe: its trainings are repetitions."""
    identity = record["identity"]
    return str(identity["trained"]["recipe"] if identity.get("trained") else identity["model"])


def documents(results: Path, key: str) -> dict[str, dict[str, list[float]]]:
    """Outcomes by task, metric and document; empty where the run scored no tasks."""
    try:
        found = _object(results / "runs" / key / "documents.json")
    except (OSError, ValueError, RecursionError):
        return {}
    return (
        found
        if all(
            isinstance(task, dict) and all(isinstance(one, list) for one in task.values()) for task in found.values()
        )
        else {}
    )


def block_of(layer: str) -> str:
    """The index of a layer's decoder block, read from its full name; ``other`` where it has none."""
    return next((part for part in layer.split(".") if part.isdigit()), "other")


def varying_settings(records: list[Record]) -> dict[str, list[str]]:
    """By method: the hyper-parameters that are not the same in all its records."""
    seen: dict[str, dict[str, set[str]]] = {}
    for record in records:
        for key, value in record["config"]["method"].items():
            seen.setdefault(record["config"]["method"]["name"], {}).setdefault(key, set()).add(str(value))
    return {name: [key for key, values in fields.items() if len(values) > 1] for name, fields in seen.items()}


def _notes(results: Path) -> Iterator[Path]:
    """The cell notes of all sweeps, oldest launch first."""
    paths = [path for path in results.glob("hydra/*/*/*/cell.json") if path.parts[-2].isdecimal()]
    yield from sorted(paths, key=lambda path: (path.parts[-4], path.parts[-3], int(path.parts[-2])))


def _object(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    return found
