"""Build the objects that a config names by ``_target_``, from admitted packages only: a target is code that runs."""

import dataclasses
import importlib
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dass_exp.errors import UserError, naming
from dass_exp.paths import project_root

Part = TypeVar("Part")

OURS = frozenset({"dass_exp"})

_MOVED = {
    "dass_exp.data.OfflineText": "dass_exp.data.texts.OfflineText",
    "dass_exp.data.HubText": "dass_exp.data.texts.HubText",
    **dict.fromkeys(
        ("dass_exp.track.WandbTracker", "dass_exp.runs.track.WandbTracker"), "dass_exp.trackers.wandb.WandbTracker"
    ),
    **dict.fromkeys(
        ("dass_exp.track.NullTracker", "dass_exp.runs.track.NullTracker"), "dass_exp.trackers.none.NullTracker"
    ),
}

# former names that plugins import
_RENAMED = {"Cut": "MaskResult", "Stat": "Statistic", "dass_exp.stats": "dass_exp.statistics"}
_RENAMED |= dict.fromkeys(("dass_exp.matrices", "dass_exp.decoder"), "dass_exp.models.decoder")
_RENAMED |= {"dass_exp.families": "dass_exp.models.families", "dass_exp.runs.track": "dass_exp.trackers.base"}


def admitted_packages(command_line: Iterable[str]) -> frozenset[str]:
    """Packages whose classes may be built: ours, and those named in the environment or on the command line.

    Call it before Hydra composes: a config file can set variables and overrides too, and must not admit anything.

    Args:
        command_line: the overrides as typed.
    """
    named = os.environ.get("DASS_EXP_PLUGINS", "").replace(",", " ").split()
    for override in command_line:
        key, _, value = override.partition("=")
        if key.lstrip("+") == "plugins":
            named += "".join(" " if mark in "[],'\"" else mark for mark in value).split()
    return OURS | frozenset(named)


def check_targets(composed: DictConfig, packages: frozenset[str]) -> None:
    """Check that every ``_target_``, at any depth, is a class of an admitted package.

    Raises:
        UserError: names the setting and what is admitted. Nothing of a refused package was imported.
    """
    for setting, target in _targets(OmegaConf.to_container(composed, resolve=True), ""):
        if str(target).split(".")[0] not in packages:
            raise UserError(
                f"{setting}={target}: a _target_ is code that runs, and its package is not admitted; admitted: "
                f"{', '.join(sorted(packages))}. Name another in DASS_EXP_PLUGINS or with plugins=[...] on the command "
                "line"
            )
        # a module of ours that merely imports a class does not admit it
        if target_class(setting, target).__module__.split(".")[0] not in packages:
            raise UserError(f"{setting}={target}: this class belongs to another package; name that package as a plugin")


def build(node: Any, kind: type[Part], setting: str) -> Part:
    """Build the object that a checked config node describes.

    Raises:
        UserError: its class is not of this kind, or refuses a value.
    """
    if isinstance(node, kind):
        return node  # the Python interface may pass the object itself
    if not isinstance(node, dict) or "_target_" not in node:
        raise UserError(f"{setting}={node!r}: expected one of the choices of its config group")
    if not issubclass(target_class(f"{setting}._target_", node["_target_"]), kind):
        raise UserError(f"{setting}._target_={node['_target_']}: expected a {kind.__name__}")
    try:
        with naming(f"{setting}._target_={node['_target_']}", passing=(InstantiationException,)):
            built = instantiate({**node, "_target_": _current(node["_target_"])}, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        raise UserError(str(cause) if isinstance(cause, UserError) else f"{setting}: {cause or error}") from error
    _check_texts(built, setting)
    if not isinstance(built, kind):
        raise UserError(
            f"{setting}: Hydra built a {type(built).__name__}; expected a {kind.__name__} (leave _partial_ out)"
        )
    return built


def _check_texts(built: Any, setting: str) -> None:
    """Refuse a number or null where the class of a component has a text: YAML reads 2024 and null as such."""
    for entry in dataclasses.fields(built) if dataclasses.is_dataclass(built) else ():
        value = getattr(built, entry.name, "")
        if entry.type in (str, "str") and not isinstance(value, str):
            raise UserError(f"{setting}.{entry.name}={value!r}: expected a text; put a number in quotes")


def choice(group: str, name: str) -> dict[str, Any]:
    """Load one file of a config group.

    Raises:
        UserError: there is no such choice.
    """
    folder = project_root() / "conf" / group
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise UserError(f"{group}={name!r}: expected one of {', '.join(known)}")
    loaded: dict[str, Any] = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    return loaded


def target_class(setting: str, target: Any) -> type:
    """Import the class that a ``_target_`` names.

    Raises:
        UserError: there is no such class.
    """
    module, _, name = _current(target).rpartition(".")
    expected = (ImportError, AttributeError, TypeError, ValueError)
    try:
        with naming(f"{setting}={target}: {module} cannot be imported", passing=expected):
            found = getattr(importlib.import_module(module), name)
    except expected as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{setting}={target}: {_problem(module, error)}") from error
    if not isinstance(found, type):
        raise UserError(f"{setting}={target}: expected a class")
    return found


def _problem(module: str, error: Exception) -> str:
    """Why a class was not found: there is none, or its module, of a plugin, does not fit this version of ours."""
    foreign = isinstance(error, ImportError) and not f"{module}.".startswith(f"{error.name}.")
    if not foreign and not isinstance(error, TypeError):
        return f"no such class ({error})"
    name = next(iter(str(error).split("'")[1:]), "")
    renamed = f"; {name} is now called {_RENAMED[name]}" if name in _RENAMED else ""
    return f"{module} cannot be imported ({error}){renamed}"


def _current(target: Any) -> str:
    """Translate the former name of a target, which configs of users may still hold."""
    return _MOVED.get(str(target), str(target))


def _targets(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        where = f"{path}.{key}" if path else str(key)
        if key == "_target_":
            yield where, value
        yield from _targets(value, where)
