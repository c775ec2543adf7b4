"""Experiment trackers. The only import of ``wandb``. The record is written first; a tracker that fails costs one warning."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dass_exp.errors import UserError

log = logging.getLogger(__name__)


class Tracker(ABC):
    """Sends a finished record somewhere."""

    def track(self, record: dict[str, Any], results: str) -> None:
        """Send a record; whatever goes wrong is one warning.

        Args:
            record: as it was written.
            results: the results folder, for the tracker's own files.
        """
        try:
            self.send(record, results)
        except Exception as error:
            log.warning(
                "the tracker failed, the record is safe: %s: %s",
                type(error).__name__,
                " ".join(str(error).split())[:300],
            )

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

    Offline unless the environment says otherwise (``WANDB_MODE=online``); ``wandb sync results/wandb/offline-run-*`` uploads later.

    Args:
        project: name of the W&B project.
    """

    project: str = "dass_exp"

    def __post_init__(self) -> None:
        if not isinstance(self.project, str) or not self.project:
            raise UserError(f"tracker.project={self.project!r}: expected a name")

    def send(self, record: dict[str, Any], results: str) -> None:
        import wandb

        config, method = record["config"], record["config"]["method"]["name"]
        folder = Path(results).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=self.project,
            name=f"{config['model']['name']}-{method}-{(config['pattern'] or {}).get('name', 'dense')}-{record['key'][:6]}",
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            dir=str(folder),
            config={
                **config,
                "key": record["key"],
                "protocol": record["protocol"],
                "environment": record["environment"],
            },
            settings=wandb.Settings(silent=True, console="off"),
            reinit="finish_previous",
        )
        try:
            run.log(flat_metrics(record))
            rows = [[name, value] for name, value in flat_metrics(record).items()]
            run.log({"results": wandb.Table(columns=["metric", "value"], data=rows)})
            if layers := record["sparsity"]["layers"]:
                data = [[*layer.values(), layer["zeros"] / layer["size"]] for layer in layers]
                run.log({"layers": wandb.Table(columns=[*layers[0], "sparsity"], data=data)})
        finally:
            run.finish()


def track_sheet(title: str, tables: Mapping[str, list[list[Any]]], pictures: list[Path], results: str) -> None:
    """Log the tables of a sweep and its pictures to W&B as one summary run; a failure costs one warning.

    Args:
        title: of the sweep, the name of the run.
        tables: by name, each with its header as first row.
        pictures: files; those that W&B can show (PNG) are logged.
        results: the results folder, for W&B's own files.
    """
    import wandb

    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dass_exp"),
            name=title,
            job_type="report",
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            dir=str(Path(results).resolve()),
            settings=wandb.Settings(silent=True, console="off"),
            reinit="finish_previous",
        )
        logged: dict[str, Any] = {name: wandb.Table(columns=rows[0], data=rows[1:]) for name, rows in tables.items()}
        run.log(logged | {path.stem: wandb.Image(str(path)) for path in pictures if path.suffix == ".png"})
        run.finish()
    except Exception as error:
        log.warning(
            "the tracker failed, the files are safe: %s: %s", type(error).__name__, " ".join(str(error).split())[:300]
        )


def flat_metrics(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record by a flat name: ``perplexity/wikipedia_mini``, ``piqa/acc``, ``sparsity/scope``, ``cost/prune_s``."""
    metrics, found = record["metrics"], {}
    for name, value in metrics.get("perplexity", {}).items():
        found[f"perplexity/{name}"] = value
    for task, scores in metrics.get("tasks", {}).items():
        for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
            if name in scores:
                found[f"{task}/{name}"] = scores[name]
    found |= {name: metrics[name] for name in ("mean_acc", "mean_acc_norm") if name in metrics}
    found |= {f"sparsity/{name}": record["sparsity"][name] for name in ("scope", "decoder", "model")}
    return found | {f"cost/{name}": value for name, value in record["cost"].items() if value is not None}
