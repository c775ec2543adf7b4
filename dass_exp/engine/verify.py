"""Verify masks and weights: masks have exactly the requested sparsity, weights at least, no N:M group is over-full."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dass_exp.engine.callbacks import BlockReport, Callback, LoopState
from dass_exp.errors import NumericalError
from dass_exp.masks import NM, Pattern
from dass_exp.methods.base import LinearView, MaskResult, check_range

AXES = {0: "output", 1: "input", None: "matrix"}


class VerificationError(RuntimeError):
    """A method did not deliver the pattern that was asked for; the message names the layer."""


@dataclass(frozen=True)
class Layer:
    """One verified linear.

    Args:
        name: full module name.
        role: what it does in its block.
        zeros: number of weights that the mask removes.
        size: number of all its weights.
        axis: the axis along which weights competed: output, input or matrix.
        kernel_ready: a stock 2:4 kernel could use it: 2:4 along the input axis.
        excess: zeros beyond the mask (weights that were zero before, dead columns).
        underfull: N:M groups with fewer than n non-zeros.
        score_low, score_high: range of the scores.
        block_error: relative L2 error of the block's output, None without calibration and in the last block.
        seconds: time to score, rank and write.
        damping_retries: how often damping was raised (SparseGPT).
        tokens: calibration tokens that its input statistic has seen; None without calibration.
        output_error: relative L2 error of the linear's output over the calibration tokens; None without repair.
        output_error_before: the same before the repair.
    """

    name: str
    role: str
    zeros: int
    size: int
    axis: str
    kernel_ready: bool
    excess: int
    underfull: int
    score_low: float
    score_high: float
    block_error: float | None
    seconds: float
    damping_retries: int
    tokens: int | None
    output_error: float | None = None
    output_error_before: float | None = None


class LoadedZeros(Callback):
    """Counts the zeros of every matrix of the blocks before they are pruned: those of a model that was pruned before.

    ``matrices`` has the zeros and the size of each; none if some were not counted.
    """

    def __init__(self) -> None:
        self.matrices: list[tuple[int, int]] = []
        self.counts = True
        self._blocks: Sequence[nn.Module] = ()

    def on_start(self, loop: LoopState) -> None:
        self._blocks = loop.decoder.blocks  # type: ignore[assignment]

    def on_block_start(self, index: int) -> None:
        if self.counts:
            self.count(self._blocks[index])

    def count(self, block: nn.Module) -> None:
        """Count those of one block."""
        matrices = [parameter.detach() for parameter in block.parameters() if parameter.ndim > 1]
        values = torch.stack([torch.count_nonzero(matrix) for matrix in matrices]).tolist()  # one wait
        self.matrices += [(each.numel() - count, each.numel()) for each, count in zip(matrices, values, strict=True)]


class _Counts(NamedTuple):
    """What is counted in one linear, as numbers on its device until the whole block is read at once."""

    low: Tensor | float  # of the scores
    high: Tensor | float
    finite: Tensor  # whether all weights are
    wrong: Tensor  # groups of the mask
    survivors: Tensor  # weights that are not zero though the mask removes them
    zeros: Tensor  # of the mask
    zero_weights: Tensor
    overfull: Tensor | int = 0  # groups of an N:M pattern
    underfull: Tensor | int = 0

    def row(self) -> Tensor:
        """Return them as float64, which holds every count of a matrix exactly."""
        device = self.zeros.device
        return torch.stack(
            [
                (each.detach() if isinstance(each, Tensor) else torch.full((), each, device=device)).double()
                for each in self
            ]
        )


def verify(report: BlockReport, pattern: Pattern) -> list[Layer]:
    """Verify every linear of a pruned block; the host waits for the device once.

    Raises:
        VerificationError: a mask does not have the pattern, a masked weight is not zero, or a group is over-full.
        NumericalError: a score or a weight is not finite.
    """
    rows = []
    for linear in report.linears:
        if (result := report.results.get(linear.name)) is None:
            raise VerificationError(f"{linear.name}: it lies in the scope, and the method did not prune it")
        rows.append(_count(linear, result, pattern).row())
    layers = []
    for linear, numbers in zip(report.linears, torch.stack(rows).tolist() if rows else [], strict=True):
        layer = _layer(linear, report, pattern, numbers)
        if (error := report.repaired.get(linear.name)) is not None:
            layer = replace(layer, output_error=error.after, output_error_before=error.before)
        layers.append(layer)
    return layers


class Verification(Callback):
    """Verify every block as soon as it is pruned, and collect the results."""

    def __init__(self) -> None:
        self._patterns: list[Pattern] = []
        self.layers: list[Layer] = []
        self.starved: list[str] = []

    def on_start(self, loop: LoopState) -> None:
        self._patterns = loop.patterns

    def on_block_end(self, report: BlockReport) -> None:
        self.layers.extend(verify(report, self._patterns[report.index]))
        self.starved.extend(report.starved)


def _count(linear: LinearView, result: MaskResult, pattern: Pattern) -> _Counts:
    weight, keep = linear.weight, result.keep
    if keep.shape != weight.shape or keep.dtype != torch.bool:
        raise VerificationError(
            f"{linear.name}: its mask is {keep.dtype} {list(keep.shape)}, the weight is {list(weight.shape)}"
        )
    width = result.slab_width or keep.shape[1]
    slabs = zip(keep.split(width, dim=1), pattern.of_slabs((len(keep), keep.shape[1]), width), strict=True)
    counts = _Counts(
        low=result.low,
        high=result.high,
        finite=torch.isfinite(weight).all(),
        wrong=sum((of_slab.violations(slab, result.dim) for slab, of_slab in slabs), start=keep.new_zeros(()).long()),
        survivors=((weight != 0) & ~keep).sum(),
        zeros=(~keep).sum(),
        zero_weights=(weight == 0).sum(),
    )
    if not isinstance(pattern, NM):
        return counts
    overfull, underfull = pattern.overfull(weight, result.dim), pattern.underfull(weight, result.dim)
    return counts._replace(overfull=overfull, underfull=underfull)


def _layer(linear: LinearView, report: BlockReport, pattern: Pattern, numbers: list[float]) -> Layer:
    name, result = linear.name, report.results[linear.name]
    low, high, finite, *others = numbers  # in the order of _Counts
    wrong, survivors, zeros, zero_weights, overfull, underfull = map(int, others)
    check_range(name, low, high)
    if not finite:
        raise NumericalError(f"{name}: its pruned weights hold numbers that are not finite")
    if wrong:
        axis = AXES[result.dim]
        raise VerificationError(
            f"{name}: {wrong} groups of its mask do not have the sparsity of {pattern.name} along the {axis} axis"
        )
    if survivors:
        raise VerificationError(f"{name}: {survivors} weights are not zero although the mask removes them")
    if overfull and isinstance(pattern, NM):
        raise VerificationError(f"{name}: {overfull} groups hold more than {pattern.n} of {pattern.m} weights")
    return Layer(
        name=name,
        role=linear.role.value,
        zeros=zeros,
        size=linear.weight.numel(),
        axis=AXES[result.dim],
        kernel_ready=pattern.kernel_ready(result.dim),
        excess=zero_weights - zeros,
        underfull=underfull,
        score_low=low,
        score_high=high,
        block_error=report.error,
        seconds=result.seconds,
        damping_retries=result.damping_retries,
        tokens=linear.tokens,
    )
