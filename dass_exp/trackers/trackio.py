"""Trackio; only this file imports ``trackio``."""

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

from dass_exp.errors import UserError
from dass_exp.storage.record_numbers import flat_metrics
from dass_exp.trackers.base import Tracker, check_settings, flat_config, run_name, sweep_of_run


@dataclass
class TrackioTracker(Tracker):
    """One Trackio run per record: settings and metrics. Needs ``pip install 'dass_exp[trackio]'``.

    It is open while the run works. Runs go to Trackio's own folder (``TRACKIO_DIR`` names another), or to the Space
    of ``TRACKIO_SPACE_ID``; ``trackio show --project dass_exp`` shows them.

    Args:
        project: name of the Trackio project.
    """

    project: str = "dass_exp"
    _run: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_settings(project=self.project)

    @property
    def place(self) -> str:
        return f"trackio:{self.project}"

    def begin(self, run: Mapping[str, Any], results: str) -> None:
        del results
        try:
            import trackio
        except ImportError as error:
            raise UserError("tracker=trackio: Trackio is missing; pip install 'dass_exp[trackio]'") from error
        settings = {"key": run["key"], **flat_config(run["config"])}
        with redirect_stdout(io.StringIO()):  # it greets there
            self._run = trackio.init(
                self.project, name=run_name(run), group=sweep_of_run(), config=settings, embed=False
            )

    def progress(self, numbers: Mapping[str, float]) -> None:
        self._run.log({f"progress/{name}": value for name, value in numbers.items()})

    def send(self, record: dict[str, Any], results: str) -> None:
        if self._run is None:
            self.begin(record, results)
        try:
            self._run.log(flat_metrics(record))
        finally:
            self._finish()

    def fail(self, error: str) -> None:
        import trackio

        try:
            self._run.alert("failed", error, level=trackio.AlertLevel.ERROR)
        finally:
            self._finish()

    def _finish(self) -> None:
        import trackio

        self._run = None
        with redirect_stdout(io.StringIO()):
            trackio.finish()  # the run alone would be finished once more, with a greeting, when the process ends
