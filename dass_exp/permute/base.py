"""The base class of stages that put intermediate neurons in order: free, since the model computes the same function."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dass_exp.masks import Pattern
from dass_exp.methods.base import Stage
from dass_exp.models.families import Role


class NeuronOrder(Stage, ABC):
    """Reorders the intermediate neurons of an MLP: rows of gate and up, columns of down.

    In an MLP without a GLU, rows of its first linear and columns of its second; in attention the channels inside each
    head, rows of v and columns of o, alike for all query heads that share a head of v.

    The order decides which neurons share an N:M group wherever groups extend along the neurons: in down, and in gate
    and up too for methods that compare the weights of one input column, as DaSS does.
    """

    def check(self, pattern: Pattern) -> None:
        """Raise a UserError, before a model is loaded, if the order of neurons does not matter to this pattern."""
        del pattern

    @abstractmethod
    def order(self, importance: Mapping[Role, Tensor], pattern: Pattern) -> Tensor:
        """Return the new order, int64 [neurons]: neuron i of the new order is the former neuron ``order[i]``.

        What is said of neurons holds for the channels of one head.

        Args:
            importance: of the weights of each linear whose groups extend along the neurons, float [neurons, others].
            pattern: decides the size of a group.
        """


@dataclass
class NoOrder(NeuronOrder):
    """The neurons stay where they are."""

    active = False

    def order(self, importance: Mapping[Role, Tensor], pattern: Pattern) -> Tensor:
        raise NotImplementedError("no order was asked for")
