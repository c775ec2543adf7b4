"""Repeat a run from the config that Hydra kept of it: ``--config-path RUN/.hydra``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dass_exp.config.settings import RunConfig
from dass_exp.errors import UserError, one_line
from dass_exp.paths import project_root


@dataclass(frozen=True)
class SavedRun:
    """The composed settings of an earlier run.

    Args:
        settings: content of its config.yaml.
        choices: the file that was chosen in each config group.
    """

    settings: Any
    choices: dict[str, Any]

    def replace_settings(self, composed: DictConfig) -> DictConfig:
        """Return these settings with Hydra's own of ``composed``; overrides are applied to them afterwards."""
        replaced = OmegaConf.merge(OmegaConf.structured(RunConfig), self.settings)
        with open_dict(replaced):
            replaced.hydra = composed.hydra
        if not isinstance(replaced, DictConfig):
            raise TypeError("settings are a mapping")
        return replaced

    def restore_choices(self, composed: DictConfig) -> None:
        """Note the choices of the run that is repeated: they name parts of it."""
        with open_dict(composed.hydra.runtime):
            composed.hydra.runtime.choices.update(self.choices)


def saved_run(folder: Path, overrides: list[str]) -> SavedRun | None:
    """Read the ``.hydra`` folder of a run; None if it is another folder of configs.

    Raises:
        UserError: a file cannot be read, or an override chooses another file of a group.
    """
    paths = folder / "config.yaml", folder / "hydra.yaml"
    if not all(path.is_file() for path in paths):
        return None
    try:
        settings, kept = (OmegaConf.load(path) for path in paths)
        choices = OmegaConf.to_container(OmegaConf.select(kept, "hydra.runtime.choices"), resolve=False)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"--config-path {folder}: it is no config of a run ({one_line(error)})") from error
    if not isinstance(settings, DictConfig) or not isinstance(choices, dict):
        raise UserError(f"--config-path {folder}: it is no config of a run")
    for override in overrides:
        group = override.lstrip("+~").partition("=")[0].partition("@")[0]
        if (project_root() / "conf" / group).is_dir() or group == "sweeps":
            raise UserError(f"{override}: a run that is repeated keeps its choices; change single settings of it")
    own = {str(group): name for group, name in choices.items() if not str(group).startswith("hydra/")}
    return SavedRun(settings, own)
