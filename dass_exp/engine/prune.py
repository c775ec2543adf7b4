"""Prune a model block by block: observe the dense block, prune it, pass the pruned outputs on. Names no method.

Each block runs twice: once dense with observers on, once pruned with observers off for the inputs of the next block.
The second pass leaves out what pruning has not changed: attention where only the MLP is pruned, and the last block.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from dass_exp.config.choices import SCOPES, check_choice
from dass_exp.config.settings import CalibrationConfig, ExpertsConfig
from dass_exp.engine.activation_cache import ON_DEVICE, ActivationCache, CachedTensor
from dass_exp.engine.attention_replay import AttentionReplay
from dass_exp.engine.budget import block_patterns
from dass_exp.engine.callbacks import BlockReport, BlockSeconds, Callback, LoopState
from dass_exp.engine.capture import Batch, capture, eval_mode, exact_products
from dass_exp.engine.data_parallel import add_up_numbers, add_up_statistics, processes, share_of
from dass_exp.engine.observers import observe_inputs
from dass_exp.engine.reorder import check_unchanged, reorder
from dass_exp.engine.repair_passes import BlockInRepair, DensePass
from dass_exp.engine.stages import Stages, pruning_units, refine_masks
from dass_exp.errors import NumericalError, UserError
from dass_exp.masks import Pattern
from dass_exp.methods.base import Block, MaskResult, Pruner, check_range, check_statistics
from dass_exp.models.decoder import Decoder, decoder_of
from dass_exp.models.streamed import BlockLoader, BlocksInMemory

ENGINE_VERSION = 1  # part of every record's key: raise it when the engine's numbers change


@dataclass(frozen=True)
class EngineOptions:
    """How to pass calibration tokens through a model.

    Args:
        scope: ``mlp``, ``attention`` or ``all``.
        batch_size: sequences that pass through a block together.
        roles: path of each role's linear, for a family that the table does not know.
        experts: what to do with experts to which few tokens were routed.
        stages: what is done around the method; by default nothing.
        cache: where activations wait between one block and the next.
        return_hidden: return the pruned model's last hidden states; without, the last block runs once.
        returns_tuple: whether blocks return a tuple; None: call the first block once to find out.
    """

    scope: str = "mlp"
    batch_size: int = 4
    roles: Mapping[str, str] | None = None
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    stages: Stages = field(default_factory=Stages)
    cache: ActivationCache = ON_DEVICE
    return_hidden: bool = False
    returns_tuple: bool | None = None

    def __post_init__(self) -> None:
        check_choice("scope", self.scope)
        CalibrationConfig(batch_size=self.batch_size)  # checks it


@torch.no_grad()
def prune_model(
    model: nn.Module,
    tokens: Tensor | None,
    method: Pruner,
    pattern: Pattern,
    options: EngineOptions | None = None,
    callbacks: Sequence[Callback] = (),
    blocks: BlockLoader | None = None,
) -> list[Tensor]:
    """Prune a causal language model in place.

    Args:
        model: a transformers causal language model.
        tokens: int64 [sequences, tokens], calibration; None for a method that needs no statistic.
        method: prunes each block.
        pattern: the sparsity pattern.
        options: scope, batch size, experts, activation cache.
        callbacks: called in this order at the start, around each block, and at the end.
        blocks: loads the weights of each block before its turn; by default they are all in memory.

    Returns:
        the last hidden states, one tensor [sequences, tokens, features] per batch, if ``return_hidden`` is set.

    Raises:
        UserError: unknown family, empty scope, a pattern that does not divide an axis, tokens of another shape,
            or weights that are not in memory.
        NumericalError: a number is not finite; the message names the layer.
    """
    options, blocks = options or EngineOptions(), blocks or BlocksInMemory()
    decoder = decoder_of(model, options.roles)
    options.stages.check(method, pattern, options.scope)
    check_shapes(decoder, method, pattern, options.scope)
    if isinstance(blocks, BlocksInMemory) and any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            "the model's weights are not all in memory (accelerate has offloaded some); load it whole, or prune it "
            "with model.placement=stream"
        )
    with eval_mode(model), exact_products():
        if options.returns_tuple is None:
            blocks.load(0)  # it is called once to see whether blocks return a tuple
        batches = _calibration_batches(model, decoder, tokens, method, options)
        patterns = block_patterns(decoder, batches, options.stages.allocation, pattern, options.scope, blocks)
        if options.returns_tuple is None:
            blocks.load(0)  # callbacks that start may call it for the same purpose
        loop = LoopState(decoder, batches, patterns)
        for callback in callbacks:
            callback.on_start(loop)
        for index in range(loop.first_block, len(decoder.blocks)):
            blocks.load(index)
            for callback in callbacks:
                callback.on_block_start(index)
            report = _process_block(loop, index, method, options)
            for callback in callbacks:
                callback.on_block_end(report)
            del report  # with its statistics and masks, before those of the next block are collected
            blocks.release(index)
        for callback in callbacks:
            callback.on_end()
    return [batch.hidden for batch in loop.batches] if options.return_hidden else []


def check_shapes(decoder: Decoder, method: Pruner, pattern: Pattern, scope: str) -> None:
    """Check that every linear in the scope can hold the pattern. Reads shapes only: a model on the meta device will do.

    Raises:
        UserError: the scope is empty, or an axis is not divisible; the message names the layer.
    """
    if not method.prunes:
        return
    sites = [site for index in range(len(decoder.blocks)) for site in decoder.sites(index, scope)]
    for site in sites:
        if not (dtype := site.matrix.parameter.dtype).is_floating_point or dtype.itemsize < 2:
            raise UserError(
                f"{site.name}: its weights are {str(dtype).removeprefix('torch.')}; quantised weights cannot be "
                "pruned: load the model in float32, bfloat16 or float16"
            )
        shape = site.matrix.out_features, site.matrix.in_features
        try:
            pattern.check(shape, method.comparison_dim(site.role, pattern))
        except UserError as error:
            raise UserError(f"{site.name}: {error}") from error
    if not sites:
        raise UserError(f"scope={scope}: this model has no linear in it; choose another of {', '.join(SCOPES)}")


def _calibration_batches(
    model: nn.Module, decoder: Decoder, tokens: Tensor | None, method: Pruner, options: EngineOptions
) -> list[Batch]:
    if not options.stages.calibrated(method):
        return []
    if tokens is None:
        stages = ", ".join(f"{group} {stage.name}" for group, stage in options.stages.active.items())
        raise UserError(f"method {method.name}{stages and f' with {stages}'} needs calibration tokens")
    if tokens.ndim != 2 or not tokens.numel():
        raise UserError(
            f"calibration tokens of shape {list(tokens.shape)}: expected [sequences, tokens] with at least one of each"
        )
    if processes() > 1 and options.stages.repair.needs_mlp_tokens:
        problem = "it takes one sequence after the other, so they cannot be shared among processes"
        raise UserError(f"repair={options.stages.repair.name}: {problem}; choose repair=least_squares, or one process")
    return capture(
        model, list(decoder.blocks), share_of(tokens), options.batch_size, options.returns_tuple, options.cache
    )


def _process_block(loop: LoopState, index: int, method: Pruner, options: EngineOptions) -> BlockReport:
    """Observe a dense block, prune it, and pass the batches on through the pruned one."""
    start, pattern = time.perf_counter(), loop.patterns[index]
    decoder, batches, stages, scope = loop.decoder, loop.batches, options.stages, options.scope
    module, name = decoder.blocks[index], decoder.names[index]
    runs_again = bool(batches) and (options.return_hidden or index + 1 < len(decoder.blocks))
    replayed = decoder.attention(index) if (runs_again or stages.repair.follows_inputs) and scope == "mlp" else None
    before = DensePass(decoder, index, scope, stages.repair, options.cache)
    kinds, tokens = partial(stages.kinds, method), batches[0].tokens if batches else 0
    with observe_inputs(decoder, index, scope, kinds, tokens) as statistics:
        attention = AttentionReplay(replayed, statistics, options.cache)
        with attention.recording(), before.recording():
            dense = deque(options.cache.store(_dense_pass(module, index, batch, attention)) for batch in batches)
    add_up_statistics(statistics.values())
    observed = time.perf_counter()
    units = pruning_units(decoder, index, scope, statistics, method.stat_of) if method.prunes else []
    starved = _handle_starved([unit for unit in units if unit.name != name], options.experts) if batches else ()
    linears = [linear for unit in units for linear in unit.linears]
    check_statistics(linears)
    orders = {}
    if stages.permute.active:
        orders = reorder(units, stages.permute, method, pattern, int(decoder.config.num_attention_heads))
    if orders and batches and index == loop.first_block:
        check_unchanged(name, dense[0].load(), batches[0].run_block(module, index))
    weights = {linear.name: linear.weight.clone() for linear in linears} if stages.need_dense_weights else {}
    results = _choose_masks(units, method, pattern, weights, stages)
    block = BlockInRepair(before, batches, linears, weights, results, attention)
    repaired = stages.repair.repair(block) if batches else {}
    pruned, error = time.perf_counter(), None
    if runs_again:
        with attention.replaying() if results else nullcontext(), block.replaying_neurons():
            error = _pass_on(module, index, batches, dense, changed=bool(results))
        if not error < float("inf"):
            for linear_name, result in results.items():
                check_range(linear_name, result.low, result.high)  # may be the cause
            raise NumericalError(f"{name}: its output holds numbers that are not finite")
    passes = observed - start + time.perf_counter() - pruned
    seconds = BlockSeconds.split(passes, statistics.values(), pruned - observed, linears)
    return BlockReport(index, name, module, linears, results, error, seconds, starved, orders, repaired)


def _choose_masks(
    units: list[Block], method: Pruner, pattern: Pattern, dense: Mapping[str, Tensor], stages: Stages
) -> dict[str, MaskResult]:
    """Prune every unit, and refine its masks."""
    results: dict[str, MaskResult] = {}
    for unit in units:
        results |= method.prune_block(unit, pattern)
        if stages.refine.active:
            refine_masks(unit.linears, dense, results, stages.refine, pattern)
    return results


def _dense_pass(module: nn.Module, index: int, batch: Batch, attention: AttentionReplay) -> Tensor:
    output = batch.run_block(module, index)
    attention.batch_done()
    return output


def _pass_on(module: nn.Module, index: int, batches: list[Batch], dense: deque[CachedTensor], changed: bool) -> float:
    """Make the pruned outputs the inputs of the next block; return their relative L2 error (NaN if not finite)."""
    sums: list[Tensor] = []
    for batch in batches:
        cached = dense.popleft()  # a dense output is released as soon as it is compared
        reference = cached.load()
        output = batch.run_block(module, index) if changed else reference
        batch.cached = batch.cache.store(output) if changed else cached
        sums += [(output - reference).float().square_().sum(), reference.float().square().sum()]
    numbers = torch.stack(sums).tolist()  # the host waits once for all batches
    off, total = add_up_numbers([sum(numbers[::2]), sum(numbers[1::2])], sums[0].device)
    if not (off < float("inf") and total < float("inf")):
        return float("nan")
    return float((off / total) ** 0.5) if total else 0.0


def _handle_starved(experts: list[Block], config: ExpertsConfig) -> tuple[str, ...]:
    """Reset the statistics of experts with too few calibration tokens to uniform, or raise; return their names."""
    fewest = max(config.min_tokens, 1)
    starved = [unit for unit in experts if any((linear.tokens or 0) < fewest for linear in unit.linears)]
    for unit in starved:
        if config.starved == "raise":
            raise NumericalError(
                f"{unit.name}: {unit.linears[0].tokens} calibration tokens were routed to this expert, fewer than "
                f"experts.min_tokens={config.min_tokens}; calibrate on more, or set experts.starved=uniform"
            )
        for linear in unit.linears:
            if linear.statistic is not None:
                linear.statistic.reset_to_uniform()
                linear.statistic.uniform = True
    return tuple(unit.name for unit in starved)
