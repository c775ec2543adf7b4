"""Find settings that differ between the records of a table, from their identities (dass_exp/runs/resolved_run.py).

A setting that can change a number must be equal in all rows, unless an axis of the table shows it.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from dass_exp.config.settings import OPTIONAL_GROUPS
from dass_exp.report.load import Record, model_identity, model_name, setting

_REPETITIONS = ("seed", "repeat")
# A model determines these: they may differ between the models of a table, but not within one.
_PER_MODEL = ("model", "roles", "dtype", "bos", "experts")
_WINDOWS = "windows_sha256"
# settings of tasks that are in an identity only if they are set
_ZERO_SHOT_ONLY_IF_SET = frozenset({"num_fewshot", "own_tasks"})
# Parts of an identity that count as one value, with the setting that names it.
_NAMES = {
    "pattern": "pattern.name",
    "calibration.text": "calibration.name",
    "eval.perplexity.text": "eval.perplexity.name",
    "eval.zeroshot.tasks": "eval.zeroshot.tasks",
}


class Protocols:
    """The settings of each record, by key, that can change a number.

    Texts and patterns are given by name, with a digest where the same name has different contents.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = {record["key"]: record for record in records}
        named = {key: {name: value for name, *value in _settings(one)} for key, one in self.records.items()}
        contents: dict[tuple[str, str], set[str]] = {}  # by setting and short value
        for settings in named.values():
            for name, (value, content) in settings.items():
                contents.setdefault((name, value), set()).add(content)
        # by key and name: the short value, with a digest where it is ambiguous
        self._settings = {
            key: {
                name: value
                if len(contents[name, value]) == 1
                else f"{value} ({hashlib.sha256(content.encode()).hexdigest()[:8]})"
                for name, (value, content) in settings.items()
            }
            for key, settings in named.items()
        }

    def differing(self, axes: Collection[str]) -> dict[str, set[str]]:
        """Return settings with several values in a table, other than hyper-parameters and those that its axes show."""
        values: dict[tuple[str, str], set[str]] = {}
        for key, settings in self._settings.items():
            for name, value in settings.items():
                values.setdefault((name, self._group(key, name)), set()).add(value)
        differing: dict[str, set[str]] = {}
        for (name, _), seen in values.items():
            if len(seen) > 1 and not name.startswith("method.") and not _is_shown(name, axes):
                differing.setdefault(name, set()).update(seen)
        return differing

    def _group(self, key: str, name: str) -> str:
        """Name the group of records within which a setting must be equal; empty for all records."""
        settings, model = self._settings[key], model_name(self.records[key])
        if name.startswith("code."):  # of a plugin: each has its own, and one that was edited is another
            own = self.records[key]["config"].get(name.partition(".")[2]) or {}
            return str(own.get("name"))
        if name == _WINDOWS:  # one model and one evaluation must give the same windows
            evaluation = [value for own, value in settings.items() if own == "bos" or own.startswith("eval.perplexity")]
            return f"{model} {evaluation}"
        return model if name.partition(".")[0] in _PER_MODEL else ""

    def conflicts(self, cells: Iterable[Collection[str]]) -> dict[str, set[str]]:
        """Return settings that differ between the records (by key) of one cell, which should be repetitions."""
        conflicts: dict[str, set[str]] = {}
        for keys in cells:
            protocols = [self._settings[key] for key in keys]
            for name in dict.fromkeys(name for settings in protocols for name in settings if name != _WINDOWS):
                values = {settings.get(name, "none") for settings in protocols}
                if len(values) > 1:
                    conflicts.setdefault(name, set()).update(values)
        return conflicts

    def label(self, record: Record, names: Sequence[str]) -> str:
        """Return a record's values of these settings, as the rows of a mixed table show them: ``context=512``."""
        settings = self._settings[record["key"]]
        # the code of a plugin is named by its kind: method=abc would look like the name of one
        last = ["code" if name.startswith("code.") else name.removesuffix(".name").rsplit(".", 1)[-1] for name in names]
        labels = {name: short if last.count(short) == 1 else name for name, short in zip(names, last, strict=True)}
        return ", ".join(f"{label}={settings[name]}" for name, label in labels.items() if name in settings)


def _settings(record: Record) -> Iterator[tuple[str, str, str]]:
    """Yield name, short value and full content of every setting other than those of repetitions."""
    identity = {**record["identity"], "model": model_identity(record)}
    for repetition in (*_REPETITIONS, "trained"):
        identity.pop(repetition, None)
    yield from _leaves(identity, record["config"], "")
    if zeroshot := identity.get("eval", {}).get("zeroshot"):
        for name in _ZERO_SHOT_ONLY_IF_SET.difference(zeroshot):
            yield f"eval.zeroshot.{name}", "none", "none"
    if "method" not in identity.get("code", {}):
        yield "code.method", "none", "none"
    if windows := record["protocol"].get(_WINDOWS):
        yield _WINDOWS, str(windows)[:8], str(windows)


def _leaves(node: Any, config: Mapping[str, Any], path: str) -> Iterator[tuple[str, str, str]]:
    if path in _NAMES:
        name = path if path == "pattern" else _NAMES[path]
        yield name, str(setting(config, _NAMES[path])), json.dumps(node, sort_keys=True)
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, config, f"{path}.{key}".lstrip("."))
    else:
        yield path, str(node), str(node)


def _is_shown(name: str, axes: Collection[str]) -> bool:
    """Check whether an axis is this setting, a part of it (``pattern.sparsity``), or the group it is in."""
    own = [axis.removeprefix("model.") for axis in axes]  # model.dtype is called dtype in an identity
    own += OPTIONAL_GROUPS if "method" in axes else ()  # the label of a method names its stages
    return any(axis == name or axis.startswith(f"{name}.") or name.startswith(f"{axis}.") for axis in own)
