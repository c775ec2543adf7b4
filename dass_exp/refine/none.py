"""No refinement."""

from dataclasses import dataclass

from torch import Tensor

from dass_exp.masks import Pattern
from dass_exp.methods.base import LinearView, MaskResult
from dass_exp.refine.base import Refinement


@dataclass
class NoRefinement(Refinement):
    """Leave every mask as the method has chosen it."""

    active = False

    def refine(self, linear: LinearView, dense: Tensor, result: MaskResult, pattern: Pattern) -> Tensor:
        del linear, dense, pattern
        return result.keep
