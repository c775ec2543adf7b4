"""The base class of repairs: new surviving weights under a mask."""

from abc import ABC, abstractmethod

from torch import Tensor

from dass_exp.methods.base import LinearView, Stage


class Repair(Stage, ABC):
    """Changes the weights that a method has left, to make up for those that it has removed."""

    @abstractmethod
    def repair_linear(self, linear: LinearView, dense: Tensor, keep: Tensor) -> tuple[float, float]:
        """Write new surviving weights; return the relative L2 error of the linear's output before and after.

        Args:
            linear: holds the pruned weight, and gives the statistic of its input.
            dense: the weight before pruning, [out, in], in the model's dtype.
            keep: bool [out, in], True where a weight has survived; the others stay zero.
        """
