"""MLflow; only this file imports ``mlflow``."""

import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dass_exp.errors import UserError
from dass_exp.storage.record_numbers import flat_metrics
from dass_exp.trackers.base import Tracker, check_settings, files_of, flat_config, run_name, sweep_of_run, tags_of

_BATCH = 100  # parameters of one call; MLflow admits no more
_LENGTH = 6000  # characters of a parameter; MLflow admits no more


@dataclass
class MlflowTracker(Tracker):
    """One MLflow run per record: parameters, metrics, tags. Needs ``pip install 'dass_exp[mlflow]'``.

    It is open while the run works. Where ``MLFLOW_TRACKING_URI`` names no server, runs go to
    ``results/mlflow.db``: ``mlflow ui --backend-store-uri sqlite:///results/mlflow.db`` shows them.

    Args:
        experiment: name of the MLflow experiment.
        artifacts: whether the record, its outcomes by document and its masks are kept as artifacts.
    """

    experiment: str = "dass_exp"
    artifacts: bool = False
    _run: str | None = field(default=None, init=False, repr=False, compare=False)
    _client: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_settings(experiment=self.experiment, artifacts=self.artifacts)

    @property
    def place(self) -> str:
        return f"mlflow:{os.environ.get('MLFLOW_TRACKING_URI', 'mlflow.db')}:{self.experiment}"

    def begin(self, run: Mapping[str, Any], results: str) -> None:
        client = self._connected(results)
        found = client.get_experiment_by_name(self.experiment)
        identity = found.experiment_id if found else client.create_experiment(self.experiment, _artifacts_in(results))
        tags = {f"tag.{name}": "true" for name in tags_of(run)} | {"key": run["key"]}
        if group := sweep_of_run():
            tags["sweep"] = group
        if run.get("notes"):
            tags["mlflow.note.content"] = run["notes"]
        self._run = client.create_run(identity, run_name=run_name(run), tags=tags).info.run_id
        self._log_config(run["config"])

    def progress(self, numbers: Mapping[str, float]) -> None:
        step = int(numbers.get("blocks", 0))
        self._log({f"progress/{name}": value for name, value in numbers.items()}, step)

    def send(self, record: dict[str, Any], results: str) -> None:
        if self._run is None:
            self.begin(record, results)
        run, status = self._run, "FAILED"
        try:
            self._log(flat_metrics(record))
            for path in files_of(record, results) if self.artifacts else ():
                self._client.log_artifact(run, str(path))
            status = "FINISHED"
        finally:
            self._run = None
            self._client.set_terminated(run, status)

    def fail(self, error: str) -> None:
        run, self._run = self._run, None
        self._client.set_tag(run, "error", error)
        self._client.set_terminated(run, "FAILED")

    def _connected(self, results: str) -> Any:
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise UserError("tracker=mlflow: MLflow is missing; pip install 'dass_exp[mlflow]'") from error
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        folder = Path(results).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}")
        return self._client

    def _log_config(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        flat = flat_config(config)
        params = [Param(_plain(name), str(value)[:_LENGTH]) for name, value in flat.items()]
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(self._run, params=params[start : start + _BATCH])

    def _log(self, numbers: Mapping[str, float], step: int = 0) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_plain(name), float(value), now, step) for name, value in numbers.items()]
        self._client.log_batch(self._run, metrics=metrics)


def _plain(name: str) -> str:
    """Return the name of a parameter or number with the characters that MLflow admits."""
    return re.sub(r"[^\w\-. /:]", "_", name)


def _artifacts_in(results: str) -> str | None:
    """Return where artifacts of a local database go; None where a server says so."""
    return None if os.environ.get("MLFLOW_TRACKING_URI") else (Path(results).resolve() / "mlflow").as_uri()
