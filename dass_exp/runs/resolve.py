"""Turn the settings of a run into a :class:`ResolvedRun`: everything about it that is known before it is run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dass_exp.config.components import build
from dass_exp.config.settings import RunConfig
from dass_exp.data.texts import Text
from dass_exp.engine.prune import check_shapes
from dass_exp.errors import UserError
from dass_exp.evaluate.zeroshot import check_tasks
from dass_exp.masks import Pattern
from dass_exp.methods.base import Pruner
from dass_exp.methods.dense import Dense
from dass_exp.models.decoder import Decoder, LinearSite, decoder_of
from dass_exp.models.load import ModelSpec, bos_policy
from dass_exp.models.save import is_saved, partial_folder_of
from dass_exp.runs.context import RunContext
from dass_exp.runs.identity import identity_of, key_of
from dass_exp.runs.memory import MemoryNeeds, Workload, choose_placement, memory_needs
from dass_exp.runs.resume import placement_in
from dass_exp.runs.track import Tracker
from dass_exp.storage.records import Record, RecordStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Components:
    """The objects that a config describes by ``_target_``."""

    method: Pruner
    pattern: Pattern
    tracker: Tracker
    calibration_text: Text
    evaluation_text: Text | None

    @classmethod
    def of(cls, config: RunConfig) -> Components:
        """Build them.

        Raises:
            UserError: one of them refuses a value; the message names the setting.
        """
        scored, zeroshot = config.eval.perplexity, config.eval.zeroshot
        if zeroshot is not None:
            check_tasks(zeroshot.tasks, zeroshot.data)
        return cls(
            method=build(config.method, Pruner, "method"),
            pattern=build(config.pattern, Pattern, "pattern"),
            tracker=build(config.tracker, Tracker, "tracker"),
            calibration_text=build(config.calibration.text, Text, "calibration.text"),
            evaluation_text=build(scored.text, Text, "eval.perplexity.text") if scored else None,
        )


@dataclass(frozen=True, eq=False)
class ResolvedRun(Components):
    """One run, resolved once and never changed.

    Args:
        config: the typed settings.
        spec: the model, identified but not loaded.
        bos: where the beginning-of-sequence token is put: ``never``, ``stream`` or ``window``.
        placement: ``resident`` or ``stream``; None as long as nothing has to be executed.
        needs: memory of the run, where it was computed.
    """

    config: RunConfig
    spec: ModelSpec
    bos: str
    placement: str | None = None
    needs: MemoryNeeds | None = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that can change a number (:mod:`dass_exp.runs.identity`)."""
        return identity_of(self)

    @cached_property
    def key(self) -> str:
        """The key of its record."""
        return key_of(self.identity)

    @property
    def streams(self) -> bool:
        """Whether the model is read block by block."""
        return self.placement == "stream"

    @property
    def store(self) -> RecordStore:
        """Where its record is kept."""
        return RecordStore(self.config.results_dir)

    @property
    def record_folder(self) -> Path:
        """The folder of its record."""
        return self.store.path(self.key).parent

    @property
    def work_folder(self) -> Path:
        """The folder for its resume state, cached activations and growing checkpoint, removed when it is done."""
        save = self.config.save
        return self.record_folder / "work" if save is None else partial_folder_of(save)

    @property
    def work_folders(self) -> set[Path]:
        """Its own work folder, and the one of an earlier start of the same run without ``save``."""
        return {self.work_folder, self.record_folder / "work"}

    @property
    def keeps_masks(self) -> bool:
        """Whether masks are written, beside the record or into the saved model."""
        return self.method.prunes and (self.config.save_masks or self.config.save is not None)

    @property
    def resumable(self) -> bool:
        """Whether the state behind each block is kept: asked for by ``resume``, by default in streamed runs."""
        return self.config.resume is not False if self.streams else bool(self.config.resume)

    def finished_record(self) -> Record | None:
        """The record of the run if nothing is left to do: its saved model and masks, where asked for, are there too.

        Raises:
            UserError: the save folder holds something else.
        """
        config = self.config
        saved = config.save is None or is_saved(config.save, self.key)
        record = None if config.rerun else self.store.find(self.key)
        masks_missing = config.save_masks and self.method.prunes and not self.store.masks(self.key).is_file()
        return record if saved and not masks_missing else None

    def dense(self) -> ResolvedRun | None:
        """Its dense counterpart: same model and evaluation, nothing pruned. None if this is dense or scores nothing."""
        evaluation = self.config.eval
        if not self.method.prunes or (evaluation.perplexity is None and evaluation.zeroshot is None):
            return None
        model, placement = self.config.model, self.placement
        if evaluation.zeroshot is not None and placement != "resident":
            # tasks need the whole model in memory, where it may fit alone
            model, placement = dataclasses.replace(model, placement="resident"), None
        config = dataclasses.replace(self.config, model=model, rerun=False, repeat=0, save=None)
        return dataclasses.replace(self, config=config, method=Dense(), placement=placement)

    def sites(self, decoder: Decoder) -> Iterator[LinearSite]:
        """The linears that it prunes."""
        for index in range(len(decoder.blocks)):
            yield from decoder.sites(index, self.config.scope)


def identify_run(config: RunConfig, context: RunContext) -> ResolvedRun:
    """Everything about a run but where its model is placed; enough for its identity and key.

    Raises:
        UserError: a component refuses a value, or the model cannot be found.
    """
    components = Components.of(config)
    spec, tokenizer = context.find(config.model)
    parts = {part.name: getattr(components, part.name) for part in dataclasses.fields(components)}
    return ResolvedRun(**parts, config=config, spec=spec, bos=bos_policy(config.model.bos, spec, tokenizer))


def resolve(config: RunConfig, context: RunContext) -> ResolvedRun:
    """Resolve the settings of a run. An interrupted run goes on as it began, whatever memory is free now.

    Args:
        config: validated settings.
        context: finds models and tokens.

    Raises:
        UserError: the run cannot start; nothing was loaded or written.
    """
    run = identify_run(config, context)
    if run.finished_record() is not None:
        return run
    without_tasks = None
    if config.eval.zeroshot is not None:
        evaluation = dataclasses.replace(config.eval, zeroshot=None)
        without_tasks = dataclasses.replace(run, config=dataclasses.replace(config, eval=evaluation))
    for candidate in filter(None, (run, without_tasks)):
        if (earlier := placement_in(candidate.work_folder, candidate.identity)) is not None:
            if candidate is without_tasks:
                log.warning("zero-shot tasks are left out, as they were when this run was interrupted")
            requested = config.model.placement
            return place(candidate, context, earlier if requested == "auto" else requested)
    run = place(run, context)
    if without_tasks is None or not run.streams or not (reason := _tasks_do_not_fit(run, context)):
        return run
    if config.eval.perplexity is None and not run.method.prunes:
        raise UserError(
            "the model is read block by block, so its zero-shot tasks, which are all that is asked for, cannot be "
            f"scored: {reason}"
        )
    log.warning("the model is read block by block, so zero-shot tasks are left out: %s", reason)
    return dataclasses.replace(without_tasks, placement=run.placement, needs=run.needs)


def place(run: ResolvedRun, context: RunContext, requested: str | None = None) -> ResolvedRun:
    """The run with its model placed in memory or streamed, after everything that can be checked without weights.

    Raises:
        UserError: a sequence is too long, the pattern does not fit the scope, or the run does not fit in memory.
    """
    _check(run, context)
    requested = requested or run.config.model.placement
    needs, cache, reusable = _needs(run, context), context.cache, 0
    if requested != "stream" and cache.model(run.spec) is not None:
        reusable = needs.model
    else:
        cache.clear()  # the model before this one must not count as memory that is taken
    placement, reason = choose_placement(requested, needs, context.available_memory(run.spec.device) + reusable)
    if placement == "stream":
        cache.clear()
        level = logging.WARNING if requested == "auto" else logging.INFO
        log.log(level, "model.placement=%s: %s", requested, reason)
    return dataclasses.replace(run, placement=placement, needs=needs)


def _check(run: ResolvedRun, context: RunContext) -> None:
    """Check lengths, shapes and texts before weights are loaded."""
    config, scored, limit = run.config, run.config.eval.perplexity, run.spec.positions
    lengths = {
        "calibration.seq_len": config.calibration.seq_len if run.method.stat else 0,
        "eval.perplexity.context": scored.context if scored else 0,
    }
    for setting, length in lengths.items():
        if limit is not None and length > limit:
            raise UserError(f"{setting}={length}: model {run.spec.name} has {limit} positions; choose at most that")
    check_shapes(decoder_of(context.skeleton(run), run.spec.roles), run.method, run.pattern, config.scope)
    context.windows(run)
    context.calibration(run)


def _needs(run: ResolvedRun, context: RunContext) -> MemoryNeeds:
    config, scored, windows = run.config, run.config.eval.perplexity, context.windows(run)
    workload = Workload(
        scope=config.scope if run.method.prunes else None,
        stat=run.method.stat,
        batch_size=config.calibration.batch_size,
        scoring_batch_size=config.eval.batch_size,
        dtype=run.spec.dtype,
        device=run.spec.device,
        cache=config.calibration.cache,
        shared=context.shared,
        resumable=config.resume is not False,
    )
    calibration = (config.calibration.num_samples, config.calibration.seq_len) if run.method.stat else (0, 0)
    size = (len(windows.ids), scored.context) if scored is not None and windows is not None else (0, 0)
    skeleton = context.skeleton(run)
    return memory_needs(decoder_of(skeleton, run.spec.roles), skeleton, calibration, size, workload)


def _tasks_do_not_fit(run: ResolvedRun, context: RunContext) -> str:
    """Why the saved model cannot be scored on tasks when it is complete; empty where it can."""
    if run.config.save is None:
        return "save=FOLDER keeps it, to be scored where it fits in memory"
    needed, free = run.needs.scored if run.needs else 0, context.available_memory(run.spec.device)
    if needed <= free:
        return ""
    return (
        f"the model alone needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; score {run.config.save} where "
        "it fits"
    )
