"""AlphaPruning: sparsities by the heavy tails of the weights' spectra (arXiv 2410.10912)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dass_exp.allocation.base import Allocation
from dass_exp.errors import UserError, finite_number
from dass_exp.methods.base import LinearView
from dass_exp.statistics import one_thread


@dataclass
class Alpha(Allocation):
    """Remove more from blocks whose spectra have lighter tails (Lu et al., arXiv 2410.10912); needs no data.

    The tail exponent of a matrix is Hill's estimate over the n upper ones of its N squared singular values, half of
    them: 1 + n / sum of ln(l / lowest of them) (``alpha_mid``). A block's number is the mean over its matrices;
    sparsities are in proportion to a linear map of it onto [1 - spread, 1 + spread]. The authors' default searches the
    start of the tail instead, with a lower bound that mixes an eigenvalue with a logarithm; half needs no parameter.

    Args:
        spread: half the relative range of sparsities, epsilon in the paper (0.3).
    """

    spread: float = 0.3

    def __post_init__(self) -> None:
        allowed = "a number of at least 0 and less than 1 (the paper: 0.3)"
        value = finite_number("allocation.spread", self.spread, allowed)
        if not 0 <= value < 1:
            raise UserError(f"allocation.spread={self.spread!r}: expected {allowed}")
        self.spread = value

    def measure(self, linears: Sequence[LinearView]) -> float:
        return sum(tail_exponent(linear.weight) for linear in linears) / len(linears)

    def sparsities(self, values: Sequence[float], sparsity: float) -> Callable[[float], list[float]]:
        low, high = min(values), max(values)
        share = [(value - low) / (high - low) if high > low else 0.5 for value in values]
        ratios = [1 - self.spread + 2 * self.spread * part for part in share]
        return lambda scale: [ratio * scale for ratio in ratios]


def tail_exponent(weight: Tensor) -> float:
    """Return Hill's estimate for the upper half of the squared singular values of a matrix."""
    matrix = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().T
    with one_thread(weight.device):
        values = torch.linalg.eigvalsh(matrix @ matrix.T).clamp_min_(1e-300)  # ascending
    tail = values[len(values) // 2 :].log()
    spread = float((tail - tail[0]).sum())
    return 1 + len(tail) / spread if spread > 0 else 1e6  # all equal: no tail at all
