"""Weights & Biases; only this file imports ``wandb``."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dass_exp.storage.record_numbers import flat_metrics
from dass_exp.trackers.base import Tracker, check_settings, files_of, run_name, tags_of
from dass_exp.trackers.tracking import warn_of_failure

_LATER = ("protocol", "environment")  # what a record adds to, or says in the place of, the settings at the beginning


@dataclass
class WandbTracker(Tracker):
    """One Weights & Biases run per record: config, metrics, a table of results and a table of layers.

    It is open while the run works, so it shows the blocks that are done and the use of the machine.
    The runs of a sweep are one group, unless ``WANDB_RUN_GROUP`` names another.
    Offline unless ``WANDB_MODE=online``; ``wandb sync results/wandb/offline-run-*`` uploads later.

    Args:
        project: name of the W&B project.
        artifacts: whether the record, its outcomes by document and its masks are uploaded as an artifact.
    """

    project: str = "dass_exp"
    artifacts: bool = False
    _run: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_settings(project=self.project, artifacts=self.artifacts)

    @property
    def place(self) -> str:
        return f"wandb:{self.project}"

    @property
    def takes_one_run(self) -> bool:
        return bool(os.environ.get("WANDB_SWEEP_ID") or os.environ.get("WANDB_RUN_ID"))

    def begin(self, run: Mapping[str, Any], results: str) -> None:
        self._run = _start_run(
            results,
            project=self.project,
            name=run_name(run),
            job_type="prune" if run["config"]["pattern"] else "dense",
            tags=tags_of(run),
            notes=run.get("notes"),
            config={**run["config"], "key": run["key"]},
        )

    def progress(self, numbers: Mapping[str, float]) -> None:
        self._run.log({f"progress/{name}": value for name, value in numbers.items()})

    def send(self, record: dict[str, Any], results: str) -> None:
        if self._run is None:
            self.begin(record, results)
        run, self._run = self._run, None
        try:
            self._log(run, record, results)
        finally:
            run.finish()

    def _log(self, run: Any, record: dict[str, Any], results: str) -> None:
        import wandb

        run.config.update({name: record[name] for name in _LATER}, allow_val_change=True)
        metrics = flat_metrics(record)
        run.log(metrics)
        rows = [[name, value] for name, value in metrics.items()]
        run.log({"results": wandb.Table(columns=["metric", "value"], data=rows)})
        if layers := record["sparsity"]["layers"]:
            data = [[*layer.values(), layer["zeros"] / layer["size"]] for layer in layers]
            run.log({"layers": wandb.Table(columns=[*layers[0], "sparsity"], data=data)})
        if self.artifacts:
            artifact = wandb.Artifact(f"record-{record['key']}", type="record")
            for path in files_of(record, results):
                artifact.add_file(str(path))
            run.log_artifact(artifact)

    def fail(self, error: str) -> None:
        run, self._run = self._run, None
        run.summary["error"] = error
        run.finish(exit_code=1)


def track_table(title: str, tables: Mapping[str, list[list[Any]]], pictures: list[Path], results: str) -> None:
    """Log a sweep to W&B as one summary run named ``title``; any failure is one warning.

    Args:
        title: of the sweep.
        tables: by name, each with its header as first row.
        pictures: files of figures, of which the PNGs are logged.
        results: the results folder, for W&B's own files.
    """
    warn_of_failure("files are", _log_tables, title, tables, pictures, results)


def _log_tables(title: str, tables: Mapping[str, list[list[Any]]], pictures: list[Path], results: str) -> None:
    import wandb

    run = _start_run(results, project=os.environ.get("WANDB_PROJECT", "dass_exp"), name=title, job_type="report")
    logged: dict[str, Any] = {name: wandb.Table(columns=rows[0], data=rows[1:]) for name, rows in tables.items()}
    run.log(logged | {path.stem: wandb.Image(str(path)) for path in pictures if path.suffix == ".png"})
    run.finish()


def _start_run(results: str, **settings: Any) -> Any:
    import wandb

    folder = Path(results).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))  # else it copies tables below the home folder first
    default = "online" if os.environ.get("WANDB_SWEEP_ID") else "offline"  # an agent has asked its server already
    return wandb.init(
        mode=os.environ.get("WANDB_MODE", default),  # type: ignore[arg-type]
        dir=str(folder),
        settings=wandb.Settings(silent=True, console="off"),
        reinit="finish_previous",
        **settings,
    )
