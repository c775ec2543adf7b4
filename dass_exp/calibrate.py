"""The engine: pass calibration tokens through a model block by block, observe, prune, pass on. It knows no method by name.

Each block runs twice: once on its dense weights with observers on, once pruned with observers off for the inputs of the next block.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dass_exp.capture import Batch, capture, evaluating
from dass_exp.errors import NumericalError, UserError, one_of, whole_number
from dass_exp.families import INPUT_OF, SCOPES, Decoder, decoder_of
from dass_exp.masks import Pattern
from dass_exp.methods.base import Block, Cut, LinearView, Pruner
from dass_exp.stats import Stat

ENGINE_VERSION = 1  # part of every record's key: raise it when the engine's numbers change


@dataclass
class BlockReport:
    """One pruned block.

    Args:
        name: full module name.
        linears: the views that were pruned.
        cuts: what was cut, by the name of the linear.
        error: relative L2 error of the block's output, pruned against dense, on the same inputs; None without calibration.
        seconds: time for both passes and the pruning.
    """

    name: str
    linears: list[LinearView]
    cuts: dict[str, Cut]
    error: float | None
    seconds: float


def _ignore(report: BlockReport) -> None:
    del report


@dataclass(frozen=True)
class Options:
    """How to prune a model.

    Args:
        scope: ``mlp``, ``attention`` or ``all``.
        batch_size: sequences that pass through a block together.
        roles: the roles of a family that the table does not know.
        on_block: told about each block as soon as it is pruned.
    """

    scope: str = "mlp"
    batch_size: int = 4
    roles: Mapping[str, str] | None = None
    on_block: Callable[[BlockReport], None] = _ignore

    def __post_init__(self) -> None:
        one_of("scope", self.scope, tuple(SCOPES))
        whole_number("calibration.batch_size", self.batch_size, least=1)


@torch.no_grad()
def prune_model(model: nn.Module, tokens: Tensor | None, method: Pruner, pattern: Pattern, options: Options) -> list[Tensor]:
    """Prune a causal language model in place.

    Args:
        model: a transformers causal language model.
        tokens: int64 [sequences, tokens], calibration; None for a method that needs no statistic.
        method: what to do to each block.
        pattern: the sparsity pattern.
        options: scope, batch size and whom to tell.

    Returns:
        the hidden states behind the last block, one tensor [sequences, tokens, features] per batch; none without calibration.

    Raises:
        UserError: the family is unknown, the scope is empty, the pattern does not divide an axis, or the tokens are no sequences.
        NumericalError: a number is not finite; the message names the layer.
    """
    decoder = decoder_of(model, options.roles)
    check_shapes(decoder, method, pattern, options.scope)
    if method.stat is None:
        for index in range(len(decoder.blocks)):
            start = time.perf_counter()
            block = _block(decoder, index, options.scope, {})
            cuts = method.prune_block(block, pattern)
            options.on_block(BlockReport(block.name, block.linears, cuts, None, time.perf_counter() - start))
        return []
    if tokens is None:
        raise UserError(f"method {method.name} needs calibration tokens")
    if tokens.ndim != 2 or not tokens.numel():
        raise UserError(f"calibration tokens of shape {list(tokens.shape)}: expected [sequences, tokens] with at least one of each")
    with evaluating(model):
        batches = capture(model, list(decoder.blocks), tokens, options.batch_size)
        for index in range(len(decoder.blocks)):
            options.on_block(_prune_block(decoder, index, batches, method, pattern, options.scope))
    return [batch.hidden for batch in batches]


def check_shapes(decoder: Decoder, method: Pruner, pattern: Pattern, scope: str) -> None:
    """See that every linear in the scope can hold the pattern. Only shapes are read, so a model on the meta device will do.

    Raises:
        UserError: the scope is empty, or an axis is not divisible; the message names the layer.
    """
    found = False
    for index in range(len(decoder.blocks)):
        for name, role, module in decoder.linears(index, scope):
            found = True
            try:
                pattern.check((module.out_features, module.in_features), method.group(role, pattern))
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
    if not found:
        raise UserError(f"scope={scope}: this model has no linear in it; choose another of {', '.join(SCOPES)}")


def _prune_block(decoder: Decoder, index: int, batches: list[Batch], method: Pruner, pattern: Pattern, scope: str) -> BlockReport:
    start = time.perf_counter()
    module = decoder.blocks[index]
    with observing(decoder, index, scope, method.stat) as stats:
        dense = deque(batch.through(module, index) for batch in batches)
    block = _block(decoder, index, scope, stats)
    for linear in block.linears:
        linear.stat.check(linear.name)
    cuts = method.prune_block(block, pattern)
    off = total = 0.0
    for batch in batches:
        reference = dense.popleft()  # a dense output is let go as soon as it is compared
        batch.hidden = batch.through(module, index) if cuts else reference
        off += (batch.hidden - reference).float().square_().sum().item()
        total += reference.float().square().sum().item()
    if not (off < float("inf") and total < float("inf")):
        raise NumericalError(f"{block.name}: its output holds numbers that are not finite")
    error = (off / total) ** 0.5 if total else 0.0
    return BlockReport(block.name, block.linears, cuts, error, time.perf_counter() - start)


def _block(decoder: Decoder, index: int, scope: str, stats: Mapping[str, Stat]) -> Block:
    views = [LinearView(name, role, module, stats.get(INPUT_OF[role])) for name, role, module in decoder.linears(index, scope)]
    return Block(decoder.names[index], views)


@contextmanager
def observing(decoder: Decoder, index: int, scope: str, kind: type[Stat] | None) -> Iterator[dict[str, Stat]]:
    """While it is open, statistics of ``kind`` gather at the inputs of the linears in the scope, one per distinct input.

    Yields:
        the statistics by the name of the input (:data:`dass_exp.families.INPUT_OF`).
    """
    stats: dict[str, Stat] = {}
    with ExitStack() as stack:
        for _, role, module in decoder.linears(index, scope):
            if kind is not None and INPUT_OF[role] not in stats:
                stat = stats[INPUT_OF[role]] = kind(module.in_features, module.weight.device)
                stack.callback(module.register_forward_pre_hook(_observer(stat), with_kwargs=True).remove)
        yield stats


def _observer(stat: Stat) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        stat.update(args[0] if args else kwargs["input"])

    return observe
