"""SparseGPT (arXiv 2301.00774)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dass_exp.errors import non_negative, whole_number
from dass_exp.masks import NM, Pattern
from dass_exp.methods.base import Block, LinearView, MaskResult, Pruner
from dass_exp.models.families import Role
from dass_exp.statistics import Gram

_STRIP = 16  # columns within a tile that receive each error at once


@dataclass
class SparseGPT(Pruner):
    """Prune column by column; columns further right compensate (Frantar & Alistarh, arXiv 2301.00774, algorithm 1).

    A weight's score is w^2 / U_jj^2, U the upper Cholesky factor of the inverse Hessian. Unstructured masks are chosen
    for a slab of ``blocksize`` columns at a time, where all weights compete; N:M masks are chosen tile by tile, on
    weights already updated by the columns before.

    Args:
        blocksize: columns of a slab; rounded down to a multiple of m for N:M (at least m).
        damping: added to the Hessian's diagonal, as a multiple of its mean.
    """

    blocksize: int = 128
    damping: float = 0.01
    stat = Gram
    version = 3  # 2: results independent of the number of threads; 3: factorises the Hessian instead of its inverse

    def __post_init__(self) -> None:
        whole_number("method.blocksize", self.blocksize, least=1)
        self.damping = non_negative("method.damping", self.damping, "the paper: 0.01")

    def comparison_dim(self, role: Role, pattern: Pattern) -> int | None:
        del role
        return 1 if isinstance(pattern, NM) else None

    def slab_width(self, pattern: Pattern) -> int:
        """Return the number of columns of a slab under this pattern."""
        return max(pattern.m, self.blocksize // pattern.m * pattern.m) if isinstance(pattern, NM) else self.blocksize

    def prune_linear(self, linear: LinearView, block: Block, pattern: Pattern) -> MaskResult:
        del block
        gram: Gram = linear.stat
        width = self.slab_width(pattern)
        tile_width = pattern.m if isinstance(pattern, NM) else width
        factor = gram.factor(self.damping, tile_width)
        # Transposed, a column of W is a contiguous row, so the loops below access memory in order.
        dense = linear.weight.T.float().contiguous()
        dense[gram.dead] = 0
        pruned, lost = torch.empty_like(dense), torch.empty_like(dense)
        prune_tile = _prune_tile if dense.device.type == "cpu" else _prune_tile_in_few_launches
        keep = torch.empty_like(dense, dtype=torch.bool)
        ranges: list[Tensor] = []
        of_slabs = pattern.of_slabs((dense.shape[1], len(dense)), width)
        for start, of_slab in zip(range(0, len(dense), width), of_slabs, strict=True):
            slab = slice(start, min(start + width, len(dense)))
            torch.addmm(dense[slab], factor.feedback[:start, slab].T, lost[:start], out=pruned[slab])
            scores = torch.empty_like(pruned[slab])
            for first in range(slab.start, slab.stop, tile_width):
                last = min(first + tile_width, slab.stop)
                tile = slice(first, last)
                of_tile = scores[first - start : last - start]
                torch.mul(pruned[tile], factor.diagonal[tile, None], out=of_tile).square_()  # w^2 / U_jj^2
                keep[tile] = of_slab.keep(of_tile, 0 if isinstance(pattern, NM) else None)
                prune_tile(pruned[tile], keep[tile], factor.feedback[tile, tile])
                torch.sub(dense[tile], pruned[tile], out=lost[tile])
                pruned[last : slab.stop].addmm_(factor.feedback[tile, last : slab.stop].T, lost[tile])
            ranges += torch.aminmax(scores)
        low, high = torch.aminmax(torch.stack(ranges))
        linear.write(pruned.T)
        dim = self.comparison_dim(linear.role, pattern)
        return MaskResult(keep.T.contiguous(), dim, low, high, None if dim == 1 else width, factor.retries)


def _prune_tile(weight: Tensor, keep: Tensor, feedback: Tensor) -> None:
    """Zero the removed weights of a tile column by column, and let the columns further right compensate.

    Columns in the same strip receive each error at once, those after the strip its sum in one product. ``weight`` and
    ``keep`` are [columns, out], ``feedback`` is [columns, columns]; ``weight`` is changed in place.
    """
    lost = torch.empty_like(weight)
    columns, masks, losses, dense = weight.unbind(), keep.unbind(), lost.unbind(), weight.clone().unbind()
    for first in range(0, len(columns), _STRIP):
        last = min(first + _STRIP, len(columns))
        for column in range(first, last):
            columns[column].mul_(masks[column])
            if column + 1 < len(columns):
                torch.sub(dense[column], columns[column], out=losses[column])
                weight[column + 1 : last].addr_(feedback[column, column + 1 : last], losses[column])
        if last < len(columns):
            weight[last:].addmm_(feedback[first:last, last:].T, lost[first:last])


def _prune_tile_in_few_launches(weight: Tensor, keep: Tensor, feedback: Tensor) -> None:
    """Do the same up to rounding, with one triangular solve a strip: on an accelerator each launch costs the most.

    What is lost in a strip, l = d - k (w + F^T l) with d the weights of the tile before and w those compensated for
    the strips before, solves (I + diag(k) F^T) l = d - k w for each output, whose kept weights are k.
    """
    dense = weight.clone()
    for first in range(0, len(weight), _STRIP):
        strip = slice(first, first + _STRIP)
        system = keep[strip].T[..., None] * feedback[strip, strip].T  # [out, columns, columns]; below the diagonal
        right = (dense[strip] - weight[strip] * keep[strip]).T[..., None]
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        lost = solved[..., 0].T
        torch.mul(dense[strip] - lost, keep[strip], out=weight[strip])
        if strip.stop < len(weight):
            weight[strip.stop :].addmm_(feedback[strip, strip.stop :].T, lost)
