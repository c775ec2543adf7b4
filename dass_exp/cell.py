"""One run of the command, or one of a sweep: it is validated and run, and how it ended is noted and shown."""

import dataclasses
import functools
import logging
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dass_exp.config.arguments import TRACEBACKS
from dass_exp.config.redact import redact_text
from dass_exp.config.settings import validate
from dass_exp.errors import ForeignCodeError, NumericalError, UserError, is_exit_of_launcher, one_line, os_error_line
from dass_exp.report.console import ending, show_plan, show_run
from dass_exp.report.progress import TerminalReporter
from dass_exp.report.sweep_callback import note_cell
from dass_exp.runs import workers
from dass_exp.runs.context import RunContext, cache_of_process
from dass_exp.runs.failed_cell import describe_failed
from dass_exp.runs.plan import Plan, plan
from dass_exp.runs.run import Outcome, run

log = logging.getLogger("dass_exp")


def run_cell(composed: DictConfig, admitted: frozenset[str]) -> None:
    """Run what Hydra has composed, inside its task.

    Args:
        composed: the settings.
        admitted: packages whose classes may be built.

    Raises:
        SystemExit: it failed, and it is in no sweep.
    """
    job = HydraConfig.get()
    overrides = OmegaConf.to_container(job.overrides.task, resolve=False)  # as typed: a record keeps no resolved value
    cell = Cell(job.runtime.output_dir, [str(text) for text in overrides or ()], alone=job.mode != RunMode.MULTIRUN)
    shared = None if cell.alone else cache_of_process()
    context = RunContext(TerminalReporter(), shared, planning=cell.is_plan)
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
            advice = "start it without torchrun, or call dass_exp.prune from a script of your own (docs/scale.md)"
            raise UserError(f"torchrun with {os.environ['WORLD_SIZE']} processes: dass-exp runs in one; {advice}")
        if not cell.alone:
            workers.acquire_slot(job.launcher, Path(job.sweep.dir))
        elif launchers := [text for text in job.overrides.hydra if text.startswith("hydra/launcher=")]:
            raise UserError(
                f"{launchers[0]}: a launcher runs the cells of a sweep, and this is one run; leave it out, or add -m "
                "or sweeps=NAME"
            )
        config = validate(composed, admitted, job.runtime.choices)
        if config.plan:
            cell.report_planned(plan(config, context))
            return
        with nullcontext() if cell.alone else _named_sweep(cell.overrides, job.sweep.dir):
            outcome = run(config, context)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a plugin may exit, and parts written in Rust panic
        if is_exit_of_launcher(error):
            raise
        described = functools.partial(describe_failed, composed, job.runtime.choices, context, admitted)
        cell.report_failed(error, described)
        return
    cell.report_done(outcome, config.model.name)


@contextmanager
def _named_sweep(overrides: list[str], folder: str) -> Iterator[None]:
    """Let trackers know the sweep of a run, unless the user has named it; a process may run another sweep after it."""
    if "WANDB_RUN_GROUP" in os.environ:
        yield
        return
    sweep = next((text.partition("=")[2] for text in overrides if text.startswith("sweeps=")), "grid")
    os.environ["WANDB_RUN_GROUP"] = f"{sweep}-{Path(folder).name}"
    try:
        yield
    finally:
        os.environ.pop("WANDB_RUN_GROUP", None)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the command, or one of a sweep: how it ended is noted in its folder and shown.

    Args:
        folder: where Hydra keeps its config and log.
        overrides: as typed.
        alone: whether it is in no sweep.
    """

    folder: str
    overrides: list[str]
    alone: bool

    @property
    def is_plan(self) -> bool:
        """Whether it is only planned, as far as the command line says so."""
        typed = (text.lstrip("+").lower().partition("=") for text in self.overrides)
        return any(name == "plan" and value in ("true", "yes", "on", "1") for name, _, value in typed)

    def note(self, **content: Any) -> None:
        """Write cell.json."""
        note_cell(self.folder, {"overrides": self.overrides, **content})

    def report_planned(self, planned: Plan) -> None:
        self.note(status="planned", **dataclasses.asdict(planned))
        if self.alone:
            show_plan([{"overrides": self.overrides, **dataclasses.asdict(planned)}])

    def report_failed(self, error: BaseException, described: Callable[[], dict[str, Any]]) -> None:
        """Note and log an error in one line; raise only if the run is in no sweep, whose other cells continue."""
        content: dict[str, Any] = {} if _is_expected(error) else {"traceback": traceback.format_exc()}
        try:
            content |= described()
        except Exception as second:  # noqa: BLE001 - the settings may be what is broken
            content |= {"key": None, "config": {}, "not_described": one_line(second)}
        self.note(status="unplanned" if self.is_plan else "failed", error=error_line(error), **content)
        full = os.environ.get(TRACEBACKS) == "1" and not _is_expected(error)
        where = [] if self.alone else [redact_text(" ".join(self.overrides))]
        log.error("%s", ": ".join([*where, error_line(error)]), exc_info=error if full else None)
        if self.alone:
            raise SystemExit(2 if isinstance(error, UserError) else 1) from None

    def report_done(self, outcome: Outcome, model: str) -> None:
        record = outcome.record
        self.note(status="done", key=record["key"], record=str(outcome.path.resolve()))
        if self.alone:
            show_run(record, outcome.dense, outcome.path, outcome.found, model)
        else:
            log.info("%s", ending(record, outcome.path, outcome.found))


def _is_expected(error: BaseException) -> bool:
    return isinstance(error, (UserError, NumericalError, OSError))


def error_line(error: BaseException) -> str:
    """Return an error as one line without secrets."""
    if isinstance(error, OSError):
        return os_error_line(error)
    own = _is_expected(error) or isinstance(error, ForeignCodeError)
    return redact_text(" ".join(str(error).split()) if own else one_line(error))
