"""The same sparsity in every block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dass_exp.allocation.base import Allocation, BlockProfile
from dass_exp.masks import Pattern
from dass_exp.methods.base import LinearView


@dataclass
class Uniform(Allocation):
    """Give every block the pattern that was asked for, unchanged."""

    active = False

    def check(self, pattern: Pattern) -> None:
        del pattern

    def measure(self, linears: Sequence[LinearView]) -> float:
        del linears
        return 0.0

    def sparsities(self, values: Sequence[float], sparsity: float) -> Callable[[float], list[float]]:
        return lambda parameter: [sparsity + parameter for _ in values]

    def budget(self, profile: Sequence[BlockProfile], pattern: Pattern) -> list[Pattern]:
        return [pattern] * len(profile)
