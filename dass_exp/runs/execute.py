"""Execute a run: prune, score and save its model, in memory or while its blocks are streamed."""

import functools
import logging
import math
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dass_exp.engine.activation_cache import ActivationCache
from dass_exp.engine.callbacks import BlockReport, Callback, ProgressBar, SeedEachBlock, Stopwatch
from dass_exp.engine.prune import EngineOptions, prune_model
from dass_exp.engine.verify import LoadedZeros, Verification
from dass_exp.evaluate.generation import Generation, generate
from dass_exp.evaluate.perplexity import Perplexity, perplexity, perplexity_of_hidden
from dass_exp.evaluate.streamed import Scores, StreamedPerplexity
from dass_exp.evaluate.zeroshot import ZeroShotOptions, ZeroShotResult, zero_shot
from dass_exp.models import load
from dass_exp.models.decoder import decoder_of
from dass_exp.models.save import CheckpointWriter, check_room, save_checkpoint, target_of
from dass_exp.models.streamed import BlockLoader, BlocksInMemory, StreamedBlocks
from dass_exp.runs.context import RunContext
from dass_exp.runs.record import RunResult, compose_manifest
from dass_exp.runs.resolved_run import ResolvedRun
from dass_exp.runs.resume import STATE, MaskFiles, ResumeState, State, load_state
from dass_exp.runs.retraining import DenseState, keep_dense, recount, retrain, with_last_scores
from dass_exp.storage.environment import PeakMemory

log = logging.getLogger(__name__)


def execute(run: ResolvedRun, context: RunContext, callbacks: Sequence[Callback] = ()) -> RunResult:
    """Prune, score and save the model of a run.

    Resident and streamed models differ in the loader of their blocks. A streamed model is scored
    and written while its blocks pass, a resident one afterwards.

    Args:
        run: resolved and placed.
        context: loads model, tokenizer and tokens.
        callbacks: of the engine's loop, after the run's own.

    Raises:
        UserError: a file of the model or of an interrupted start is missing or damaged, or the disk is too small.
        NumericalError, VerificationError: the method failed; the message names the layer.
    """
    memory, save = PeakMemory(run.spec.device), run.config.save
    with _opened(run, context) as (model, blocks):
        start = time.perf_counter()
        dense = {} if run.streams else context.dense_hidden(run, model)
        dense_text = None if run.streams else context.dense_generation(run, model)
        dense_s = time.perf_counter() - start
        untrained = keep_dense(run, context, model)
        writer = None if save is None else _checkpoint_writer(run, model)
        result = _run_blocks(run, context, model, blocks, writer, callbacks)
        if untrained is not None:
            result = _retrain(run, context, model, result, untrained, dense)
        manifest = compose_manifest(run, result.layers)
        if writer is not None:
            writer.finish(model, context.tokenizer(run), result.masks or {}, manifest)
        elif save is not None and not run.streams:
            with context.reporter.phase(f"saving {save}"):
                save_checkpoint(save, model, context.tokenizer(run), result.masks or {}, manifest)
        start = time.perf_counter()
        if not run.streams:
            result = replace(result, perplexity=_perplexity(run, context, model, dense))
            result = replace(result, generation=_generation(run, context, model, dense_text))
        if result.retrained is not None:
            result = replace(result, retrained=with_last_scores(result.retrained, result.perplexity))
        result = replace(result, tasks=_tasks(run, context, model))
        result.cost["load_s"] = 0.0 if run.streams else context.load_s
        result.cost["eval_s"] += time.perf_counter() - start + dense_s
        result.cost.update(memory.read())
    if result.dense is not None:
        result.dense.cost.update({**result.cost, **result.dense.cost})
    return result if run.config.save_masks else replace(result, masks=None)


@contextmanager
def _opened(run: ResolvedRun, context: RunContext) -> Iterator[tuple[Any, BlockLoader]]:
    """Yield the model, whole or with its blocks on the meta device, and the loader of its blocks."""
    if not run.streams:
        with context.resident_model(run) as model:
            yield model, BlocksInMemory()
        return
    model, blocks = load.load_streamed(run.spec)
    try:
        yield model, blocks
    finally:
        blocks.stop()


def _checkpoint_writer(run: ResolvedRun, model: nn.Module) -> CheckpointWriter | None:
    """Create the writer of a streamed model; None if the model is saved as a whole, or is in place already.

    Raises:
        UserError: the disk is too small.
    """
    save, disk = str(run.config.save), run.needs.disk if run.needs else 0
    size = int(sum(parameter.numel() for parameter in model.parameters()) * run.spec.dtype.itemsize)
    if not run.streams:
        check_room(save, (2 if run.resumable else 1) * size + disk)
        return None
    writer = CheckpointWriter(save, run.work_folder)
    if (run.work_folder / STATE).is_file() and writer.in_place(run.key):
        return None  # an earlier start was killed between moving its checkpoint and writing its record
    check_room(save, size + disk - writer.written)
    return writer


def _run_blocks(
    run: ResolvedRun,
    context: RunContext,
    model: nn.Module,
    blocks: BlockLoader,
    writer: CheckpointWriter | None,
    callbacks: Sequence[Callback],
) -> RunResult:
    """Pass the model's blocks through the engine once, with all callbacks of the run."""
    decoder, tokens, windows = decoder_of(model, run.spec.roles), context.calibration(run), context.windows(run)
    size = sum(parameter.numel() for parameter in model.parameters())
    result = RunResult([], [], None, {}, None, size, decoder.size, tokens, windows, {"prune_s": 0.0, "eval_s": 0.0})
    loaded = LoadedZeros()
    if not run.method.prunes and not run.streams:
        for block in decoder.blocks:
            loaded.count(block)
        return replace(result, loaded_zeros=loaded.matrices)
    stopwatch, verification, earlier = Stopwatch(run.spec.device), Verification(), _earlier_state(run)
    done = earlier.blocks if earlier else 0
    options = EngineOptions(
        scope=run.config.scope,
        batch_size=run.config.calibration.batch_size,
        roles=run.spec.roles,
        experts=run.config.experts,
        stages=run.stages,
        cache=_activation_cache(run),
        returns_tuple=earlier.returns_tuple if earlier else None,
    )
    scorers, saver = {}, None
    if run.streams:
        batch_size, scores = run.config.eval.batch_size, Scores(run.method.prunes, run.config.eval.divergence)
        scorers = {
            name: StreamedPerplexity(model, scored.ids, batch_size, options, stopwatch, scores)
            for name, scored in windows.items()
        }
    masks = MaskFiles(run.work_folder, done) if run.keeps_masks else None
    if writer is not None and isinstance(blocks, StreamedBlocks):
        writer.begin(blocks.names.to_checkpoint, len(decoder.blocks), done)
        saver = SaveBlocks(writer)
    resume = ResumeState(run, earlier, verification, scorers, stopwatch, loaded)
    phase = f"pruning with {run.method.name}"
    phase = f"reading, {phase} and scoring block by block" if run.streams else phase
    with context.reporter.phase(phase, len(decoder.blocks)) as advance:
        # the state counts a block as done, so it comes after everything that writes files of the block
        later = (verification, masks, saver, resume, ProgressBar(advance), *context.callbacks, *callbacks)
        own = (SeedEachBlock(run.config.seed), loaded if run.streams else None, *scorers.values())
        ordered: list[Callback] = [callback for callback in (*own, *later) if callback is not None]
        ids = tokens.ids if tokens is not None else None
        prune_model(model, ids, run.method, run.pattern, options, ordered, blocks)
    seconds = stopwatch.read()
    result.cost["prune_s"] = seconds["prune"]
    result = replace(
        result,
        layers=verification.layers,
        starved=verification.starved,
        masks=masks.read() if masks is not None else None,
        loaded_zeros=loaded.matrices,
    )
    return _with_scores(run, result, scorers, seconds) if scorers else result


def _retrain(
    run: ResolvedRun,
    context: RunContext,
    model: nn.Module,
    result: RunResult,
    untrained: DenseState,
    dense: Mapping[str, Tensor],
) -> RunResult:
    """Train the pruned model, and count its zeros again."""

    def score() -> Mapping[str, Perplexity]:
        return _perplexity(run, context, model, dense)

    masks, cache = result.masks or {}, _activation_cache(run)
    retrained = retrain(run, context, model, masks, untrained, score, cache)
    layers = recount(run, decoder_of(model, run.spec.roles), result.layers)
    cost = {**result.cost, "retrain_s": retrained["seconds"]}
    return replace(result, layers=layers, cost=cost, retrained=retrained)


def _with_scores(
    run: ResolvedRun, result: RunResult, scorers: dict[str, StreamedPerplexity], seconds: dict[str, float]
) -> RunResult:
    """Add what was scored while the blocks passed: perplexity, and the dense result unless tasks belong to it too."""
    scored = {name: scorer.dense_perplexity for name, scorer in scorers.items() if scorer.dense_perplexity}
    if not run.method.prunes:
        return replace(result, perplexity=scored, cost={**result.cost, "eval_s": seconds["dense"]})
    dense = None
    if run.config.eval.zeroshot is None:
        cost = {"prune_s": 0.0, "eval_s": seconds["dense"]}
        dense = replace(result, layers=[], starved=[], masks=None, calibration=None, cost=cost)
        dense = replace(dense, perplexity=scored)
    cost = {**result.cost, "eval_s": seconds["pruned"]}
    pruned = {name: scorer.pruned_perplexity for name, scorer in scorers.items() if scorer.pruned_perplexity}
    return replace(result, perplexity=pruned, cost=cost, dense=dense)


class SaveBlocks(Callback):
    """Write the weights of each block to the new checkpoint before they are released."""

    def __init__(self, writer: CheckpointWriter) -> None:
        self._writer = writer

    def on_block_end(self, report: BlockReport) -> None:
        weights = report.module.state_dict()
        self._writer.add(report.index, {f"{report.name}.{name}": tensor for name, tensor in weights.items()})


def _earlier_state(run: ResolvedRun) -> State | None:
    """Load the state of an interrupted start, if this one can continue it."""
    state = load_state(run.work_folder, run.identity, str(run.placement))
    if state is not None and run.keeps_masks and not MaskFiles.complete(run.work_folder, state.blocks):
        log.warning("%s: the interrupted run kept no masks, so the run begins again", run.work_folder)
        return None
    return state


def _activation_cache(run: ResolvedRun) -> ActivationCache:
    """Create the cache in a folder of this start alone: tensors of an earlier start would delete files of this one."""
    for folder in run.work_folder.glob("activations-*"):
        shutil.rmtree(folder, ignore_errors=True)
    return ActivationCache(run.config.calibration.cache, run.work_folder / f"activations-{uuid.uuid4().hex}")


def _perplexity(
    run: ResolvedRun, context: RunContext, model: nn.Module, dense: Mapping[str, Tensor]
) -> dict[str, Perplexity]:
    """Score all sets of windows; ``dense`` has the dense model's last hidden states, empty to measure no divergence."""
    if not (sets := context.windows(run)):
        return {}
    batch_size, scores = run.config.eval.batch_size, {}
    steps = sum(math.ceil(len(windows.ids) / batch_size) for windows in sets.values())
    with context.reporter.phase(f"perplexity of {run.method.name}", steps) as advance:
        for name, windows in sets.items():
            hidden = dense.get(name)
            if hidden is not None and not run.method.prunes:
                scores[name] = perplexity_of_hidden(model, hidden, windows.ids, batch_size)
            else:
                scores[name] = perplexity(model, windows.ids, batch_size, hidden, advance)
    return scores


def _generation(run: ResolvedRun, context: RunContext, model: nn.Module, dense: Tensor | None) -> Generation | None:
    if dense is None or (prompts := context.prompts(run)) is None:
        return None
    if not run.method.prunes:
        return Generation.of(dense, dense)
    with context.reporter.phase(f"generation of {run.method.name}"):
        return Generation.of(generate(model, prompts, dense.shape[1]), dense)


def _tasks(run: ResolvedRun, context: RunContext, model: nn.Module) -> ZeroShotResult | None:
    """Score the tasks on the model in memory; of a streamed run, on the model that it has saved."""
    evaluation = run.config.eval
    if (zeroshot := evaluation.zeroshot) is None or (run.streams and run.config.save is None):
        return None
    if run.streams:
        model.to("meta")
        saved = replace(run.spec, source=str(target_of(str(run.config.save))), revision=None)
        model = load.load_model(saved)
    with context.reporter.phase(f"zero-shot tasks of {run.method.name}"):
        options = ZeroShotOptions(
            4 * evaluation.batch_size,
            run.bos != "never",
            zeroshot.num_fewshot,
            zeroshot.include_path,
            functools.partial(context.reporter.phase, f"requests of {run.method.name}"),
        )
        tokenizer = context.tokenizer(run)
        return zero_shot(model, tokenizer, zeroshot.tasks, zeroshot.limit, zeroshot.data, options)
