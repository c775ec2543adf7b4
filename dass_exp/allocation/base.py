"""The base class of allocations: one sparsity for each block, and the requested one altogether."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dass_exp.errors import UserError
from dass_exp.masks import Budget, Pattern, Unstructured
from dass_exp.methods.base import LinearView, Stage

_HIGHEST = 0.99  # no block loses more, if the budget permits


@dataclass(frozen=True)
class BlockProfile:
    """What an allocation knows of a dense block.

    Args:
        value: what :meth:`Allocation.measure` returned.
        sizes: the number of weights of each matrix in the scope.
    """

    value: float
    sizes: tuple[int, ...]


class Allocation(Stage, ABC):
    """Divides a budget of sparsity among the blocks.

    An allocation with a ``stat`` needs a pass of the calibration tokens through the dense model before the first block
    is pruned; without one it looks at weights only.
    """

    def check(self, pattern: Pattern) -> None:
        """Raise a UserError, before a model is loaded, if a budget of this pattern cannot be divided."""
        if not isinstance(pattern, Unstructured):
            name = type(self).__name__.lower()
            raise UserError(
                f"allocation={name} with pattern {pattern.name}: every group of an N:M pattern keeps the same number "
                "of weights, so blocks cannot differ; choose pattern=unstructured, or allocation=uniform"
            )

    @abstractmethod
    def measure(self, linears: Sequence[LinearView]) -> float:
        """Return the number by which a block is compared with others.

        Args:
            linears: of the dense block in the scope, its experts included.
        """

    @abstractmethod
    def sparsities(self, values: Sequence[float], sparsity: float) -> Callable[[float], list[float]]:
        """Return a function of one parameter that gives each block its sparsity, and rises with the parameter.

        Args:
            values: of the blocks, as measured.
            sparsity: that was asked for.
        """

    def budget(self, profile: Sequence[BlockProfile], pattern: Pattern) -> list[Pattern]:
        """Return the pattern of each block. Together they remove ``int(sparsity * size)`` weights of the whole scope.

        Matrices of a block that would lose a weight at the same sparsity lose it together, so the sum may miss by half
        their number: by one with the three equal matrices of a GLU MLP, by a few with those of the attention.
        """
        self.check(pattern)
        asked = pattern.settings()["sparsity"]
        totals = [sum(block.sizes) for block in profile]
        of = self.sparsities([block.value for block in profile], asked)

        def clipped(parameter: float) -> list[float]:
            return [min(max(value, 0.0), max(_HIGHEST, asked)) for value in of(parameter)]

        def removed(parameter: float) -> float:
            return sum(map(float.__mul__, clipped(parameter), map(float, totals)))

        low, high = -2.0, 1e6
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if removed(middle) < asked * sum(totals) else (low, middle)
        return _patterns(profile, clipped(high), int(asked * sum(totals)))


def _patterns(profile: Sequence[BlockProfile], sparsities: Sequence[float], zeros: int) -> list[Pattern]:
    """Round each block's sparsity to whole weights of its matrices, and carry what is left over to the next block."""
    patterns: list[Pattern] = []
    wanted = taken = 0.0
    for number, (block, sparsity) in enumerate(zip(profile, sparsities, strict=True)):
        wanted += sparsity * sum(block.sizes)
        target = (zeros if number + 1 == len(profile) else round(wanted)) - taken
        start = min(max(target / sum(block.sizes), 0.0), 1 - 1 / sum(block.sizes))
        steps = [(int(start * size) + step) / size for size in set(block.sizes) for step in (0, 1)]
        choices = [value for step in (start, *steps) for value in (step, step * (1 + 1e-12)) if 0 <= value < 1]
        best = min(choices, key=lambda value: (abs(_zeros(block, value) - target), value))
        taken += _zeros(block, best)
        patterns.append(Budget(best))
    return patterns


def _zeros(block: BlockProfile, sparsity: float) -> int:
    return sum(int(sparsity * size) for size in block.sizes)
