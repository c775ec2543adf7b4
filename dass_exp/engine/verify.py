"""Verify masks and weights: masks have exactly the requested sparsity, weights at least, no N:M group is over-full."""

from dataclasses import dataclass, replace

import torch

from dass_exp.engine.callbacks import BlockReport, Callback, LoopState
from dass_exp.errors import NumericalError
from dass_exp.masks import NM, Pattern
from dass_exp.methods.base import LinearView, MaskResult

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


def verify(report: BlockReport, pattern: Pattern) -> list[Layer]:
    """Verify every linear of a pruned block.

    Raises:
        VerificationError: a mask does not have the pattern, a masked weight is not zero, or a group is over-full.
        NumericalError: a weight is not finite.
    """
    layers = []
    for linear in report.linears:
        if (result := report.results.get(linear.name)) is None:
            raise VerificationError(f"{linear.name}: it lies in the scope, and the method did not prune it")
        layer = _verify_linear(linear, result, pattern, report.error)
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


def _verify_linear(linear: LinearView, result: MaskResult, pattern: Pattern, error: float | None) -> Layer:
    name, weight, keep = linear.name, linear.weight, result.keep
    if keep.shape != weight.shape or keep.dtype != torch.bool:
        raise VerificationError(
            f"{name}: its mask is {keep.dtype} {list(keep.shape)}, the weight is {list(weight.shape)}"
        )
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError(f"{name}: its pruned weights hold numbers that are not finite")
    width = result.slab_width or keep.shape[1]
    slabs = zip(keep.split(width, dim=1), pattern.of_slabs((len(keep), keep.shape[1]), width), strict=True)
    if wrong := sum(of_slab.violations(slab, result.dim) for slab, of_slab in slabs):
        axis = AXES[result.dim]
        raise VerificationError(
            f"{name}: {wrong} groups of its mask do not have the sparsity of {pattern.name} along the {axis} axis"
        )
    if survivors := int(((weight != 0) & ~keep).sum()):
        raise VerificationError(f"{name}: {survivors} weights are not zero although the mask removes them")
    if isinstance(pattern, NM) and (overfull := pattern.overfull(weight, result.dim)):
        raise VerificationError(f"{name}: {overfull} groups hold more than {pattern.n} of {pattern.m} weights")
    zeros = keep.numel() - int(keep.sum())
    return Layer(
        name=name,
        role=linear.role.value,
        zeros=zeros,
        size=weight.numel(),
        axis=AXES[result.dim],
        kernel_ready=pattern.kernel_ready(result.dim),
        excess=int((weight == 0).sum()) - zeros,
        underfull=pattern.underfull(weight, result.dim) if isinstance(pattern, NM) else 0,
        score_low=result.low,
        score_high=result.high,
        block_error=error,
        seconds=result.seconds,
        damping_retries=result.damping_retries,
        tokens=linear.tokens,
    )
