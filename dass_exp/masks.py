"""Sparsity patterns: which weights stay, given their scores. The only place where masks are made.

Of equal scores the lower index is kept, so that the sparsity is exact: weights that come from 4-bit checkpoints tie often.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dass_exp.errors import UserError, finite_number, whole_number

_SMALL = (
    1 << 13
)  # numbers: up to this many, one comparison of all pairs is 2 to 3 times faster than a comparison per pair
_PAIRWISE_LIMIT = (
    16  # up to this group size, comparing all pairs is 3 to 8 times faster than a stable sort (CPU, float32)
)


class Pattern(ABC):
    """Data that says how many weights of a group stay. Groups lie along ``dim``, the axis along which weights compete."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The field's short name of the pattern, as tables print it: ``2:4``, ``50%``."""

    def settings(self) -> dict[str, Any]:
        """What defines the pattern, in canonical form: ``2of4`` and ``nm`` with n=2, m=4 are one."""
        return {"name": self.name, **vars(self)}

    @abstractmethod
    def keep(self, scores: Tensor, dim: int | None) -> Tensor:
        """The mask of the weights that stay.

        Args:
            scores: float [out_features, in_features]; higher is more important. No NaN.
            dim: 0, weights of one input column compete; 1, weights of one output row compete; None, all of the matrix
                (N:M patterns always compete inside their groups and take None as 1).

        Returns:
            bool, shaped as ``scores``; True means that the weight stays.

        Raises:
            UserError: the pattern does not divide the axis.
        """

    @abstractmethod
    def check(self, shape: tuple[int, int], dim: int | None) -> None:
        """Raise a UserError if a matrix of ``shape`` cannot hold this pattern along ``dim``."""

    @abstractmethod
    def violations(self, mask: Tensor, dim: int | None) -> int:
        """How many groups of ``mask`` (bool, True stays) do not hold exactly the number of weights that the pattern asks."""


@dataclass(frozen=True)
class Unstructured(Pattern):
    """A fraction of the weights of each group goes, wherever in the group they lie.

    Zeroes ``int(sparsity * group size)`` weights of each group: a row, a column, or the matrix.

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
        size = scores.shape[dim]
        cut = int(self.sparsity * size)
        if cut == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        threshold = scores.kthvalue(cut, dim=dim, keepdim=True).values  # the highest score that goes
        above, equal = scores > threshold, scores == threshold
        room = size - cut - above.sum(dim, keepdim=True)
        return above | (equal & (equal.cumsum(dim, dtype=torch.int32) <= room))

    def check(self, shape: tuple[int, int], dim: int | None) -> None:
        del shape, dim  # any shape will do

    def violations(self, mask: Tensor, dim: int | None) -> int:
        groups = mask.reshape(1, -1) if dim is None else mask.movedim(dim, -1)
        size = groups.shape[-1]
        return int((groups.sum(-1) != size - int(self.sparsity * size)).sum())


@dataclass(frozen=True)
class NM(Pattern):
    """``n`` weights stay of every ``m`` consecutive ones along the comparison axis.

    Args:
        n: weights *kept* in a group, at least 1.
        m: weights in a group; it must divide the axis.
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
        tiles = scores.unflatten(axis, (-1, self.m)).movedim(axis + 1, 0)
        kept = (
            self._at_once(tiles)
            if tiles.numel() <= _SMALL
            else self._by_pairs(tiles)
            if self.m <= _PAIRWISE_LIMIT
            else self._by_sort(tiles)
        )
        return kept.movedim(0, axis + 1).flatten(axis, axis + 1)

    def _at_once(self, tiles: Tensor) -> Tensor:
        """Rank by comparing all pairs in one operation: for the few groups of a tile of SparseGPT, where each operation costs more than its numbers."""
        first = torch.ones(self.m, self.m, dtype=torch.bool, device=tiles.device).triu_()[
            ..., *(None,) * (tiles.ndim - 1)
        ]
        beats = torch.where(first, tiles[:, None] >= tiles, tiles[:, None] > tiles)
        return beats.sum(0) <= self.n  # a weight is counted against itself too

    def _by_pairs(self, tiles: Tensor) -> Tensor:
        """Rank by comparing all pairs: exact on ties, and it reads the scores in place."""
        beaten = [torch.zeros(tiles.shape[1:], dtype=torch.uint8, device=tiles.device) for _ in range(self.m)]
        for i in range(self.m):
            for j in range(i + 1, self.m):
                first_wins = tiles[i] >= tiles[j]
                beaten[j] += first_wins
                beaten[i] += ~first_wins
        return torch.stack([times < self.n for times in beaten])

    def _by_sort(self, tiles: Tensor) -> Tensor:
        best = tiles.argsort(dim=0, descending=True, stable=True)[: self.n]
        return torch.zeros_like(tiles, dtype=torch.bool).scatter_(0, best, True)

    def check(self, shape: tuple[int, int], dim: int | None) -> None:
        axis = 1 if dim is None else dim
        if shape[axis] % self.m:
            side = ("output", "input")[axis]
            raise UserError(
                f"pattern {self.name}: m={self.m} does not divide the {side} axis of a [{shape[0]}, {shape[1]}] matrix; choose an m that divides {shape[axis]}"
            )

    def violations(self, mask: Tensor, dim: int | None) -> int:
        return int((self._counts(mask, dim) != self.n).sum())

    def overfull(self, weight: Tensor, dim: int | None) -> int:
        """How many groups of ``weight`` [out, in] hold more than ``n`` non-zeros; 0 for a legal N:M matrix."""
        return int((self._counts(weight != 0, dim) > self.n).sum())

    def underfull(self, weight: Tensor, dim: int | None) -> int:
        """How many groups of ``weight`` [out, in] hold fewer than ``n`` non-zeros; legal, but sparser than asked."""
        return int((self._counts(weight != 0, dim) < self.n).sum())

    def _counts(self, present: Tensor, dim: int | None) -> Tensor:
        axis = 1 if dim is None else dim
        return present.unflatten(axis, (-1, self.m)).sum(axis + 1)
