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
from dass_exp.errors import ForeignCodeError, NumericalError, UserError, naming

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
        pattern = (config["pattern"] or {}).get("name", "dense")
        run = _start_run(
            results,
            project=self.project,
            name=f"{config['model']['name']}-{config['method']['name']}-{pattern}-{record['key'][:6]}",
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


def flat_metrics(record: dict[str, Any]) -> dict[str, float]:
    """Return a record's numbers by flat name: ``perplexity/wikipedia_mini``, ``kl/wikipedia_mini``, ``piqa/acc``."""
    metrics, sparsity = record["metrics"], record["sparsity"]
    flat = {f"perplexity/{name}": value for name, value in metrics.get("perplexity", {}).items()}
    for name, divergence in metrics.get("divergence", {}).items():
        flat |= {f"{score}/{name}": value for score, value in divergence.items()}
    for task, scores in metrics.get("tasks", {}).items():
        shares = ("acc", "acc_norm", "exact_match")
        names = [*shares, *(f"{name}_stderr" for name in shares), "bits_per_byte", "ece"]
        flat |= {f"{task}/{name}": scores[name] for name in names if name in scores}
    flat |= {name: metrics[name] for name in ("mean_acc", "mean_acc_norm") if name in metrics}
    flat |= {f"sparsity/{name}": sparsity[name] for name in ("scope", "decoder", "model")}
    return flat | {f"cost/{name}": value for name, value in record["cost"].items() if value is not None}
