"""Magnitude pruning."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dass_exp.masks import NM, Pattern
from dass_exp.methods.base import Block, LinearView, ScorePruner
from dass_exp.models.families import Role


@dataclass
class Magnitude(ScorePruner):
    """Keep the largest weights: score |W|, no calibration (Han et al., arXiv 1506.02626).

    Ranks over the whole matrix (unstructured) or inside each N:M group along the input axis, as in the Wanda code.
    """

    uses: ClassVar[frozenset[str]] = frozenset({"pattern", "scope"})

    def score(self, linear: LinearView, block: Block) -> Tensor:
        del block
        return linear.weight.abs()

    def comparison_dim(self, role: Role, pattern: Pattern) -> int | None:
        del role
        return 1 if isinstance(pattern, NM) else None
