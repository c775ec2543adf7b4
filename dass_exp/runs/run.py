"""One run: resolve, find or execute, record, track."""

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import Timeout

from dass_exp.config.settings import RunConfig
from dass_exp.engine.callbacks import BlockReport, Callback
from dass_exp.errors import ForeignCodeError, UserError
from dass_exp.models.save import locked
from dass_exp.runs.context import RunContext
from dass_exp.runs.execute import execute
from dass_exp.runs.record import RunResult, compose_record, describe_config, labels
from dass_exp.runs.resolve import place, resolve
from dass_exp.runs.resolved_run import ResolvedRun
from dass_exp.runs.resume import discard, discard_unless_resumable, placement_in
from dass_exp.storage.durable import refuse_links, remove_partial_files
from dass_exp.storage.records import Record
from dass_exp.trackers.none import NullTracker
from dass_exp.trackers.tracking import Tracking

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The record of a run and of its dense counterpart.

    Args:
        record: its content.
        path: its file.
        dense: the record of its dense counterpart; None for dense itself, or if nothing is scored.
        found: whether the record existed before.
    """

    record: Record
    path: Path
    dense: Record | None
    found: bool


def run(config: RunConfig, context: RunContext | None = None) -> Outcome:
    """Execute a run, or find its record if it was executed before.

    Args:
        config: validated settings.
        context: shows progress and holds what runs share; not needed for a single run.

    Raises:
        UserError: a setting does not fit the model or the data; nothing was loaded or written.
        NumericalError, VerificationError: the method failed; failed.json says where.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    context = context or RunContext()
    context.load_s = 0.0
    resolved = resolve(config, context)
    dense_run, dense = resolved.dense(), None
    if dense_run is not None and not resolved.streams:  # scored while the model in memory is still dense
        dense, _ = _find_or_execute(_counterpart(dense_run), context)
    record, found = _find_or_execute(resolved, context)
    if found and any(record.get(name) != value for name, value in labels(config).items()):
        log.warning("the record was made before, and keeps its own name, tags and notes; rerun=true makes it again")
    if found and resolved.tracker.takes_one_run:
        Tracking(resolved.tracker, config.results_dir).send(record)
    if dense_run is not None and dense is None:
        dense, _ = _find_or_execute(_counterpart(dense_run), context)
    return Outcome(record, resolved.store.path(resolved.key), dense, found)


def _counterpart(dense: ResolvedRun) -> ResolvedRun:
    """Return a dense run that is executed on the way: it takes no run of a tracker that waits for another's numbers."""
    return replace(dense, tracker=NullTracker()) if dense.tracker.takes_one_run else dense


def _find_or_execute(run: ResolvedRun, context: RunContext) -> tuple[Record, bool]:
    """Return the record of a run, and whether it existed before."""
    if (record := run.finished_record()) is not None:
        with suppress(Timeout, UserError), run.store.lock(run.key, wait=False), locked(run.config.save):
            _clean_up(run)  # unless another process is using the folder
        return record, True
    if run.placement is None:
        run = place(run, context)
    with run.store.lock(run.key), locked(run.config.save):
        if (record := run.finished_record()) is not None:  # another process executed it while this one waited
            return record, True
        run.store.make_way(run.key)
        described = describe_config(run.config, run, run.spec)
        tracking = Tracking(run.tracker, run.config.results_dir)
        with (
            tracking.working({"key": run.key, "config": described, **labels(run.config)}),
            run.store.recording_failure(run.key, described),
        ):
            with run.naming_foreign_code(ForeignCodeError):
                result = _execute_in_work_folder(run, context, TrackBlocks(tracking))
            record = _write(run, result)
        _clean_up(run)
    tracking.send(record)
    return record, False


class TrackBlocks(Callback):
    """Tell the tracker of every block that is done."""

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking

    def on_block_end(self, report: BlockReport) -> None:
        error = {} if report.error is None else {"block_error": report.error}
        self._tracking.progress({"blocks": report.index + 1, **error})


def _execute_in_work_folder(run: ResolvedRun, context: RunContext, *callbacks: Callback) -> RunResult:
    refuse_links(run.work_folder, run.store.runs.parent if run.config.save is None else run.work_folder.parent)
    for folder in (run.work_folder, run.record_folder):
        remove_partial_files(folder)
    try:
        return execute(run, context, callbacks)
    finally:
        discard_unless_resumable(run.work_folder)


def _write(run: ResolvedRun, result: RunResult) -> Record:
    """Write the record, and before it that of the dense model if it was scored on the way."""
    dense = run.dense()
    if result.dense is not None and dense is not None:
        with dense.store.lock(dense.key):
            if dense.store.find(dense.key) is None:
                dense.store.write(compose_record(dense, result.dense), {})
            else:
                dense.store.tidy(dense.key)
    record = compose_record(run, result)
    run.store.write(record, {"documents.json": result.tasks.documents} if result.tasks else {}, result.masks)
    return record


def _clean_up(run: ResolvedRun) -> None:
    """Delete what a finished run kept for resuming, and what killed writers left."""
    run.store.tidy(run.key)
    for folder in run.work_folders:
        if placement_in(folder, run.identity) or run.retrain.active:
            discard(folder)
        discard_unless_resumable(folder)
