"""The base class of refinements: a better mask of the same pattern."""

from abc import ABC, abstractmethod

from torch import Tensor

from dass_exp.masks import Pattern
from dass_exp.methods.base import LinearView, MaskResult, Stage


class Refinement(Stage, ABC):
    """Improves the mask that a method has chosen."""

    def check(self, pattern: Pattern, dim: int | None = 1) -> None:
        """Raise a UserError, before a model is loaded, if masks of this pattern cannot be refined.

        Args:
            pattern: of the masks.
            dim: the axis along which the weights of a linear compete.
        """
        del pattern, dim

    @abstractmethod
    def refine(self, linear: LinearView, dense: Tensor, result: MaskResult, pattern: Pattern) -> Tensor:
        """Return the new mask, bool [out, in].

        Args:
            linear: gives the statistic of its input.
            dense: the weight before pruning, [out, in], in the model's dtype.
            result: the mask, and the axis along which its weights competed.
            pattern: of the mask; each of its groups keeps as many weights as before.
        """
