"""What every tracker is: told of a run's beginning, its progress and its end."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dass_exp.config.settings import OPTIONAL_GROUPS
from dass_exp.errors import UserError
from dass_exp.paths import MASKS


class Tracker(ABC):
    """Shows runs while they work and takes their records. A subclass needs :meth:`send` only.

    For each run that is executed, :meth:`begin` is called, :meth:`progress` after every block, and then either
    :meth:`send`, after the record was written, or :meth:`fail`. ``dass-report sync`` calls :meth:`send` alone.
    Whatever they raise is one warning, after which the tracker is told nothing more of the run. What they are told
    holds no secret.
    """

    @property
    def place(self) -> str:
        """Where records go, in words: a record is sent to each place once, unless it is made again."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    @property
    def takes_one_run(self) -> bool:
        """Whether the service has chosen one run that waits for the numbers, as the agent of a W&B sweep has.

        A run that is found and not executed is sent then too, and its dense counterpart is not sent.
        """
        return False

    def begin(self, run: Mapping[str, Any], results: str) -> None:
        """The work on a run begins.

        Args:
            run: what a record says of it before there are numbers: ``key``, ``name``, ``tags``, ``notes``, ``config``.
            results: the results folder, for the tracker's own files.
        """
        del run, results

    def progress(self, numbers: Mapping[str, float]) -> None:
        """A block of the run that has begun is done; ``numbers`` by name."""
        del numbers

    @abstractmethod
    def send(self, record: dict[str, Any], results: str) -> None:
        """Send a record that is already written, of the run that has begun or of an earlier one.

        Args:
            record: as results/README.md describes it.
            results: the results folder, which holds it and its files.
        """

    def fail(self, error: str) -> None:
        """The run that has begun failed; ``error`` is one line."""
        del error


def check_settings(**settings: object) -> None:
    """Check that each setting but ``artifacts`` is a name, and that this is true or false.

    Raises:
        UserError: names the setting.
    """
    for name, value in settings.items():
        if name == "artifacts" and not isinstance(value, bool):
            raise UserError(f"tracker.{name}={value!r}: expected true or false")
        if name != "artifacts" and (not isinstance(value, str) or not value):
            raise UserError(f"tracker.{name}={value!r}: expected a name")


def run_name(record: Mapping[str, Any]) -> str:
    """Return what the user calls a run, or a name that tells runs of a sweep apart.

    That is: model, method with its settings, stages, pattern, scope, seed, and the beginning of the key.
    """
    if record.get("name"):
        return str(record["name"])
    config = record["config"]
    settings = [f"{name}={value}" for name, value in config["method"].items() if name != "name"]
    parts = [config["model"]["name"], config["method"]["name"], *settings]
    parts += [config[group]["name"] for group in OPTIONAL_GROUPS if config.get(group)]
    if config["pattern"]:
        parts += [config["pattern"]["name"], str(config["scope"])]
    parts += [] if config["seed"] is None else [f"seed={config['seed']}"]
    return "-".join([*parts, record["key"][:6]])


def tags_of(record: Mapping[str, Any]) -> list[str]:
    """Return the tags of a run: the user's own, its method and its pattern."""
    config = record["config"]
    pattern = (config["pattern"] or {}).get("name", "")
    return list(dict.fromkeys(filter(None, (*record.get("tags", ()), config["method"]["name"], pattern))))


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run by dotted name, without those that it does not use."""
    import pandas as pd

    (flat,) = pd.json_normalize(dict(config)).to_dict("records")
    return {str(name): value for name, value in flat.items() if value is not None}


def files_of(record: Mapping[str, Any], results: str) -> list[Path]:
    """Return the files of a record: itself, the outcomes by document and the masks, where there are some."""
    folder = Path(results) / "runs" / record["key"]
    return [path for name in ("result.json", "documents.json", MASKS) if (path := folder / name).is_file()]


def sweep_of_run() -> str | None:
    """Return the name that the runs of this sweep have in common; None of a single run."""
    return os.environ.get("WANDB_RUN_GROUP")
