"""The engine: pass calibration tokens through a model block by block, observe, prune, pass on. It knows no method by name.

Each block runs twice: once on its dense weights with observers on, once pruned with observers off for the inputs of the next block. The second
pass leaves out what pruning has not changed: attention where only the MLP is pruned, and the last block, whose output nobody reads.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dass_exp.engine.activation_cache import ON_DEVICE, Cache, CachedTensor
from dass_exp.engine.attention_replay import Attention
from dass_exp.engine.block_report import BlockReport, Spent
from dass_exp.engine.capture import Batch, capture, evaluating
from dass_exp.engine.observers import observing
from dass_exp.errors import NumericalError, UserError, one_of, whole_number
from dass_exp.masks import Pattern
from dass_exp.methods.base import Block, LinearView, MaskResult, Pruner
from dass_exp.models.decoder import Decoder, decoder_of
from dass_exp.models.families import SCOPES
from dass_exp.models.streamed import BlocksInMemory, Source
from dass_exp.runs.progress import FromTheStart, Progress
from dass_exp.statistics import Statistic

ENGINE_VERSION = 1  # part of every record's key: raise it when the engine's numbers change


def _ignore(told: object) -> None:
    del told


@dataclass(frozen=True)
class Options:
    """How to prune a model.

    Args:
        scope: ``mlp``, ``attention`` or ``all``.
        batch_size: sequences that pass through a block together.
        roles: the roles of a family that the table does not know.
        on_block: told about each block as soon as it is pruned.
        min_tokens: an expert of a mixture to which fewer tokens were routed is starved.
        starved: what to do about it: ``level``, rank its weights as if all of its inputs were alike, or ``refuse``, stop.
        outputs: whether the pruned model's last hidden states are wanted; without, the last block runs once.
        source: where blocks come from; memory, or a checkpoint that is read block by block.
        before: called with the index of each block before anything is done to it.
        progress: where to begin, and whom to tell how far the run has come.
        cache: where activations wait between one block and the next.
    """

    scope: str = "mlp"
    batch_size: int = 4
    roles: Mapping[str, str] | None = None
    on_block: Callable[[BlockReport], None] = _ignore
    min_tokens: int = 32
    starved: str = "level"
    outputs: bool = False
    source: Source = field(default_factory=BlocksInMemory)
    before: Callable[[int], None] = _ignore
    progress: Progress = field(default_factory=FromTheStart)
    cache: Cache = ON_DEVICE

    def __post_init__(self) -> None:
        one_of("scope", self.scope, tuple(SCOPES))
        whole_number("calibration.batch_size", self.batch_size, least=1)
        whole_number("experts.min_tokens", self.min_tokens, least=0)
        one_of("experts.starved", self.starved, ("level", "refuse"))


@torch.no_grad()
def prune_model(
    model: nn.Module, tokens: Tensor | None, method: Pruner, pattern: Pattern, options: Options
) -> list[Tensor]:
    """Prune a causal language model in place.

    Args:
        model: a transformers causal language model.
        tokens: int64 [sequences, tokens], calibration; None for a method that needs no statistic.
        method: what to do to each block.
        pattern: the sparsity pattern.
        options: scope, batch size and whom to tell.

    Returns:
        the hidden states behind the last block, one tensor [sequences, tokens, features] per batch; none without calibration or ``outputs``.

    Raises:
        UserError: the family is unknown, the scope is empty, the pattern does not divide an axis, the tokens are no sequences, or weights are not in memory.
        NumericalError: a number is not finite; the message names the layer.
    """
    decoder = decoder_of(model, options.roles)
    check_shapes(decoder, method, pattern, options.scope)
    if isinstance(options.source, BlocksInMemory) and any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            "the model's weights are not all in memory (accelerate has put some elsewhere); load it whole, or prune it with model.placement=stream"
        )
    if method.stat is None:
        for index in _opened(decoder, options, []):
            options.on_block(_prune_unseen(decoder, index, method, pattern, options))
        return []
    if tokens is None:
        raise UserError(f"method {method.name} needs calibration tokens")
    if tokens.ndim != 2 or not tokens.numel():
        raise UserError(
            f"calibration tokens of shape {list(tokens.shape)}: expected [sequences, tokens] with at least one of each"
        )
    with evaluating(model):
        if options.progress.returns_tuple is None:
            options.source.open(0)  # one real call of it tells what blocks return
        batches = capture(
            model, list(decoder.blocks), tokens, options.batch_size, options.progress.returns_tuple, options.cache
        )
        for index in _opened(decoder, options, batches):
            options.on_block(_prune_block(decoder, index, batches, method, pattern, options))
    return [batch.hidden for batch in batches] if options.outputs else []


def check_shapes(decoder: Decoder, method: Pruner, pattern: Pattern, scope: str) -> None:
    """See that every linear in the scope can hold the pattern. Only shapes are read, so a model on the meta device will do.

    Raises:
        UserError: the scope is empty, or an axis is not divisible; the message names the layer.
    """
    found = False
    for index in range(len(decoder.blocks)):
        for site in decoder.sites(index, scope):
            found = True
            try:
                pattern.check((site.matrix.out_features, site.matrix.in_features), method.group(site.role, pattern))
            except UserError as error:
                raise UserError(f"{site.name}: {error}") from error
    if not found:
        raise UserError(f"scope={scope}: this model has no linear in it; choose another of {', '.join(SCOPES)}")


def _opened(decoder: Decoder, options: Options, batches: list[Batch]) -> Iterator[int]:
    """The indices of the blocks that are to be done, each block in memory while its turn lasts."""
    for index in range(options.progress.begin(batches), len(decoder.blocks)):
        options.source.open(index)
        options.before(index)
        yield index
        options.source.close(index)  # its weights are safe before anyone hears that it is done
        options.progress.done(index, batches)


def _prune_unseen(decoder: Decoder, index: int, method: Pruner, pattern: Pattern, options: Options) -> BlockReport:
    """Prune a block by its weights alone."""
    start = time.perf_counter()
    linears, cuts = _prune_units(_units(decoder, index, options.scope, {}), method, pattern)
    return BlockReport(
        decoder.names[index], linears, cuts, None, Spent.on(0.0, (), time.perf_counter() - start, linears)
    )


def _prune_block(
    decoder: Decoder, index: int, batches: list[Batch], method: Pruner, pattern: Pattern, options: Options
) -> BlockReport:
    start = time.perf_counter()
    module, name = decoder.blocks[index], decoder.names[index]
    again = options.outputs or index + 1 < len(decoder.blocks)
    with observing(decoder, index, options.scope, method.stat, batches[0].tokens) as stats:
        attention = Attention(
            decoder.attention(index) if again and options.scope == "mlp" else None, stats, options.cache
        )
        with attention.noting():
            dense = deque(options.cache.hold(_passed(module, index, batch, attention)) for batch in batches)
    observed = time.perf_counter()
    units = _units(decoder, index, options.scope, stats)
    starved = _feed([unit for unit in units if unit.name != name], options)
    for linear in (linear for unit in units for linear in unit.linears):
        linear.stat.check(linear.name)
    linears, cuts = _prune_units(units, method, pattern)
    pruned, error = time.perf_counter(), None
    if again:
        with attention.replaying() if cuts else nullcontext():
            error = _pass_on(module, index, batches, dense, changed=bool(cuts))
        if not error < float("inf"):
            raise NumericalError(f"{name}: its output holds numbers that are not finite")
    spent = Spent.on(observed - start + time.perf_counter() - pruned, stats.values(), pruned - observed, linears)
    return BlockReport(name, linears, cuts, error, spent, starved)


def _passed(module: nn.Module, index: int, batch: Batch, attention: Attention) -> Tensor:
    output = batch.through(module, index)
    attention.batch_done()
    return output


def _pass_on(module: nn.Module, index: int, batches: list[Batch], dense: deque[CachedTensor], changed: bool) -> float:
    """Run the pruned block for the inputs of the next one; the relative L2 error of its output, which is not finite where an output is not."""
    off = total = 0.0
    for batch in batches:
        held = dense.popleft()  # a dense output is let go as soon as it is compared
        reference = held.get()
        output = batch.through(module, index) if changed else reference
        batch.held = batch.cache.hold(output) if changed else held
        off += (output - reference).float().square_().sum().item()
        total += reference.float().square().sum().item()
    if not (off < float("inf") and total < float("inf")):
        return float("nan")
    return float((off / total) ** 0.5) if total else 0.0


def _units(decoder: Decoder, index: int, scope: str, stats: Mapping[str, Statistic]) -> list[Block]:
    """What is pruned together: the block, and each of its experts."""
    units: dict[str, list[LinearView]] = {}
    for site in decoder.sites(index, scope):
        units.setdefault(site.unit, []).append(LinearView(site.name, site.role, site.matrix, stats.get(site.source)))
    return [Block(name, linears) for name, linears in units.items()]


def _prune_units(
    units: list[Block], method: Pruner, pattern: Pattern
) -> tuple[list[LinearView], dict[str, MaskResult]]:
    cuts: dict[str, MaskResult] = {}
    for unit in units:
        cuts |= method.prune_block(unit, pattern)
    return [linear for unit in units for linear in unit.linears], cuts


def _feed(experts: list[Block], options: Options) -> tuple[str, ...]:
    """Those that saw fewer tokens than is asked for; their statistics are levelled, or refused."""
    starved = [
        unit for unit in experts if any((linear.tokens or 0) < max(options.min_tokens, 1) for linear in unit.linears)
    ]
    for unit in starved:
        if options.starved == "refuse":
            raise NumericalError(
                f"{unit.name}: {unit.linears[0].tokens} calibration tokens were routed to this expert, fewer than experts.min_tokens={options.min_tokens}; "
                "calibrate on more, or set experts.starved=level"
            )
        for linear in unit.linears:
            linear.stat.reset_to_uniform()
    return tuple(unit.name for unit in starved)
