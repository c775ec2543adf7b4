"""OWL: outlier weighed layerwise sparsity (arXiv 2310.05175)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dass_exp.allocation.base import Allocation
from dass_exp.errors import UserError, finite_number
from dass_exp.methods.base import LinearView
from dass_exp.statistics import InputNorm


@dataclass
class OWL(Allocation):
    """Remove less from blocks with more outliers (Yin et al., arXiv 2310.05175).

    A block's number D is the percentage of weights whose |W| * norm(x) exceeds ``m`` times the mean over all weights of
    the block. Its sparsity is that asked for, minus 2 * ``spread`` * (D - min D) / (max D - min D), shifted so that the
    weighted mean over the blocks is what was asked for. In the authors' code the blocks count alike in that mean, which
    is the same where they have the same size. N:M patterns are refused; theirs gives whole groups another n.

    Args:
        m: outliers exceed this multiple of the mean. The paper: 3 or 5.
        spread: half the range of sparsities, lambda in the paper (0.08).
    """

    m: float = 3.0
    spread: float = 0.08
    stat = InputNorm

    def __post_init__(self) -> None:
        for name, limit in (("m", float("inf")), ("spread", 0.5)):
            allowed = "a number of at least 0" + (" and at most 0.5" if limit == 0.5 else "")
            value = finite_number(f"allocation.{name}", getattr(self, name), allowed)
            if not 0 <= value <= limit:
                raise UserError(f"allocation.{name}={value!r}: expected {allowed}")
            setattr(self, name, value)

    def measure(self, linears: Sequence[LinearView]) -> float:
        size = sum(linear.weight.numel() for linear in linears)
        total = sum(_scores(linear).sum(dtype=torch.float64).item() for linear in linears)
        limit = self.m * total / size
        return 100 * sum(int((_scores(linear) > limit).sum()) for linear in linears) / size

    def sparsities(self, values: Sequence[float], sparsity: float) -> Callable[[float], list[float]]:
        low, high = min(values), max(values)
        kept = [2 * self.spread * (value - low) / (high - low) if high > low else 0.0 for value in values]
        return lambda shift: [sparsity + shift - more for more in kept]


def _scores(linear: LinearView) -> torch.Tensor:
    return linear.weight.float().abs().mul_(linear.norm)
