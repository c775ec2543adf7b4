"""Experiment trackers; only this file imports ``wandb``. Records are written first, so a failure is only a warning."""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dass_exp.config.redact import redact, redact_text
from dass_exp.config.settings import OPTIONAL_GROUPS
from dass_exp.errors import ForeignCodeError, NumericalError, UserError, naming
from dass_exp.storage.record_numbers import flat_metrics

log = logging.getLogger(__name__)


class Tracker(ABC):
    """Sends finished records somewhere."""

    def track(self, record: dict[str, Any], results: str) -> None:
        """Send a record that is already written; any failure is one warning.

        ``results`` is the results folder, for the tracker's own files.
        """
        with _failure_as_warning("record is"):
            self.send(record, results)

    @abstractmethod
    def send(self, record: dict[str, Any], results: str) -> None:
        """Send a record; may raise."""


@dataclass
class NullTracker(Tracker):
    """Tracks nothing."""

    def send(self, record: dict[str, Any], results: str) -> None:
        del record, results


@dataclass
class WandbTracker(Tracker):
    """One Weights & Biases run per record: config, metrics, a table of results and a table of layers.

    The runs of a sweep are one group, unless ``WANDB_RUN_GROUP`` names another.
    Offline unless ``WANDB_MODE=online``; ``wandb sync results/wandb/offline-run-*`` uploads later.

    Args:
        project: name of the W&B project.
    """

    project: str = "dass_exp"

    def __post_init__(self) -> None:
        if not isinstance(self.project, str) or not self.project:
            raise UserError(f"tracker.project={self.project!r}: expected a name")

    def send(self, record: dict[str, Any], results: str) -> None:
        import wandb

        config, layers = record["config"], record["sparsity"]["layers"]
        pattern = (config["pattern"] or {}).get("name", "")
        run = _start_run(
            results,
            project=self.project,
            name=record.get("name") or _run_name(record),
            job_type="prune" if pattern else "dense",
            tags=list(dict.fromkeys(filter(None, (*record.get("tags", ()), config["method"]["name"], pattern)))),
            notes=record.get("notes"),
            config=redact({**config, **{name: record[name] for name in ("key", "protocol", "environment")}}),
        )
        try:
            metrics = flat_metrics(record)
            run.log(metrics)
            rows = [[name, value] for name, value in metrics.items()]
            run.log({"results": wandb.Table(columns=["metric", "value"], data=rows)})
            if layers:
                data = [[*layer.values(), layer["zeros"] / layer["size"]] for layer in layers]
                run.log({"layers": wandb.Table(columns=[*layers[0], "sparsity"], data=data)})
        finally:
            run.finish()


def _run_name(record: dict[str, Any]) -> str:
    """Return a name that tells runs of a sweep apart: method with its settings, stages, pattern, scope, seed, key."""
    config = record["config"]
    settings = [f"{name}={value}" for name, value in config["method"].items() if name != "name"]
    parts = [config["model"]["name"], config["method"]["name"], *settings]
    parts += [config[group]["name"] for group in OPTIONAL_GROUPS if config.get(group)]
    if config["pattern"]:
        parts += [config["pattern"]["name"], str(config["scope"])]
    parts += [] if config["seed"] is None else [f"seed={config['seed']}"]
    return "-".join([*parts, record["key"][:6]])


def track_table(title: str, tables: Mapping[str, list[list[Any]]], pictures: list[Path], results: str) -> None:
    """Log a sweep to W&B as one summary run named ``title``; any failure is one warning.

    Args:
        title: of the sweep.
        tables: by name, each with its header as first row.
        pictures: files of figures, of which the PNGs are logged.
        results: the results folder, for W&B's own files.
    """
    with _failure_as_warning("files are"):
        import wandb

        project = os.environ.get("WANDB_PROJECT", "dass_exp")
        run = _start_run(results, project=project, name=title, job_type="report")
        logged: dict[str, Any] = {name: wandb.Table(columns=rows[0], data=rows[1:]) for name, rows in tables.items()}
        run.log(logged | {path.stem: wandb.Image(str(path)) for path in pictures if path.suffix == ".png"})
        run.finish()


def _start_run(results: str, **settings: Any) -> Any:
    import wandb

    folder = Path(results).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))  # else it copies tables below the home folder first
    return wandb.init(
        mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
        dir=str(folder),
        settings=wandb.Settings(silent=True, console="off"),
        reinit="finish_previous",
        **settings,
    )


@contextmanager
def _failure_as_warning(safe: str) -> Iterator[None]:
    """Make one warning of whatever a tracker does, exits and panics included: it must not cost a result."""
    try:
        with naming(f"the tracker failed, the {safe} safe", ForeignCodeError):
            yield
    except (UserError, NumericalError, ForeignCodeError) as error:
        log.warning("%s", redact_text(str(error)))
