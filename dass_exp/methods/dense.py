"""The dense baseline: nothing is pruned."""

from dataclasses import dataclass
from typing import ClassVar

from dass_exp.masks import Pattern
from dass_exp.methods.base import Block, LinearView, MaskResult, Pruner


@dataclass
class Dense(Pruner):
    """The unpruned baseline of every table. It uses none of the pruning settings."""

    uses: ClassVar[frozenset[str]] = frozenset()

    def prune_linear(self, linear: LinearView, block: Block, pattern: Pattern) -> MaskResult:
        raise NotImplementedError("dense prunes nothing")
