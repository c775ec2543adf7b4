"""Describe a failed cell of a sweep, for tables that list it as failed until it has a record."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dass_exp.config.components import OURS, build, check_targets, target_class
from dass_exp.config.settings import OPTIONAL_GROUPS, validate
from dass_exp.engine.stages import KINDS
from dass_exp.errors import UserError
from dass_exp.masks import Pattern
from dass_exp.methods.base import Pruner
from dass_exp.retrain.base import Retraining
from dass_exp.runs.context import RunContext
from dass_exp.runs.record import describe_config
from dass_exp.runs.resolve import identify_run
from dass_exp.runs.resolved_run import Components


def describe_failed(
    composed: DictConfig, choices: Mapping[str, Any], context: RunContext, packages: frozenset[str] = OURS
) -> dict[str, Any]:
    """Return the ``key`` of the cell (None if it cannot be computed) and its ``config`` in the form of a record's.

    Args:
        composed: what Hydra composed.
        choices: the file chosen in each config group.
        context: that of the run, which has found the model already if it could.
        packages: packages whose classes may be built.
    """
    try:
        config = validate(composed, packages, choices)
        components = Components.of(config)
    except UserError:
        return {"key": None, "config": _as_composed(composed, choices, packages)}
    with suppress(Exception):  # the error that made the cell fail may be raised again here
        if context.has_found(config.model):  # do not search for it again
            run = identify_run(config, context)
            return {"key": run.key, "config": describe_config(config, run, run.spec)}
    return {"key": None, "config": describe_config(config, components)}


def _as_composed(composed: DictConfig, choices: Mapping[str, Any], packages: frozenset[str]) -> dict[str, Any]:
    """Return the settings of a cell with a wrong one; method and pattern in canonical form if they can be built."""
    config: dict[str, Any] = {}
    for name in ("model", "method", "pattern", "scope", "seed", "calibration", "eval"):
        try:
            node = composed[name]
            node = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        except OmegaConfBaseException:
            node = None
        if isinstance(node, dict):
            own = {key: value for key, value in node.items() if key != "_target_" and value != "???"}
            config[name] = {"name": str(choices.get(name)), **own}
        else:
            config[name] = node
    with suppress(UserError, OmegaConfBaseException):  # one of the two may be wrong, and the other built
        check_targets(OmegaConf.create({"pattern": composed.pattern}), packages)
        pattern = build(OmegaConf.to_container(composed.pattern, resolve=True), Pattern, "pattern")
        config["pattern"] = pattern.settings()
    with suppress(UserError, OmegaConfBaseException):
        check_targets(OmegaConf.create({"method": composed.method}), packages)
        target = OmegaConf.to_container(composed.method, resolve=True)
        found = target_class("method", target["_target_"])  # type: ignore[index, call-overload]
        if issubclass(found, Pruner):
            names = ("pattern", "scope", "seed", "calibration")
            config |= {unused: None for unused in names if unused not in found.uses}
        method = build(target, Pruner, "method")
        config["method"] = {"name": method.name, **method.settings()}
    for group in OPTIONAL_GROUPS:
        with suppress(UserError, OmegaConfBaseException):
            check_targets(OmegaConf.create({group: composed[group]}), packages)
            node = OmegaConf.to_container(composed[group], resolve=True)
            part: Any = build(node, Retraining if group == "retrain" else KINDS[group], group)
            config |= {group: {"name": part.name, **part.settings()}} if part.active else {}
    return config
