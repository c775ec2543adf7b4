"""SparseGPT (arXiv 2301.00774)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dass_exp.errors import UserError, finite_number, whole_number
from dass_exp.families import Role
from dass_exp.masks import NM, Pattern
from dass_exp.methods.base import Block, Cut, LinearView, Pruner, finite_range
from dass_exp.stats import Gram

_STRIP = 16


@dataclass
class SparseGPT(Pruner):
    """Prune column by column and let the columns to the right make up for the error (Frantar & Alistarh, arXiv 2301.00774, algorithm 1).

    A weight's score is w^2 / U_jj^2, U the upper Cholesky factor of the inverse Hessian. Unstructured masks are chosen for a slab of
    ``blocksize`` columns at a time, all of its weights competing; N:M masks tile by tile, on weights as the columns before left them.

    Args:
        blocksize: columns of a slab; rounded down to a multiple of m for N:M (at least m).
        damping: added to the Hessian's diagonal, as a multiple of its mean.
    """

    blocksize: int = 128
    damping: float = 0.01
    stat = Gram
    version = 2  # 2: the factorisation does not depend on the number of threads

    def __post_init__(self) -> None:
        whole_number("method.blocksize", self.blocksize, least=1)
        allowed = "a number of at least 0 (the paper: 0.01)"
        value = finite_number("method.damping", self.damping, allowed)
        if value < 0:
            raise UserError(f"method.damping={self.damping!r}: expected {allowed}")
        self.damping = value

    def group(self, role: Role, pattern: Pattern) -> int | None:
        del role
        return 1 if isinstance(pattern, NM) else None

    def columns(self, pattern: Pattern) -> int:
        """Columns of a slab under this pattern."""
        return max(pattern.m, self.blocksize // pattern.m * pattern.m) if isinstance(pattern, NM) else self.blocksize

    def prune_linear(self, linear: LinearView, block: Block, pattern: Pattern) -> Cut:
        del block
        gram: Gram = linear.stat
        factor, retries = gram.inverse_factor(self.damping)
        # Transposed, a column of W is a contiguous row, and the loop below reads and writes memory in order.
        weight = linear.weight.T.float().contiguous()
        weight[gram.dead] = 0
        keep = torch.empty_like(weight, dtype=torch.bool)
        width = self.columns(pattern)
        low, high = float("inf"), float("-inf")
        for start in range(0, len(weight), width):
            end = min(start + width, len(weight))
            slab, corner = weight[start:end], factor[start:end, start:end]
            errors = torch.empty_like(slab)
            for tile, scores, kept in self._tiles(slab, corner.diagonal(), pattern):
                lowest, highest = finite_range(scores, linear.name)
                low, high = min(low, lowest), max(high, highest)
                keep[start + tile.start : start + tile.stop] = kept
                _absorb(slab, kept, corner, errors, tile)
            weight[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
        linear.write(weight.T)
        dim = self.group(linear.role, pattern)
        return Cut(keep.T.contiguous(), dim, low, high, None if dim == 1 else width, retries)

    def _tiles(self, slab: Tensor, diagonal: Tensor, pattern: Pattern) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The runs of columns whose mask is chosen at once, with their scores and mask, [columns, out].

        A generator, since the mask of a tile depends on what the tiles before it left.
        """
        width = pattern.m if isinstance(pattern, NM) else len(slab)
        for start in range(0, len(slab), width):
            tile = slice(start, start + width)
            scores = (slab[tile] / diagonal[tile, None]).square_()
            yield tile, scores, pattern.keep(scores, 0 if isinstance(pattern, NM) else None)


def _absorb(slab: Tensor, kept: Tensor, corner: Tensor, errors: Tensor, tile: slice) -> None:
    """Zero the pruned weights of a tile, column by column, and spread each error over the columns to its right.

    Columns of one strip see each error at once; those to the right of the strip get the errors of the whole strip in one product.

    Args:
        slab: float32 [columns, out], changed in place.
        kept: bool [tile, out].
        corner: the factor's rows and columns of this slab, upper triangular.
        errors: float32 [columns, out], filled for the tile: the error of each column over its diagonal entry.
        tile: the columns to go through.
    """
    stop = min(tile.stop, len(slab))
    for first in range(tile.start, stop, _STRIP):
        last = min(first + _STRIP, stop)
        for column in range(first, last):
            stays = kept[column - tile.start]
            error = torch.mul(slab[column], ~stays, out=errors[column])
            error /= corner[column, column]
            slab[column].mul_(stays)
            slab[column + 1 : last].addr_(corner[column, column + 1 : last], error, alpha=-1)
        slab[last:].addmm_(corner[first:last, last:].T, errors[first:last], alpha=-1)
