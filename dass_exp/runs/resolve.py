"""Resolve the settings of a run to a :class:`ResolvedRun`: find its model, check it, and place it."""

import dataclasses
import logging
import math
from functools import partial
from pathlib import Path

import torch

from dass_exp.config.settings import RunConfig
from dass_exp.engine.prune import check_shapes
from dass_exp.errors import UserError
from dass_exp.evaluate.generation import PROMPT
from dass_exp.models.decoder import decoder_of
from dass_exp.models.load import bos_policy, check_weights, is_present
from dass_exp.runs.context import RunContext
from dass_exp.runs.memory import MemoryNeeds, Workload, check_host, choose_placement, memory_needs
from dass_exp.runs.resolved_run import Components, ResolvedRun
from dass_exp.runs.resume import placement_in

log = logging.getLogger(__name__)


def identify_run(config: RunConfig, context: RunContext) -> ResolvedRun:
    """Resolve everything about a run but the placement of its model; enough for its identity and key.

    Raises:
        UserError: a value is not allowed, or the model cannot be found.
    """
    components = Components.of(config)
    spec, tokenizer = context.find(config.model)
    parts = {part.name: getattr(components, part.name) for part in dataclasses.fields(components)}
    return ResolvedRun(
        **parts, config=config, spec=spec, bos=bos_policy(config.model.bos, spec.family, tokenizer, spec.source)
    )


def resolve(config: RunConfig, context: RunContext) -> ResolvedRun:
    """Resolve the settings of a run. An interrupted run keeps its placement, whatever memory is free now.

    Args:
        config: validated settings.
        context: finds models and tokens.

    Raises:
        UserError: the run cannot start; nothing was loaded or written.
    """
    run = identify_run(config, context)
    with run.naming_foreign_code(UserError):
        return run if run.finished_record() is not None else _to_be_executed(run, context)


def _to_be_executed(run: ResolvedRun, context: RunContext) -> ResolvedRun:
    config, streamed = run.config, _without(run, "generation")
    without_tasks = _without(streamed, "zeroshot")
    for candidate in dict.fromkeys((run, streamed, without_tasks)):
        if (earlier := placement_in(candidate.work_folder, candidate.identity)) is not None:
            _warn_of_generation(run, candidate)
            if candidate.config.eval.zeroshot is not config.eval.zeroshot:
                log.warning("zero-shot tasks are left out, as they were when this run was interrupted")
            requested = config.model.placement
            return place(candidate, context, earlier if requested == "auto" else requested)
    run = place(run, context)
    if not run.streams:
        return run
    if run.retrain.active:
        needed = f"it needs {run.needs.resident / 1e9:.1f} GB" if run.needs else "it does not fit"
        raise UserError(
            f"retrain={run.retrain.name}: the model would be read block by block, and it is trained as a whole "
            f"({needed}); choose retrain=none, a smaller model or batch, or a larger machine"
        )
    _warn_of_generation(run, streamed)
    run = dataclasses.replace(streamed, placement=run.placement, needs=run.needs)
    if config.eval.zeroshot is None or not (reason := _tasks_do_not_fit(run, context)):
        return run
    if config.eval.perplexity is None and not run.method.prunes:
        raise UserError(
            "the model is read block by block, so its zero-shot tasks, which are all that is asked for, cannot be "
            f"scored: {reason}"
        )
    log.warning("the model is read block by block, so zero-shot tasks are left out: %s", reason)
    return dataclasses.replace(without_tasks, placement=run.placement, needs=run.needs)


def _without(run: ResolvedRun, part: str) -> ResolvedRun:
    """Return a run that leaves a part of the evaluation out; the run itself if it has no such part."""
    if getattr(run.config.eval, part) is None:
        return run
    evaluation = dataclasses.replace(run.config.eval)
    setattr(evaluation, part, None)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, eval=evaluation))


def _warn_of_generation(run: ResolvedRun, executed: ResolvedRun) -> None:
    if executed.config.eval.generation is not run.config.eval.generation:
        advice = "score a saved model, or a smaller one, where it fits in memory"
        log.warning("the model is read block by block, so eval.generation is left out: %s", advice)


def place(run: ResolvedRun, context: RunContext, requested: str | None = None) -> ResolvedRun:
    """Check a run as far as possible without weights, and place its model in memory or stream it.

    Raises:
        UserError: a sequence is too long, the pattern does not fit the scope, or the run does not fit in memory.
    """
    _check(run, context)
    requested = requested or run.config.model.placement
    needs, cache, reusable = _needs(run, context), context.cache, 0
    if requested != "stream" and cache.model(run.spec) is not None:
        reusable = needs.model
    else:
        cache.clear()  # the memory of the previous model counts as free
    try:
        placement, reason = choose_placement(requested, needs, context.available_memory(run.spec.device) + reusable)
        if run.spec.device.type != "cpu" and is_present(run.spec.device):
            torch.accelerator.empty_host_cache()  # what torch keeps of earlier cells counts as free
            keeps_dense = run.method.prunes and run.config.eval.divergence and not cache.dense_hidden
            check_host(needs, placement, keeps_dense, context.available_memory(torch.device("cpu")))
    except UserError:
        context.check_length(run)  # a text that is too short is the better reason
        raise
    if placement == "stream":
        cache.clear()
        level = logging.WARNING if requested == "auto" else logging.INFO
        log.log(level, "model.placement=%s: %s", requested, reason)
    context.calibration(run)  # last: the tokens of a run that does not fit would fill the memory themselves
    context.warn_of_tokens(run)
    return dataclasses.replace(run, placement=placement, needs=needs)


def _check(run: ResolvedRun, context: RunContext) -> None:
    """Check lengths, shapes and texts before weights are loaded."""
    config, limit = run.config, run.spec.positions
    lengths = {"calibration.seq_len": config.calibration.seq_len if run.calibrated else 0}
    lengths["retrain.seq_len"] = run.retrain.seq_len if run.retrain.active else 0
    lengths |= {f"{setting}.context": scored.context for setting, scored in config.eval.perplexity_sets.values()}
    if config.eval.generation is not None and config.eval.perplexity is not None:
        prompt = min(PROMPT, config.eval.perplexity.context)
        lengths[f"{prompt} tokens of a prompt + eval.generation.tokens"] = prompt + config.eval.generation.tokens
    for setting, length in lengths.items():
        if limit is not None and length > limit:
            raise UserError(f"{setting}={length}: model {run.spec.name} has {limit} positions; choose at most that")
    skeleton = context.skeleton(run)
    check_shapes(decoder_of(skeleton, run.spec.roles), run.method, run.pattern, config.scope)
    if Path(run.spec.source).is_dir():
        check_weights(run.spec, skeleton)
    context.windows(run)
    if run.retrain.active:
        context.training_windows(run)


def _needs(run: ResolvedRun, context: RunContext) -> MemoryNeeds:
    config, windows = run.config, [windows.ids for windows in context.windows(run).values()]
    workload = Workload(
        scope=config.scope if run.method.prunes else None,
        kinds=partial(run.stages.kinds, run.method),
        stages=run.stages,
        batch_size=config.calibration.batch_size,
        scoring_batch_size=config.eval.batch_size,
        dtype=run.spec.dtype,
        device=run.spec.device,
        cache=config.calibration.cache,
        shared=context.shared,
        resumable=config.resume is not False,
        solver_bytes=run.stages.solver_bytes(run.method),
        retrain=run.retrain,
        training_windows=len(context.training_windows(run).ids) if run.retrain.active else 0,
    )
    calibration = (config.calibration.num_samples, config.calibration.seq_len) if run.calibrated else (0, 0)
    longest = max((ids.shape[1] for ids in windows), default=0)  # all sets, as windows of the longest context
    size = (math.ceil(sum(ids.numel() for ids in windows) / longest), longest) if windows else (0, 0)
    skeleton = context.skeleton(run)
    return memory_needs(decoder_of(skeleton, run.spec.roles), skeleton, calibration, size, workload)


def _tasks_do_not_fit(run: ResolvedRun, context: RunContext) -> str:
    """Say why the saved model cannot be scored on tasks when it is complete; empty if it can."""
    if run.config.save is None:
        return "save=FOLDER keeps it, to be scored where it fits in memory"
    needed, free = run.needs.scored if run.needs else 0, context.available_memory(run.spec.device)
    if needed <= free:
        return ""
    return (
        f"the model alone needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; score {run.config.save} where "
        "it fits"
    )
