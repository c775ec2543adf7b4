"""Read records and the cells of a sweep from a results folder; files that cannot be read are reported and skipped."""

import json
import os
import re
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from dass_exp.config.settings import OPTIONAL_GROUPS, settings_without_effect
from dass_exp.errors import DamagedFileError, UserError, os_error_line
from dass_exp.storage.durable import read_json
from dass_exp.storage.record_schema import flatten, is_config
from dass_exp.storage.records import Record, read_record

_NO_EFFECT = settings_without_effect()


@dataclass(frozen=True)
class LoadedRecords:
    """Records by key, and one message for each file that is not a record."""

    records: dict[str, Record]
    problems: list[str]


@dataclass(frozen=True)
class SweepCell:
    """How a cell of a sweep last ended."""

    overrides: tuple[str, ...]  # that distinguish it from other cells
    status: str  # done or failed
    key: str | None  # of its record; None if the run failed before its key was known
    error: str | None
    config: dict[str, Any] = field(default_factory=dict)  # of a failed cell, in the form of a record's; may be empty


def load(results: Path) -> LoadedRecords:
    """Read all records of a results folder; files of cells that cannot be read are reported too."""
    records: dict[str, Record] = {}
    problems: list[str] = []
    for path in _entries(results / "runs", "result.json"):
        try:
            records[path.parent.name] = read_record(path)
        except (OSError, UserError) as error:
            problems.append(_problem(error))
    for path in _cell_files(results):
        try:
            _json_object(path)
        except (OSError, UserError) as error:
            problems.append(_problem(error))
    return LoadedRecords(records, problems)


def cells_of(results: Path, sweep: str) -> list[SweepCell]:
    """Return the cells of all launches of a sweep, each with its latest outcome, in the order of the largest launch.

    The order therefore depends neither on interruptions nor on the number of workers.
    """
    cells: dict[tuple[str, ...], SweepCell] = {}
    launches: dict[Path, list[tuple[str, ...]]] = {}
    for path in _cell_files(results):
        try:
            note = _json_object(path)
        except (OSError, UserError):
            continue  # load() reports it; the next launch of the cell writes another note
        overrides = note.get("overrides")
        if not isinstance(overrides, list) or f"sweeps={sweep}" not in overrides:
            continue
        if (cell := _cell(note)) is not None:
            cells[cell.overrides] = cell
            launches.setdefault(path.parent.parent, []).append(cell.overrides)
    # the cells of the largest launch first, each once
    largest_first = sorted(launches.values(), key=len, reverse=True)
    return [cells[overrides] for overrides in dict.fromkeys(name for launch in largest_first for name in launch)]


def layouts_run(results: Path, known: Container[str]) -> dict[str, dict[str, Any]]:
    """Return the layout of the table of every sweep that was run into a results folder, as its last launch had it.

    Those that are ``known`` are left out: the config of a cell takes long to read.
    """
    last: dict[str, Path] = {}
    for path in _cell_files(results):
        with suppress(OSError, UserError):
            overrides = _json_object(path).get("overrides")
            for text in overrides if isinstance(overrides, list) else []:
                name, _, sweep = str(text).lstrip("+").partition("=")
                if name == "sweeps" and sweep not in known:
                    last[sweep] = path.parent / ".hydra" / "config.yaml"
    layouts: dict[str, dict[str, Any]] = {}
    for sweep, path in last.items():
        with suppress(OSError, yaml.YAMLError):
            composed = yaml.safe_load(path.read_text(encoding="utf-8"))
            if isinstance(composed, dict) and isinstance(composed.get("sweep"), dict):
                layouts[sweep] = composed["sweep"]
    return layouts


def _cell(note: dict[str, Any]) -> SweepCell | None:
    """Parse the content of a cell.json; None if the cell neither finished nor failed."""
    overrides = tuple(text for text in map(str, note["overrides"]) if _tells_cells_apart(text))
    if note.get("status") == "done" and isinstance(record := note.get("record"), str):
        return SweepCell(overrides, "done", Path(record).parent.name, None)
    if note.get("status") == "failed":
        key, config = note.get("key"), note.get("config")
        config = config if isinstance(config, dict) and is_config(config) else {}
        return SweepCell(overrides, "failed", key if isinstance(key, str) else None, str(note.get("error")), config)
    return None


def _tells_cells_apart(override: str) -> bool:
    name = override.lstrip("+~").partition("=")[0]
    # protocol=paper changes no number itself, but its file selects other calibration and evaluation files
    return name == "protocol" or not (name == "sweeps" or _without_effect(name))


def _without_effect(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in _NO_EFFECT for end in range(1, len(parts) + 1))


def recovered(cell: SweepCell, records: Iterable[Record]) -> bool:
    """Check whether a failed cell has a record: of its key or, if no key is known, of the same effective settings.

    A setting of its model that was not resolved yet when it failed (null or ``auto``) matches any value.
    """
    if cell.key is not None:
        return any(record["key"] == cell.key for record in records)
    intended = _effective_settings(cell.config)
    return bool(intended) and any(_matches(intended, record["config"]) for record in records)


def _matches(intended: Mapping[str, str], config: Mapping[str, Any]) -> bool:
    actual = _effective_settings(config)
    unresolved = {name for name in intended if name.startswith("model.") and intended[name] in ("None", "auto")}
    sections = {name.partition(".")[0] for name in intended}
    names = {name for name in (*intended, *actual) if name.partition(".")[0] in sections} - unresolved
    return all(intended.get(name) == actual.get(name) for name in names)


def _effective_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that can change a number, by dotted name; classes without their modules, which may change."""
    return {
        name: value.rsplit(".", 1)[-1] if name.endswith("._target_") else value
        for name, value in flatten(config).items()
        if not _without_effect(name)
    }


def is_dense(record: Mapping[str, Any]) -> bool:
    """Check whether a record is of the unpruned model."""
    return bool(record["config"]["method"]["name"] == "dense")


def model_name(record: Mapping[str, Any]) -> str:
    """Return the name of a record's model, as in conf/model."""
    return str(record["config"]["model"]["name"])


def model_identity(record: Record) -> str:
    """Return the identity of a record's model; that of its recipe if it was trained several times, as repetitions."""
    identity = record["identity"]
    return str(identity["trained"]["recipe"] if identity.get("trained") else identity["model"])


def told_apart(records: list[Record], failed: list[SweepCell]) -> tuple[list[Record], list[SweepCell]]:
    """Return records and failed cells with models of one name told apart by the beginning of their identities."""
    identities: dict[str, set[str]] = {}
    for record in records:
        identities.setdefault(model_name(record), set()).add(model_identity(record))
    names: dict[str, str] = {}  # by what a config says of its model, which a failed cell has too
    renamed = []
    for record in records:
        if len(identities[model_name(record)]) == 1:
            renamed.append(record)
            continue
        name = f"{model_name(record)}@{re.split('[:@]', model_identity(record))[-1][:6]}"
        names[json.dumps(record["config"]["model"], sort_keys=True)] = name
        renamed.append({**record, "config": _with_model_name(record["config"], name)})
    cells = [
        replace(cell, config=_with_model_name(cell.config, known))
        if cell.config and (known := names.get(json.dumps(cell.config["model"], sort_keys=True)))
        else cell
        for cell in failed
    ]
    return renamed, cells


def _with_model_name(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {**config, "model": {**config["model"], "name": name}}


def by_model_note(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Group records by the remark on their model, such as that it was dequantised."""
    notes: dict[str, list[Record]] = {}
    for record in records:
        notes.setdefault(record["protocol"]["model_note"], []).append(record)
    return notes


def windows_of(protocol: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return what a protocol says about one of its sets of windows; of an unknown name, about that of the tables."""
    described: Mapping[str, Any] = protocol.get("extra_perplexity", {}).get(name, protocol)
    return described


def setting(config: Mapping[str, Any], path: str) -> Any:
    """Return the value of a setting by its dotted name; None if there is no such setting."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def evaluation_of(record: Record) -> str:
    """Return what a record and the dense record it is compared with have in common: model and evaluation."""
    identity = record["identity"]
    return json.dumps([identity.get(name) for name in ("model", "dtype", "device", "bos", "eval")], sort_keys=True)


def asked_tasks(record: Record) -> dict[str, dict[str, Any]]:
    """Return the scores of the tasks that were asked for, by name: of a group that is the group, not its tasks."""
    tasks = record["metrics"].get("tasks", {})
    return {name: scores for name, scores in tasks.items() if "group" not in scores}


def accuracy_name(scores: Mapping[str, Any], metric: str = "acc") -> str:
    """Return the metric by which a task is shown: this one if it has it, else acc, else exact_match."""
    return next(name for name in (metric, "acc", "exact_match") if name in scores)


def documents(results: Path, key: str) -> dict[str, dict[str, list[Any]]]:
    """Return the outcomes by task, metric and document; empty if the run scored no tasks.

    Raises:
        DamagedFileError: the file does not hold what was written into it.
    """
    try:
        outcomes = _json_object(results / "runs" / key / "documents.json")
    except FileNotFoundError:
        return {}
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}; run the same command again with rerun=true") from error
    tasks = outcomes.values()
    valid = all(isinstance(task, dict) and all(isinstance(each, list) for each in task.values()) for task in tasks)
    return outcomes if valid else {}


def block_of(layer: str) -> str:
    """Return the index of a layer's decoder block from its full name; ``other`` if it is in none."""
    return next((part for part in layer.split(".") if part.isdigit()), "other")


def varying_settings(records: Iterable[Record]) -> dict[str, list[str]]:
    """Return by method and by stage the hyper-parameters that are not the same in all its records."""
    values: dict[str, dict[str, set[str]]] = {}
    for record in records:
        for part in (record["config"].get(group) for group in ("method", *OPTIONAL_GROUPS)):
            for name, value in part.items() if part else ():
                values.setdefault(part["name"], {}).setdefault(name, set()).add(str(value))
    return {method: [name for name, seen in fields.items() if len(seen) > 1] for method, fields in values.items()}


def _cell_files(results: Path) -> list[Path]:
    """Return the cell.json of all cells, oldest launch first."""
    paths = [path for path in _entries(results / "hydra", "*", "*", "cell.json") if path.parts[-2].isdecimal()]
    return sorted(paths, key=lambda path: (path.parts[-4], path.parts[-3], int(path.parts[-2])))


def _entries(folder: Path, *pattern: str) -> list[Path]:
    """Return the files of this name in the folders below ``folder``, sorted; a dangling link is such an entry too."""
    *folders, name = pattern
    paths = sorted(parent / name for parent in folder.glob("/".join(["*", *folders])))
    return [path for path in paths if os.path.lexists(path) or (path.parent.is_symlink() and not path.parent.exists())]


def _problem(error: OSError | UserError) -> str:
    return f"not read: {os_error_line(error) if isinstance(error, OSError) else error}"


def _json_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path}: it holds no JSON object")
    return content
