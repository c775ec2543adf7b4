"""What a pruning method is: :class:`Pruner` may change weights, :class:`ScorePruner` scores, ranks and cuts."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dass_exp.errors import NumericalError
from dass_exp.masks import Pattern
from dass_exp.models.decoder import Matrix
from dass_exp.models.families import Role
from dass_exp.statistics import Statistic

ALL_SETTINGS = frozenset({"pattern", "scope", "calibration", "seed"})


class LinearView:
    """One weight matrix as methods see it: [out_features, in_features], with the statistic of its input.

    Args:
        name: full name.
        role: what the linear does in its block.
        matrix: where its weight is.
        stat: what the engine observed at its input, None for a method that asks for nothing.

    Attributes:
        write_s: seconds spent on changing the weight.
    """

    def __init__(self, name: str, role: Role, matrix: Matrix, stat: Statistic | None) -> None:
        self.name = name
        self.role = role
        self._matrix = matrix
        self._stat = stat
        self.write_s = 0.0

    @property
    def weight(self) -> Tensor:
        """The weight, [out_features, in_features], in the model's dtype; not to be changed in place."""
        return self._matrix.weight

    @property
    def stat(self) -> Any:
        """The statistic of the input, of the type that the method asked for."""
        if self._stat is None:
            raise LookupError(f"{self.name}: no statistic was collected; set `stat` on the method")
        return self._stat

    @property
    def tokens(self) -> int | None:
        """How many tokens the statistic has seen; None without one."""
        return None if self._stat is None else self._stat.tokens

    def zero(self, keep: Tensor) -> None:
        """Set the weights to zero where ``keep`` (bool [out, in]) is False; the others stay as they are, bit for bit."""
        start = time.perf_counter()
        self._matrix.zero(keep)
        self.write_s += time.perf_counter() - start

    def write(self, weight: Tensor) -> None:
        """Replace the weight by ``weight`` [out, in], rounded to the model's dtype."""
        start = time.perf_counter()
        self._matrix.write(weight)
        self.write_s += time.perf_counter() - start


class Block:
    """The linears of one decoder block that are to be pruned; in a mixture of experts each expert is a block of its own.

    Args:
        name: full name of the block or expert.
        linears: the views in the scope, in the order of the roles.
    """

    def __init__(self, name: str, linears: Sequence[LinearView]) -> None:
        self.name = name
        self.linears = list(linears)
        self._by_role = {linear.role: linear for linear in linears}

    def stat(self, role: Role) -> Any:
        """The statistic at the input of the block's linear with this role.

        Raises:
            LookupError: the role does not lie in the scope.
        """
        if role not in self._by_role:
            raise LookupError(f"{self.name}: role {role.value} does not lie in the scope")
        return self._by_role[role].stat


@dataclass
class MaskResult:
    """What a method did to one linear.

    Args:
        keep: bool [out, in], True where the weight stays.
        dim: the axis along which weights competed (0 output, 1 input, None the matrix).
        low, high: range of the scores.
        columns: width of the slabs of input columns that were ranked apart, None for the whole matrix.
        retries: how often damping had to be raised.
    """

    keep: Tensor
    dim: int | None
    low: float
    high: float
    columns: int | None = None
    retries: int = 0
    seconds: float = 0.0


class Pruner(ABC):
    """A one-shot pruning method; subclasses are dataclasses whose fields are its hyper-parameters.

    Attributes:
        stat: what is to be collected at the input of each linear in the scope; None needs no calibration.
        uses: the settings of a run that can change the outcome; the others do not enter the record's key.
        version: raised when the method's numbers change; part of the key.
    """

    stat: ClassVar[type[Statistic] | None] = None
    uses: ClassVar[frozenset[str]] = ALL_SETTINGS
    version: ClassVar[int] = 1

    @property
    def name(self) -> str:
        """The name that tables and records print."""
        return type(self).__name__.lower()

    @property
    def prunes(self) -> bool:
        """Whether it prunes at all."""
        return bool(self.uses)

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters that can change the outcome, in canonical form."""
        return _plain(vars(self))

    def group(self, role: Role, pattern: Pattern) -> int | None:
        """The axis along which the weights of a linear of this role compete: 0, 1, or None for the whole matrix."""
        del role, pattern
        return 1

    def remark(self, roles: Collection[Role]) -> str:
        """What a reader must know of this method on linears of these roles, or an empty string."""
        del roles
        return ""

    def prune_block(self, block: Block, pattern: Pattern) -> dict[str, MaskResult]:
        """Prune every linear of ``block`` in place.

        Returns:
            what was cut, by the name of the linear.

        Raises:
            NumericalError: a score or weight is not finite; the message names the linear.
        """
        cuts = {}
        for number, linear in enumerate(block.linears):
            start = time.perf_counter()
            cuts[linear.name] = self.prune_linear(linear, block, pattern)
            cuts[linear.name].seconds = time.perf_counter() - start
            if self.stat is not None and all(other.stat is not linear.stat for other in block.linears[number + 1 :]):
                linear.stat.release()
        return cuts

    @abstractmethod
    def prune_linear(self, linear: LinearView, block: Block, pattern: Pattern) -> MaskResult:
        """Prune one linear in place and say what was cut."""


class ScorePruner(Pruner):
    """Score, rank, cut: the weights that stay are not changed."""

    @abstractmethod
    def score(self, linear: LinearView, block: Block) -> Tensor:
        """How important each weight is: [out, in], higher stays."""

    def prune_linear(self, linear: LinearView, block: Block, pattern: Pattern) -> MaskResult:
        scores = self.score(linear, block)
        low, high = finite_range(scores, linear.name)
        dim = self.group(linear.role, pattern)
        keep = pattern.keep(scores, dim)
        linear.zero(keep)
        return MaskResult(keep, dim, low, high)


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as a record can hold them; a method inside a method brings its own."""
    return {
        key: {"name": value.name, **value.settings()} if isinstance(value, Pruner) else value
        for key, value in fields.items()
    }


def finite_range(scores: Tensor, name: str) -> tuple[float, float]:
    """Lowest and highest score.

    Raises:
        NumericalError: one of them is NaN or infinite.
    """
    low, high = torch.stack(torch.aminmax(scores)).tolist()
    # aminmax passes a NaN on, so two numbers tell about the whole matrix
    if not (-float("inf") < low and high < float("inf")):
        raise NumericalError(f"{name}: its scores or weights hold numbers that are not finite")
    return low, high
