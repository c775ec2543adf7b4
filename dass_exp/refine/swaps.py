"""Exact 1-swaps on the layer's output error (SparseSwaps, arXiv 2512.10922)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dass_exp.errors import UserError, whole_number
from dass_exp.masks import NM, Pattern, TransposableNM, remove_lowest
from dass_exp.methods.base import LinearView, MaskResult
from dass_exp.refine.base import Refinement
from dass_exp.statistics import Gram

_STRIP = 64  # columns whose changes reach the columns further right in one product
_TINY = 1e-30  # what is kept wins a tie of zeros
_TOLERANCE = 1e-5  # of the size of its terms: a smaller gain may be rounding


@dataclass
class Swaps(Refinement):
    """Exchange a kept for a removed weight of the same group as long as the layer's output error falls.

    With the removed part e of a row w, the Gram matrix G of the inputs and c = G e, the row's error is e G e^T, and to
    remove p and restore u changes it by exactly

        2 w_p c_p + w_p^2 G_pp - 2 w_u c_u + w_u^2 G_uu - 2 w_p w_u G_pu.

    - N:M along the input axis: the best pair of a group is exchanged, group after group.
    - Weights of one column compete (DaSS): every row has one of them, so the best mask of the column, all others given,
      keeps the highest costs of removal; it is a swap of as many pairs as pay.
    - Unstructured rows: the cheapest removal with its best partner. Where the whole matrix or a slab of it competes,
      partners are in the same row and slab, so each row keeps its number of weights.

    Surviving weights have their dense values here. The error never rises; that of the model may, since a lower error of
    each layer need not mean a lower perplexity.

    Args:
        sweeps: how often every group is visited at most; a sweep that changes nothing is the last one.
    """

    sweeps: int = 10
    stat = Gram
    solver_bytes = (48, 8)

    def __post_init__(self) -> None:
        whole_number("refine.sweeps", self.sweeps, least=1)

    def check(self, pattern: Pattern, dim: int | None = 1) -> None:
        del dim
        if isinstance(pattern, TransposableNM):
            raise UserError(
                f"refine=swaps with pattern {pattern.name}: a swap inside a row would break the columns; "
                "choose a pattern along one axis, or refine=none"
            )

    def refine(self, linear: LinearView, dense: Tensor, result: MaskResult, pattern: Pattern) -> Tensor:
        self.check(pattern)
        layer = _Layer(dense.float(), linear.statistic_of(Gram).matrix, result.keep.clone())
        for _ in range(self.sweeps):
            before = layer.keep.clone()
            if result.dim == 0:
                layer.sweep_columns(pattern)
            elif isinstance(pattern, NM):
                layer.sweep_groups(pattern.m)
            else:
                layer.sweep_rows(result.slab_width or dense.shape[1])
            if torch.equal(before, layer.keep):
                break
        return layer.keep


class _Layer:
    """A weight [out, in], the Gram matrix of its inputs, and a mask that is improved in place.

    ``products`` below is c = e G of every row, [out, in], for those columns that are still to be visited.
    """

    def __init__(self, weight: Tensor, gram: Tensor, keep: Tensor) -> None:
        self.weight, self.gram, self.keep = weight, gram, keep

    def sweep_groups(self, m: int) -> None:
        """Visit the N:M groups along the input axis from left to right, in all rows at once."""
        products = self._products()
        for strip in _ranges(0, len(self.gram), -(-_STRIP // m) * m):
            before = self.keep[:, strip].clone()
            for group in _ranges(strip.start, strip.stop, m):
                start = self.keep[:, group].clone()
                while self._swap_best_pairs(group, products[:, group]):
                    pass
                self._update(products, group, start, slice(group.stop, strip.stop))
            self._update(products, strip, before, slice(strip.stop, None))

    def sweep_columns(self, pattern: Pattern) -> None:
        """Give one column after the other its best mask, all others given; its weights compete with each other."""
        products, zeros = self._products(), (~self.keep).sum(0).tolist()
        for strip in _ranges(0, len(self.gram), _STRIP):
            before = self.keep[:, strip].clone()
            for column in _ranges(strip.start, strip.stop, 1):
                start, weight = self.keep[:, column].clone(), self.weight[:, column]
                alone = weight.square() * self.gram[column, column]
                cross = 2 * weight * products[:, column] - 2 * alone * ~start  # without the column's own part
                reluctance = (_TOLERANCE * (alone + cross.abs()) + _TINY) * start
                cost = alone + cross + reluctance  # of a removal
                whole = not isinstance(pattern, NM)  # the number may differ from column to column
                mask = remove_lowest(cost, zeros[column.start], 0) if whole else pattern.keep(cost, 0)
                self.keep[:, column] = mask
                self._update(products, column, start, slice(column.stop, strip.stop))
            self._update(products, strip, before, slice(strip.stop, None))

    def sweep_rows(self, width: int) -> None:
        """Exchange pairs in every row, inside slabs of ``width`` columns, while it pays."""
        products = self._products()
        for slab in _ranges(0, len(self.gram), width):
            rows = torch.arange(len(self.weight), device=self.weight.device)
            for _ in range(width):
                rows = self._swap_cheapest(rows, slab, products)
                if not len(rows):
                    break

    def _products(self) -> Tensor:
        return (self.weight * ~self.keep) @ self.gram

    def _update(self, products: Tensor, changed: slice, before: Tensor, columns: slice) -> None:
        """Add to ``products`` of some columns what the ``changed`` part of the mask, ``before`` until now, adds."""
        change = before.float() - self.keep[:, changed].float()
        products[:, columns] += (self.weight[:, changed] * change) @ self.gram[changed, columns]

    def _swap_best_pairs(self, group: slice, products: Tensor) -> bool:
        """Exchange the best pair of a group in each row where it pays, and say whether any did.

        ``products`` are those of the group, [out, m], and are kept up to date.
        """
        weight, keep, gram = self.weight[:, group], self.keep[:, group], self.gram[group, group]
        removal, growth, size = _costs(weight, products, keep, gram.diagonal())
        change = removal[:, :, None] + growth[:, None, :] - 2 * weight[:, :, None] * weight[:, None, :] * gram
        limit = -_TOLERANCE * (size[:, :, None] + size[:, None, :])
        least, pair = torch.where(change < limit, change, torch.inf).flatten(1).min(1)
        rows = (least < torch.inf).nonzero().squeeze(1)
        if not len(rows):
            return False
        pruned, grown = pair[rows] // weight.shape[1], pair[rows] % weight.shape[1]
        keep[rows, pruned], keep[rows, grown] = False, True
        products[rows] += weight[rows, pruned, None] * gram[pruned] - weight[rows, grown, None] * gram[grown]
        return True

    def _swap_cheapest(self, rows: Tensor, slab: slice, products: Tensor) -> Tensor:
        """Exchange a pair in each of these rows where it pays; return those rows. ``products`` are kept up to date."""
        weight, keep, gram = self.weight[rows, slab], self.keep[rows, slab], self.gram[slab, slab]
        removal, growth, size = _costs(weight, products[rows, slab], keep, gram.diagonal())
        pruned = removal.argmin(1, keepdim=True)
        grown = (growth - 2 * weight * weight.gather(1, pruned) * gram[pruned[:, 0]]).argmin(1, keepdim=True)
        pair = removal - 2 * weight * weight.gather(1, grown) * gram[grown[:, 0]]
        pruned = pair.argmin(1, keepdim=True)
        least = pair.gather(1, pruned) + growth.gather(1, grown)
        pays = (least < -_TOLERANCE * (size.gather(1, pruned) + size.gather(1, grown)))[:, 0]
        rows, pruned, grown = rows[pays], pruned[pays, 0] + slab.start, grown[pays, 0] + slab.start
        products[rows] += self.weight[rows, pruned, None] * self.gram[pruned]
        products[rows] -= self.weight[rows, grown, None] * self.gram[grown]
        self.keep[rows, pruned], self.keep[rows, grown] = False, True
        return rows


def _ranges(start: int, stop: int, width: int) -> list[slice]:
    return [slice(first, min(first + width, stop)) for first in range(start, stop, width)]


def _costs(weight: Tensor, products: Tensor, keep: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the change of the error when a kept weight is removed, when a removed one is restored, and their size.

    Infinite where a weight is not kept, or not removed. All are [rows, columns]; ``squares`` is the Gram's diagonal.
    """
    alone, cross = weight.square() * squares, 2 * weight * products
    removal, growth = (alone + cross).masked_fill(~keep, torch.inf), (alone - cross).masked_fill(keep, torch.inf)
    return removal, growth, alone + cross.abs()
