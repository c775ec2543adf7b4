"""Check what a method did: the mask exactly, the weights as at least as sparse, N:M legality along the axis that was pruned."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dass_exp.engine.block_report import BlockReport
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
        zeros: weights that the mask removes.
        size: all its weights.
        axis: the axis along which weights competed: output, input or matrix.
        kernel_ready: a stock 2:4 kernel could use it: 2:4 along the input axis.
        excess: zeros beyond the mask (weights that were zero before, dead columns).
        underfull: N:M groups with fewer than n non-zeros.
        score_low, score_high: range of the scores.
        block_error: relative L2 error of the block's output, None without calibration and in the last block.
        seconds: time to score, rank and cut.
        damping_retries: how often damping was raised (SparseGPT).
        tokens: how many the statistic of its input saw; None without calibration.
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


def verify(report: BlockReport, pattern: Pattern) -> list[Layer]:
    """Check every linear of a pruned block.

    Raises:
        VerificationError: a mask is not exactly as asked, or a weight survived its mask, or a group is over-full.
        NumericalError: a weight is not finite.
    """
    layers = []
    for linear in report.linears:
        if (cut := report.cuts.get(linear.name)) is None:
            raise VerificationError(f"{linear.name}: it lies in the scope, and the method did not prune it")
        layers.append(_verify_linear(linear, cut, pattern, report.error))
    return layers


def _verify_linear(linear: LinearView, cut: MaskResult, pattern: Pattern, error: float | None) -> Layer:
    name, weight = linear.name, linear.weight
    if cut.keep.shape != weight.shape or cut.keep.dtype != torch.bool:
        raise VerificationError(
            f"{name}: its mask is {cut.keep.dtype} {list(cut.keep.shape)}, the weight is {list(weight.shape)}"
        )
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError(f"{name}: its pruned weights hold numbers that are not finite")
    slabs = cut.keep.split(cut.columns, dim=1) if cut.columns else (cut.keep,)
    if wrong := sum(pattern.violations(slab, cut.dim) for slab in slabs):
        raise VerificationError(
            f"{name}: {wrong} groups of its mask do not have the sparsity of {pattern.name} along the {AXES[cut.dim]} axis"
        )
    if survivors := int(((weight != 0) & ~cut.keep).sum()):
        raise VerificationError(f"{name}: {survivors} weights are not zero although the mask removes them")
    if isinstance(pattern, NM) and (overfull := pattern.overfull(weight, cut.dim)):
        raise VerificationError(f"{name}: {overfull} groups hold more than {pattern.n} of {pattern.m} weights")
    zeros = cut.keep.numel() - int(cut.keep.sum())
    return Layer(
        name=name,
        role=linear.role.value,
        zeros=zeros,
        size=weight.numel(),
        axis=AXES[cut.dim],
        kernel_ready=pattern.name == "2:4" and cut.dim == 1,
        excess=int((weight == 0).sum()) - zeros,
        underfull=pattern.underfull(weight, cut.dim) if isinstance(pattern, NM) else 0,
        score_low=cut.low,
        score_high=cut.high,
        block_error=error,
        seconds=cut.seconds,
        damping_retries=cut.retries,
        tokens=linear.tokens,
    )
