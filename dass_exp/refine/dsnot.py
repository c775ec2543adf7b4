"""DSnoT: dynamic sparse no training (arXiv 2310.08915)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dass_exp.errors import UserError, finite_number, whole_number
from dass_exp.masks import NM, Pattern, TransposableNM
from dass_exp.methods.base import LinearView, MaskResult
from dass_exp.refine.base import Refinement
from dass_exp.statistics import InputMoments

_TINY = 1e-30


@dataclass
class DSnoT(Refinement):
    """Swap weights of a row until the mean of its lost output is near zero (Zhang et al., arXiv 2310.08915).

    The lost output of a row is e = sum over removed j of w_j s_j, s_j the input summed over a sequence (mean over
    sequences). One swap restores the removed weight with the largest sign(e) w_j s_j / v_j**power, v_j the variance of
    the input within a sequence, and removes the kept weight with the smallest |w_j| norm(x_j) among those with
    sign(w_j s_j) = -sign(e). With N:M that weight is the smallest of the same group, of any sign, and a row ends before
    a swap that would turn the sign of e. No weight moves twice.

    All linears in the scope are refined; the authors' code leaves the MLP out by default. It also starts from a mask of
    zeros when SparseGPT goes before; here every method's own mask is the start.

    Args:
        cycles: swaps in a row at most.
        threshold: a row whose absolute error is at most this is done.
        power: of the variance.
    """

    cycles: int = 50
    threshold: float = 0.1
    power: float = 1.0
    stat = InputMoments

    def __post_init__(self) -> None:
        whole_number("refine.cycles", self.cycles, least=1)
        for name in ("threshold", "power"):
            value = finite_number(f"refine.{name}", getattr(self, name), "a number of at least 0")
            if value < 0:
                raise UserError(f"refine.{name}={value!r}: expected a number of at least 0")
            setattr(self, name, value)

    def check(self, pattern: Pattern, dim: int | None = 1) -> None:
        if isinstance(pattern, TransposableNM) or dim == 0:
            where = f"pattern {pattern.name}" if dim != 0 else "weights that compete in a column, as in dass"
            raise UserError(
                f"refine=dsnot with {where}: a swap inside a row would break the columns; choose a method and a "
                "pattern along the input axis, or refine=none"
            )

    def refine(self, linear: LinearView, dense: Tensor, result: MaskResult, pattern: Pattern) -> Tensor:
        self.check(pattern, result.dim)
        moments = linear.statistic_of(InputMoments)
        weight, keep = dense.float(), result.keep.clone()
        lost = weight * moments.sums_per_sequence
        growth = lost / moments.variance.pow(self.power).clamp_min_(_TINY)
        score = weight.abs() * moments.norm
        groups = isinstance(pattern, NM)
        width = pattern.m if isinstance(pattern, NM) else result.slab_width or weight.shape[1]
        group_of = torch.arange(weight.shape[1], device=weight.device) // width
        error, free = (lost * ~keep).sum(1), torch.ones_like(keep)
        rows = torch.arange(len(weight), device=weight.device)
        for _ in range(self.cycles):
            rows = rows[error[rows].abs() > self.threshold]
            if not len(rows):
                break
            sign, kept, movable = error[rows].sign()[:, None], keep[rows], free[rows]
            best, grown = (sign * growth[rows]).masked_fill(kept | ~movable, -torch.inf).max(1)
            eligible = kept & movable & (group_of == group_of[grown][:, None])
            if not groups:
                eligible &= lost[rows].sign() == -sign
            least, pruned = score[rows].masked_fill(~eligible, torch.inf).min(1)
            after = error[rows] + lost[rows, pruned] - lost[rows, grown]
            moves = (best > -torch.inf) & (least < torch.inf)
            if groups:
                moves &= after.sign() == sign[:, 0]
            rows, grown, pruned = rows[moves], grown[moves], pruned[moves]
            error[rows] = after[moves]
            keep[rows, grown], keep[rows, pruned] = True, False
            free[rows, grown] = free[rows, pruned] = False
        return keep
