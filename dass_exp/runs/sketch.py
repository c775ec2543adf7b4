"""What a run was meant to be, where its settings may be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dass_exp.config.components import OURS, build, check_targets, locate
from dass_exp.config.settings import name_of
from dass_exp.errors import UserError
from dass_exp.masks import Pattern
from dass_exp.methods.base import Pruner


def sketch(composed: DictConfig, choices: Mapping[str, Any], packages: frozenset[str] = OURS) -> dict[str, Any]:
    """What a run was meant to be, in the form of a record's ``config``, as far as settings that may be wrong can tell it.

    Args:
        composed: what Hydra composed.
        choices: the file chosen of each config group.
        packages: whose classes may be built.
    """
    found: dict[str, Any] = {}
    for name in ("model", "method", "pattern", "scope", "seed", "calibration", "eval"):
        try:
            node = composed[name]
            found[name] = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        except OmegaConfBaseException:
            found[name] = None
    if isinstance(model := found["model"], dict):
        model["name"] = name_of(str(model.get("name")), str(model.get("path")))
    for name, kind in (("method", Pruner), ("pattern", Pattern)):
        typed = found[name] if isinstance(found[name], dict) else {}
        try:
            check_targets(OmegaConf.create({name: typed}), packages)
            if kind is Pruner:
                uses = locate(name, typed.get("_target_")).uses  # type: ignore[attr-defined]
                found |= {unused: None for unused in ("pattern", "scope", "seed", "calibration") if unused not in uses}
            part: Any = build(typed, kind, name)
            found[name] = {"name": part.name, **part.settings()} if kind is Pruner else part.settings()
        except (UserError, OmegaConfBaseException):
            found[name] = {
                "name": str(choices.get(name)),
                **{key: value for key, value in typed.items() if key != "_target_"},
            }
        if kind is Pruner and "pattern" in found and found["pattern"] is None:
            break
    return found
