"""Sparsity patterns: which weights stay, given their scores. Masks are made here and nowhere else.

Ties are broken in favour of the lower index, so the sparsity is exact: weights of 4-bit checkpoints often tie.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dass_exp.errors import UserError, finite_number, whole_number

# Up to this many scores, one comparison of all pairs is 2 to 3 times faster than one operation per pair.
_FEW_SCORES = 1 << 13
# Up to this group size, comparing all pairs is 3 to 8 times faster than a stable sort (CPU, float32).
_PAIRWISE_LIMIT = 16


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

    @abstractmethod
    def violations(self, mask: Tensor, dim: int | None) -> int:
        """Count the groups of ``mask`` (bool, True stays) that do not keep exactly the required number of weights."""


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
        size = scores.shape[dim]
        zeros = int(self.sparsity * size)
        if zeros == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        threshold = scores.kthvalue(zeros, dim=dim, keepdim=True).values  # the highest score that is removed
        above, ties = scores > threshold, scores == threshold
        ties_kept = size - zeros - above.sum(dim, keepdim=True)
        return above | (ties & (ties.cumsum(dim, dtype=torch.int32) <= ties_kept))

    def violations(self, mask: Tensor, dim: int | None) -> int:
        groups = mask.reshape(1, -1) if dim is None else mask.movedim(dim, -1)
        size = groups.shape[-1]
        return int((groups.sum(-1) != size - int(self.sparsity * size)).sum())


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
        if groups.numel() <= _FEW_SCORES:
            mask = self._compare_at_once(groups)
        elif self.m <= _PAIRWISE_LIMIT:
            mask = self._compare_pairs(groups)
        else:
            mask = self._sort(groups)
        return mask.movedim(0, axis + 1).flatten(axis, axis + 1)

    def _compare_at_once(self, groups: Tensor) -> Tensor:
        """Rank by one comparison of all pairs: for SparseGPT's tiles, where launching an operation costs the most."""
        lower_index = torch.ones(self.m, self.m, dtype=torch.bool, device=groups.device).triu_()
        lower_index = lower_index[..., *(None,) * (groups.ndim - 1)]
        beats = torch.where(lower_index, groups[:, None] >= groups, groups[:, None] > groups)
        return beats.sum(0) <= self.n  # a weight beats itself too

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

    def violations(self, mask: Tensor, dim: int | None) -> int:
        return int((self._group_sums(mask, dim) != self.n).sum())

    def overfull(self, weight: Tensor, dim: int | None) -> int:
        """Count the groups of ``weight`` [out, in] with more than ``n`` non-zeros; 0 for a valid N:M matrix."""
        return int((self._group_sums(weight != 0, dim) > self.n).sum())

    def underfull(self, weight: Tensor, dim: int | None) -> int:
        """Count the groups of ``weight`` [out, in] with fewer than ``n`` non-zeros: valid, but too sparse."""
        return int((self._group_sums(weight != 0, dim) < self.n).sum())

    def _group_sums(self, present: Tensor, dim: int | None) -> Tensor:
        axis = 1 if dim is None else dim
        return present.unflatten(axis, (-1, self.m)).sum(axis + 1)
