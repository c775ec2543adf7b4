"""SparseGPT (arXiv 2301.00774)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dass_exp.errors import UserError, finite_number, whole_number
from dass_exp.masks import NM, Pattern
from dass_exp.methods.base import Block, LinearView, MaskResult, Pruner, finite_range
from dass_exp.models.families import Role
from dass_exp.statistics import Gram

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
    version = 3  # 2: the factorisation does not depend on the number of threads; 3: the Hessian itself is factorised, not its inverse

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

    def prune_linear(self, linear: LinearView, block: Block, pattern: Pattern) -> MaskResult:
        del block
        gram: Gram = linear.stat
        columns = self.columns(pattern)
        tile = pattern.m if isinstance(pattern, NM) else columns
        factor = gram.factor(self.damping, tile)
        # Transposed, a column of W is a contiguous row, and the loops below read and write memory in order.
        dense = linear.weight.T.float().contiguous()
        dense[gram.dead] = 0
        pruned, lost = torch.empty_like(dense), torch.empty_like(dense)
        keep = torch.empty_like(dense, dtype=torch.bool)
        ranges: list[Tensor] = []
        for start in range(0, len(dense), columns):
            slab = slice(start, min(start + columns, len(dense)))
            torch.addmm(dense[slab], factor.feedback[:start, slab].T, lost[:start], out=pruned[slab])
            for first in range(slab.start, slab.stop, tile):
                last = min(first + tile, slab.stop)
                now = slice(first, last)
                scores = (pruned[now] * factor.diagonal[now, None]).square_()  # w^2 / U_jj^2
                ranges += torch.aminmax(scores)
                keep[now] = pattern.keep(scores, 0 if isinstance(pattern, NM) else None)
                _cut(pruned[now], keep[now], factor.feedback[now, now])
                torch.sub(dense[now], pruned[now], out=lost[now])
                pruned[last : slab.stop].addmm_(factor.feedback[now, last : slab.stop].T, lost[now])
        low, high = finite_range(torch.stack(ranges), linear.name)
        linear.write(pruned.T)
        dim = self.group(linear.role, pattern)
        return MaskResult(keep.T.contiguous(), dim, low, high, None if dim == 1 else columns, factor.retries)


def _cut(weight: Tensor, kept: Tensor, feedback: Tensor) -> None:
    """Zero the weights of a tile that do not stay, column by column, and let the columns to the right of each make up for it.

    Columns of one strip see each loss at once; those to the right of the strip see that of the whole strip in one product.

    Args:
        weight: float32 [columns, out], changed in place.
        kept: bool [columns, out].
        feedback: float32 [columns, columns], that of the tile.
    """
    lost = torch.empty_like(weight)
    rows, stays, losses, before = weight.unbind(), kept.unbind(), lost.unbind(), weight.clone().unbind()
    for first in range(0, len(rows), _STRIP):
        last = min(first + _STRIP, len(rows))
        for column in range(first, last):
            rows[column].mul_(stays[column])
            if column + 1 < len(rows):
                torch.sub(before[column], rows[column], out=losses[column])
                weight[column + 1 : last].addr_(feedback[column, column + 1 : last], losses[column])
        if last < len(rows):
            weight[last:].addmm_(feedback[first:last, last:].T, lost[first:last])
