"""RIA: relative importance and activations (ICLR 2024, openreview Tr0lPx9woF)."""

from dataclasses import dataclass

from torch import Tensor

from dass_exp.errors import non_negative, one_of
from dass_exp.masks import NM, Pattern
from dass_exp.methods.base import Block, LinearView, ScorePruner
from dass_exp.models.families import Role
from dass_exp.statistics import InputNorm

_TINY = 1e-30  # a row or column of zeros has the sum zero; its scores stay zero


@dataclass
class RIA(ScorePruner):
    """Score (|W| / sum of its column + |W| / sum of its row) * norm(x)**alpha (Zhang et al., ICLR 2024).

    A weight counts by its share of its input and of its output, so no channel is removed as a whole. Ranks over the
    whole matrix (unstructured) or inside each N:M group along the input axis. Channel permutation is not included.

    The authors' code divides in the weight's dtype; in half precision the shares of a large matrix are nearly subnormal
    and tie. Here they are float32. It also counts n of N:M as removed; here n is kept, as everywhere in this package.

    Args:
        alpha: exponent of the input norm, at least 0. The paper: 0.5; zero is relative importance without activations.
        granularity: of unstructured masks: ``matrix``, all weights compete (the paper); ``output``, those of one row.
    """

    alpha: float = 0.5
    granularity: str = "matrix"
    stat = InputNorm

    def __post_init__(self) -> None:
        self.alpha = non_negative("method.alpha", self.alpha, "the paper: 0.5")
        one_of("method.granularity", self.granularity, ("matrix", "output"))

    def score(self, linear: LinearView, block: Block) -> Tensor:
        del block
        weight = linear.weight.float().abs()
        column, row = weight.sum(0, keepdim=True), weight.sum(1, keepdim=True)
        shares = weight / column.clamp_min_(_TINY)
        shares += weight.div_(row.clamp_min_(_TINY))
        return shares.mul_(linear.norm.pow(self.alpha))

    def comparison_dim(self, role: Role, pattern: Pattern) -> int | None:
        del role
        return 1 if isinstance(pattern, NM) or self.granularity == "output" else None
