"""Compose the settings of a run from overrides, as the command does, in a process that is not the command."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import open_dict

from dass_exp.config.components import OURS
from dass_exp.config.settings import RunConfig, register, validate
from dass_exp.paths import project_root


@contextmanager
def composing() -> Iterator[None]:
    """Let :func:`settings_of` compose the configs of the project; what Hydra has initialised before is put back."""
    os.environ.setdefault("DASS_EXP_ROOT", str(project_root()))
    register()
    earlier = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(project_root() / "conf"), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().clear()
        if earlier is not None:
            GlobalHydra.instance().initialize(earlier)


def settings_of(overrides: Sequence[str], packages: frozenset[str] = OURS) -> RunConfig:
    """Return the validated settings of a run with these overrides, as the command composes them.

    Raises:
        UserError: a setting is wrong, or its class belongs to none of the ``packages``.
        HydraException: an override names nothing that there is.
    """
    composed = compose("config", list(overrides), return_hydra_config=True)
    with open_dict(composed):
        choices = composed.pop("hydra").runtime.choices
    return validate(composed, packages, choices)
