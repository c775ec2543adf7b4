"""Least squares on the support of a mask, by preconditioned conjugate gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dass_exp.errors import non_negative, one_of, whole_number
from dass_exp.methods.base import LinearView
from dass_exp.models.families import READERS, Role
from dass_exp.repair.base import PrunedBlock, Regression, Repair, RepairError
from dass_exp.statistics import Gram, InputNorm, Statistic

_SOLVED = 1e-12  # of the first squared residual: what float32 can resolve


@dataclass
class LeastSquares(Repair):
    """Minimise the squared error of each linear's output over its surviving weights.

    Every output row is a least-squares problem on the support of its mask, with the Gram matrix of the inputs; all rows
    take the same number of conjugate-gradient steps at once (preconditioned by the diagonal), as ALPS does on its final
    support (arXiv 2406.07831, section 3.2). The damping is a ridge around the dense weights, not around zero. A row
    whose error would grow keeps the weights that the method has left.

    Args:
        steps: conjugate-gradient steps, at least 1.
        damping: of the Gram matrix, as a multiple of its mean diagonal.
        inputs: of o, down and the second linear of a plain MLP, which read what other pruned linears have computed:
            ``pruned``, they are repaired last, on what reaches them now, towards what they gave in the dense block;
            ``dense``, on the inputs that they had in the dense block.
    """

    steps: int = 5
    damping: float = 0.01
    inputs: str = "pruned"
    stat = Gram
    solver_bytes = (36, 12)

    def __post_init__(self) -> None:
        whole_number("repair.steps", self.steps, least=1)
        self.damping = non_negative("repair.damping", self.damping, "such as 0.01")
        one_of("repair.inputs", self.inputs, ("pruned", "dense"))

    @property
    def follows_inputs(self) -> bool:
        return self.inputs == "pruned"

    def stat_of(self, role: Role) -> type[Statistic] | None:
        return InputNorm if self.follows_inputs and role in READERS else Gram

    def repair(self, block: PrunedBlock) -> dict[str, RepairError]:
        return {linear.name: self._repair(linear, block) for linear in block.linears}

    @property
    def name(self) -> str:
        return "least_squares"

    def _repair(self, linear: LinearView, block: PrunedBlock) -> RepairError:
        dense, keep, problem = block.dense(linear).float(), block.keep(linear), block.regression(linear)
        before = linear.weight.float()
        product = before @ problem.gram
        error_before = problem.squared_error(before, product)
        solved, product = solve(problem, dense, before, product, keep, self.steps, self.damping)
        solved = solved.to(linear.weight.dtype)
        error_after = problem.squared_error(solved, product if solved.dtype == torch.float32 else None)
        worse = ~(error_after <= error_before)  # NaN counts as worse
        linear.write(torch.where(worse[:, None], before.to(solved.dtype), solved))
        return RepairError(
            problem.relative(error_before), problem.relative(torch.where(worse, error_before, error_after))
        )


def solve(
    problem: Regression, dense: Tensor, start: Tensor, product: Tensor, keep: Tensor, steps: int, damping: float
) -> tuple[Tensor, Tensor]:
    """Take conjugate-gradient steps on each row of ``start`` [out, in] towards its damped least-squares solution.

    Args:
        problem: the regression.
        dense: the weights that the damping pulls to, float32 [out, in].
        start: float32 [out, in], zero outside ``keep``.
        product: start @ gram.
        keep: bool [out, in], the support.
        steps: how many.
        damping: multiple of the Gram matrix's mean diagonal.

    Returns:
        the weights, and their product with the Gram matrix, right on the support.
    """
    ridge = damping * problem.gram.diagonal().mean()
    diagonal = problem.gram.diagonal() + ridge
    mask = keep.float()
    scale = mask / diagonal.clamp_min(torch.finfo(torch.float32).tiny)  # preconditioner and support at once

    weight = start.clone()
    residual = problem.cross.addcmul(dense - weight, ridge.expand_as(dense)).sub_(product).mul_(mask)
    preconditioned = residual * scale
    direction = preconditioned.clone()
    energy = (residual * preconditioned).sum(1, keepdim=True)
    solved = _SOLVED * energy
    for _ in range(steps):
        image = torch.addcmul(direction @ problem.gram, direction, ridge.expand_as(direction)).mul_(mask)
        curvature = (direction * image).sum(1, keepdim=True)
        moves = (energy > solved) & (curvature > 0)  # a row that is solved stands still
        length = torch.where(moves, energy / curvature, 0.0)
        weight.addcmul_(direction, length)
        residual.addcmul_(image, length, value=-1)
        torch.mul(residual, scale, out=preconditioned)
        following = (residual * preconditioned).sum(1, keepdim=True)
        direction.mul_(torch.where(moves, following / energy, 0.0)).add_(preconditioned)
        energy = following
    return weight, problem.cross.addcmul(dense - weight, ridge.expand_as(dense)).sub_(residual)
