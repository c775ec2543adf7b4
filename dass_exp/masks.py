"""Sparsity patterns: which weights stay, given their scores. Masks are made here and nowhere else.

Ties are broken in favour of the lower index, so the sparsity is exact: weights of 4-bit checkpoints often tie.
"""

import functools
import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dass_exp.errors import UserError, finite_number, whole_number

# Up to this many scores, one comparison of all pairs is 2 to 3 times faster than one operation per pair.
_FEW_SCORES = 1 << 13
# On an accelerator launches cost the most, so there it is the memory of the comparisons that limits them (bytes).
_MANY_PAIRS = 1 << 30
# Groups of an unstructured pattern that are longer are sorted on CUDA.
_LONG_GROUP = 1 << 16
# Up to this group size, comparing all pairs is 3 to 8 times faster than a stable sort (CPU, float32).
_PAIRWISE_LIMIT = 16
# Up to this size, all masks of a tile that hold along both axes are compared: 90 for 2:4.
_ENUMERATED = 4
_TILES_AT_ONCE = 1 << 11  # in cache
_MANY_STEPS = 1 << 27  # of paths through tiles, m^3 a tile, on an accelerator, where launches cost the most
_SCORE_RANGE = 1 << 24  # of whole-number scores; a path of a few steps stays within 32 bits
_NO_STEP = -(1 << 29)


class Pattern(ABC):
    """Which weights of each group are kept. Groups extend along ``dim``, the axis along which weights compete.

    Everywhere below ``dim`` is 0 (weights of one input column compete), 1 (weights of one output row) or None (all
    weights of the matrix; N:M patterns take None as 1).
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The short name of the pattern: ``2:4``, ``50%``."""

    def settings(self) -> dict[str, Any]:
        """The pattern in canonical form: ``2of4`` and ``nm`` with n=2, m=4 are the same."""
        return {"name": self.name, **vars(self)}

    @abstractmethod
    def keep(self, scores: Tensor, dim: int | None) -> Tensor:
        """Return the mask, bool [out_features, in_features], True where the weight stays.

        Args:
            scores: float [out_features, in_features] without NaN; higher is more important.
            dim: the comparison axis; a UserError is raised if the pattern does not divide it.
        """

    def check(self, shape: tuple[int, int], dim: int | None) -> None:
        """Raise a UserError if a matrix of ``shape`` cannot have this pattern along ``dim``."""
        del shape, dim

    def of_slabs(self, shape: tuple[int, int], width: int) -> list["Pattern"]:
        """Return the pattern of each slab of ``width`` input columns of a matrix of ``shape``; the last may be less."""
        return [self] * -(-shape[1] // width)

    def kernel_ready(self, dim: int | None) -> bool:
        """Whether a stock 2:4 kernel can use a mask made along ``dim``: it needs groups along the input axis."""
        del dim
        return False

    @abstractmethod
    def violations(self, mask: Tensor, dim: int | None) -> Tensor:
        """Count the groups of ``mask`` (bool, True stays) that do not keep exactly the required number of weights.

        Returns:
            0-dim int64 on the mask's device, so that the host need not wait for it.
        """


def in_descending_order(scores: Tensor) -> Tensor:
    """Return the indices that sort a vector of scores from the highest to the lowest; of equal ones the lower first."""
    return scores.argsort(descending=True, stable=True)


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Remove ``int(sparsity * group size)`` weights of each group, at any position; a group is a row, column or matrix.

    Args:
        sparsity: fraction of zeros, in [0, 1).
    """

    sparsity: float = 0.5

    def __post_init__(self) -> None:
        allowed = "a number in [0, 1), the fraction of zeros (0.5 for 50 %)"
        value = finite_number("pattern.sparsity", self.sparsity, allowed)
        if not 0 <= value < 1:
            raise UserError(f"pattern.sparsity={self.sparsity!r}: expected {allowed}")
        object.__setattr__(self, "sparsity", value)

    @property
    def name(self) -> str:
        return f"{round(100 * self.sparsity, 6):g}%"

    def keep(self, scores: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return self.keep(scores.reshape(1, -1), 1).view(scores.shape)
        return remove_lowest(scores, int(self.sparsity * scores.shape[dim]), dim)

    def violations(self, mask: Tensor, dim: int | None) -> Tensor:
        groups = mask.reshape(1, -1) if dim is None else mask.movedim(dim, -1)
        size = groups.shape[-1]
        return (groups.sum(-1) != size - int(self.sparsity * size)).sum()


def remove_lowest(scores: Tensor, zeros: int, dim: int) -> Tensor:
    """Return a mask that removes the ``zeros`` lowest scores of each group along ``dim``."""
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = _kth_lowest(scores, zeros, dim)  # the highest score that is removed
    above, ties = scores > threshold, scores == threshold
    ties_kept = scores.shape[dim] - zeros - above.sum(dim, keepdim=True)
    return above | (ties & (ties.cumsum(dim, dtype=torch.int32) <= ties_kept))


def _kth_lowest(scores: Tensor, k: int, dim: int) -> Tensor:
    """Return the ``k``-th lowest score of each group along ``dim``, which stays as an axis of length 1."""
    if scores.device.type == "cuda" and scores.shape[dim] > _LONG_GROUP:  # there kthvalue works on a group in one block
        return scores.sort(dim=dim).values.narrow(dim, k - 1, 1)
    return scores.kthvalue(k, dim=dim, keepdim=True).values


@dataclass(frozen=True)
class Budget(Unstructured):
    """An unstructured pattern that removes ``int(sparsity * size)`` weights of the matrix, whatever competes.

    Rows or columns differ by one weight at most, where :class:`Unstructured` rounds each of them down. An allocation
    gives it to each block, so that their sum is the sparsity that was asked for.
    """

    def keep(self, scores: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return super().keep(scores, None)
        across, size = scores.shape[1 - dim], scores.numel()
        few, more = divmod(int(self.sparsity * size), across)  # so many groups lose one weight more
        order = self._zeros(across, size, scores.device).argsort(stable=True)  # the host needs to know none of them
        mask = torch.empty_like(scores, dtype=torch.bool)
        for count, groups in ((few, order[: across - more]), (few + 1, order[across - more :])):
            if len(groups):
                part = remove_lowest(scores.index_select(1 - dim, groups), count, dim)
                mask.index_copy_(1 - dim, groups, part)
        return mask

    def violations(self, mask: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return super().violations(mask, None)
        return ((~mask).sum(dim) != self._zeros(mask.shape[1 - dim], mask.numel(), mask.device)).sum()

    def of_slabs(self, shape: tuple[int, int], width: int) -> list[Pattern]:
        """Round the slabs so that they lose as many weights together as the matrix does in one piece."""
        rows, columns = shape
        whole, edges = int(self.sparsity * (rows * columns)), [*range(0, columns, width), columns]
        patterns: list[Pattern] = []
        for first, last in itertools.pairwise(edges):
            zeros, size = whole * last // columns - whole * first // columns, rows * (last - first)
            share = min(zeros, size - 1) / size
            patterns.append(Budget(share if int(share * size) >= min(zeros, size - 1) else math.nextafter(share, 1)))
        return patterns

    def _zeros(self, groups: int, size: int, device: torch.device) -> Tensor:
        """Return how many weights each group loses: the larger numbers are spread evenly."""
        steps = torch.arange(groups + 1, device=device) * int(self.sparsity * size) // groups
        return steps.diff()


@dataclass(frozen=True)
class NM(Pattern):
    """Keep ``n`` of every ``m`` consecutive weights along the comparison axis.

    Args:
        n: weights *kept* in a group, at least 1.
        m: weights in a group; must divide the axis.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        whole_number("pattern.n", self.n, least=1)
        whole_number("pattern.m", self.m, least=1)
        if self.n > self.m:
            raise UserError(f"pattern.n={self.n} pattern.m={self.m}: n weights are kept of m, so n may be at most m")

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}"

    def keep(self, scores: Tensor, dim: int | None) -> Tensor:
        axis = 1 if dim is None else dim
        self.check((scores.shape[0], scores.shape[1]), axis)
        groups = scores.unflatten(axis, (-1, self.m)).movedim(axis + 1, 0)  # the members of a group along axis 0
        if groups.device.type != "cpu" and self.m <= _PAIRWISE_LIMIT:
            compared = groups.numel() * (5 * self.m + 4)  # bytes: the sum first makes whole numbers of what it adds
            size = max(1, _MANY_PAIRS * groups.shape[1] // max(1, compared))
            parts = [self._compare_at_once(part) for part in groups.split(size, dim=1)]
            mask = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        elif groups.device.type == "cpu" and groups.numel() <= _FEW_SCORES:
            mask = self._compare_at_once(groups)
        elif self.m <= _PAIRWISE_LIMIT:
            mask = self._compare_pairs(groups)
        else:
            mask = self._sort(groups)
        return mask.movedim(0, axis + 1).flatten(axis, axis + 1)

    def _compare_at_once(self, groups: Tensor) -> Tensor:
        """Rank by one comparison of all pairs: where launching an operation costs the most."""
        lower_index = torch.ones(self.m, self.m, dtype=torch.bool, device=groups.device).triu_()
        lower_index = lower_index[..., *(None,) * (groups.ndim - 1)]
        beats = torch.where(lower_index, groups[:, None] >= groups, groups[:, None] > groups)
        return beats.sum(0, dtype=torch.int32) <= self.n  # a weight beats itself too

    def _compare_pairs(self, groups: Tensor) -> Tensor:
        """Rank by comparing pair after pair, without a copy of the scores."""
        losses = [torch.zeros(groups.shape[1:], dtype=torch.uint8, device=groups.device) for _ in range(self.m)]
        for i in range(self.m):
            for j in range(i + 1, self.m):
                first_wins = groups[i] >= groups[j]
                losses[j] += first_wins
                losses[i] += ~first_wins
        return torch.stack([count < self.n for count in losses])

    def _sort(self, groups: Tensor) -> Tensor:
        best = groups.argsort(dim=0, descending=True, stable=True)[: self.n]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(0, best, True)

    def check(self, shape: tuple[int, int], dim: int | None) -> None:
        axis = 1 if dim is None else dim
        if shape[axis] % self.m:
            side = ("output", "input")[axis]
            raise UserError(
                f"pattern {self.name}: m={self.m} does not divide the {side} axis of a [{shape[0]}, {shape[1]}] matrix;"
                f" choose an m that divides {shape[axis]}"
            )

    def kernel_ready(self, dim: int | None) -> bool:
        return (self.n, self.m) == (2, 4) and dim == 1

    def violations(self, mask: Tensor, dim: int | None) -> Tensor:
        return (self._group_sums(mask, dim) != self.n).sum()

    def overfull(self, weight: Tensor, dim: int | None) -> Tensor:
        """Count the groups of ``weight`` [out, in] with more than ``n`` non-zeros; 0 for a valid N:M matrix."""
        return (self._group_sums(weight != 0, dim) > self.n).sum()

    def underfull(self, weight: Tensor, dim: int | None) -> Tensor:
        """Count the groups of ``weight`` [out, in] with fewer than ``n`` non-zeros: valid, but too sparse."""
        return (self._group_sums(weight != 0, dim) < self.n).sum()

    def _group_sums(self, present: Tensor, dim: int | None) -> Tensor:
        axis = 1 if dim is None else dim
        return present.unflatten(axis, (-1, self.m)).sum(axis + 1)


@dataclass(frozen=True)
class TransposableNM(NM):
    """Keep ``n`` of every ``m`` consecutive weights along both axes: a kernel can use W and its transpose.

    Each tile of m x m weights keeps the n per row and column with the highest total score, whatever ``dim``. This is
    exact: of 4 x 4 tiles all 90 masks are compared, larger tiles are solved as a flow problem.
    """

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m} transposable"

    def keep(self, scores: Tensor, dim: int | None) -> Tensor:
        self.check((scores.shape[0], scores.shape[1]), dim)
        tiles = scores.unflatten(1, (-1, self.m)).unflatten(0, (-1, self.m)).transpose(1, 2)  # [rows, columns, m, m]
        flat = tiles.reshape(-1, self.m, self.m)
        size = _TILES_AT_ONCE if flat.device.type == "cpu" else max(1, _MANY_STEPS // self.m**3)
        if self.m <= _ENUMERATED:
            feasible = _feasible_tiles(self.n, self.m).to(flat.device)
            mask = torch.cat([_compare_tiles(part, feasible) for part in flat.split(size)])
        else:
            mask = torch.cat([_solve_tiles(part, self.n) for part in flat.split(size)])
        return mask.view(tiles.shape).transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def check(self, shape: tuple[int, int], dim: int | None) -> None:
        for axis in (0, 1):
            super().check(shape, axis)

    def kernel_ready(self, dim: int | None) -> bool:
        return (self.n, self.m) == (2, 4)

    def _group_sums(self, present: Tensor, dim: int | None) -> Tensor:
        return torch.cat([super(TransposableNM, self)._group_sums(present, axis).flatten() for axis in (0, 1)])


@functools.cache
def _feasible_tiles(n: int, m: int) -> Tensor:
    """Every m x m mask with n kept in each row and column, float32 [masks, m * m]; those of low indices first."""
    rows = [[float(column in kept) for column in range(m)] for kept in itertools.combinations(range(m), n)]
    tiles = torch.tensor(list(itertools.product(rows, repeat=m)))
    return tiles[(tiles.sum(1) == n).all(1)].flatten(1)


def _compare_tiles(scores: Tensor, masks: Tensor) -> Tensor:
    """Return the best mask of each tile, bool [tiles, m, m], by the total score of every feasible one."""
    best = (scores.float().flatten(1) @ masks.T).argmax(1)
    return masks.bool()[best].view(scores.shape)


def _solve_tiles(scores: Tensor, n: int) -> Tensor:
    """Return the best mask of each tile, bool [tiles, m, m], by successive longest paths.

    It starts from the n best of each row. While a column keeps too many, a weight moves along the best path from such a
    column to one with too few: on a step from column j to k, a row gives up its weight in j and keeps that in k. Every
    mask on the way is the best one for its column sums (Ahuja, Magnanti and Orlin, Network Flows, section 9.7).
    """
    m = scores.shape[1]
    keep = NM(n, m).keep(scores.reshape(-1, m), 1).view(scores.shape)
    # whole numbers: with rounding, a path could run in circles
    scores = scores.double() / scores.double().abs().amax((1, 2), keepdim=True).clamp_min_(1e-300)
    scores = scores.mul_(_SCORE_RANGE).round_().int()
    active = torch.arange(len(keep), device=keep.device)
    while len(active := active[(keep[active].sum(1) != n).any(1)]):
        keep[active] = _move_along_best_path(keep[active], scores[active], n)
    return keep


def _move_along_best_path(keep: Tensor, scores: Tensor, n: int) -> Tensor:
    """Return ``keep`` [tiles, m, m] after the best move from a column with more than n to one with fewer."""
    tiles, m = len(keep), keep.shape[1]
    which = torch.arange(tiles, device=keep.device)
    # gain of the best row for a step from column j to column k: [tiles, m, m]
    gains = scores[:, :, None, :] - scores[:, :, :, None]
    gains.masked_fill_(~keep[:, :, :, None] | keep[:, :, None, :], _NO_STEP)
    longest, rows = gains.max(1)
    following = torch.arange(m, device=keep.device).expand(tiles, m, m).clone()  # [j, k]: the column after j
    for middle in range(m):
        through = longest[:, :, middle, None] + longest[:, None, middle, :]
        better = through > longest
        longest = torch.where(better, through, longest)
        following = torch.where(better, following[:, :, middle, None], following)
    counts = keep.sum(1)
    closed = (counts <= n)[:, :, None] | (counts >= n)[:, None, :]
    ends = longest.masked_fill(closed, 2 * _NO_STEP).flatten(1).argmax(1)
    column, target = ends // m, ends % m
    keep = keep.clone()
    for _ in range(m):
        step = following[which, column, target]
        moving = which[column != target]
        row = rows[moving, column[moving], step[moving]]
        keep[moving, row, column[moving]] = False
        keep[moving, row, step[moving]] = True
        column = torch.where(column != target, step, column)
    return keep
