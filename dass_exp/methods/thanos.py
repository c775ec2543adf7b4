"""Thanos: optimal updates for all removed weights of a block of columns at once (arXiv 2504.05346)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dass_exp.errors import non_negative, whole_number
from dass_exp.masks import NM, Pattern, remove_lowest
from dass_exp.methods.base import Block, LinearView, MaskResult, Pruner
from dass_exp.models.families import Role
from dass_exp.statistics import Gram, one_thread

_ROWS = 64  # solved together, to bound the memory


@dataclass
class Thanos(Pruner):
    """Prune blocks of columns from left to right; the rest of the block and all columns after it compensate.

    The paper is by Ilin and Richtarik (arXiv 2504.05346).

    The mask of a block is chosen at once, by |W| * norm(x) on the current weights: inside N:M groups, or, unstructured,
    as the block's part of the lowest scores of all columns that remain, as many as are left to remove. Then each row
    removes its weights Q of the block together, with the update that minimises the layer's error:
    w - w_Q (Hinv_QQ)^-1 Hinv_Q, where Hinv is the inverse of the damped Hessian of the remaining columns.

    Differences from the authors' code: with N:M it leaves at least one row dense and assumes 50 %; here every row has
    the pattern, any N:M is served, and no rows are set aside as outliers.

    Args:
        blocksize: columns of a block; rounded down to a multiple of m for N:M (at least m).
        damping: added to the Hessian's diagonal, as a multiple of its mean.
    """

    blocksize: int = 256
    damping: float = 0.01
    stat = Gram
    solver_bytes = (36, 24)

    def __post_init__(self) -> None:
        whole_number("method.blocksize", self.blocksize, least=1)
        self.damping = non_negative("method.damping", self.damping, "the paper: 0.01")

    def comparison_dim(self, role: Role, pattern: Pattern) -> int | None:
        del role
        return 1 if isinstance(pattern, NM) else None

    def prune_linear(self, linear: LinearView, block: Block, pattern: Pattern) -> MaskResult:
        del block
        gram: Gram = linear.stat
        factor = gram.factor(self.damping, tile=1)
        root = factor.feedback * factor.diagonal  # R, upper triangular, of the Hessian R R^T
        weight, norm, dim = linear.weight.float().clone(), linear.norm, self.comparison_dim(linear.role, pattern)
        scores = weight.abs() * norm
        low, high = torch.aminmax(scores)
        keep = pattern.keep(scores, dim)  # its number of zeros is that of the final mask
        left = int((~keep).sum())
        width = self.blocksize
        if isinstance(pattern, NM):
            width = max(pattern.m, width // pattern.m * pattern.m)
        for first in range(0, weight.shape[1], width):
            columns, rest = slice(first, first + width), slice(first + width, None)
            scores = weight[:, first:].abs() * norm[first:]
            if isinstance(pattern, NM):
                keep[:, columns] = pattern.keep(scores[:, :width], dim)
            else:
                lowest = remove_lowest(scores.reshape(1, -1), left, 1).view(scores.shape)
                keep[:, columns] = lowest[:, :width]
                left -= int((~keep[:, columns]).sum())
            removed = _removed(weight[:, columns], keep[:, columns], root[columns, columns])
            weight[:, columns] = (weight[:, columns] - removed).mul_(keep[:, columns])  # rounded once
            with one_thread(weight.device):
                spread = torch.linalg.solve_triangular(root[rest, rest], root[columns, rest], upper=True, left=False)
            weight[:, rest] += removed.float() @ spread
        linear.write(weight)
        return MaskResult(keep, dim, low, high, damping_retries=factor.retries)


def _removed(weight: Tensor, keep: Tensor, root: Tensor) -> Tensor:
    """Return what the optimal update takes from each weight of a block, float64 [out, columns].

    Args:
        weight: [out, columns], current.
        keep: its mask.
        root: R of the block, [columns, columns]: (R R^T)^-1 is the block's part of the inverse Hessian.
    """
    with one_thread(weight.device):
        identity = torch.eye(len(root), dtype=torch.float64, device=root.device)
        half = torch.linalg.solve_triangular(root.double(), identity, upper=True)
        inverse = half.T @ half
        parts = zip(weight.double().split(_ROWS), keep.split(_ROWS), strict=True)
        return torch.cat([_solve_rows(part, mask, inverse) for part, mask in parts])


def _solve_rows(weight: Tensor, keep: Tensor, inverse: Tensor) -> Tensor:
    """Solve the rows' systems of the removed weights, padded with the identity to the longest; all float64."""
    rows, columns = (~keep).nonzero(as_tuple=True)
    slots = ((~keep).cumsum(1) - 1)[rows, columns]
    longest = int((~keep).sum(1).max())
    index = torch.zeros(len(weight), longest, dtype=torch.long, device=weight.device)
    used = torch.zeros_like(index, dtype=torch.bool)
    index[rows, slots], used[rows, slots] = columns, True
    system = inverse[index[:, :, None], index[:, None, :]] * (used[:, :, None] & used[:, None, :])
    system.diagonal(dim1=1, dim2=2).add_(~used)
    right = (weight.gather(1, index) * used)[:, :, None]
    solution = torch.cholesky_solve(right, torch.linalg.cholesky(system))[:, :, 0]
    return torch.zeros_like(weight).scatter_add_(1, index, solution * used) @ inverse
