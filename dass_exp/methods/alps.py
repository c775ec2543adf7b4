"""ALPS: ADMM with an adaptive penalty, then conjugate gradients (arXiv 2406.07831)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dass_exp.errors import UserError, finite_number, whole_number
from dass_exp.masks import NM, Pattern
from dass_exp.methods.base import Block, LinearView, MaskResult, Pruner
from dass_exp.models.families import Role
from dass_exp.statistics import Gram, NormalisedGram

_CHECKED_EVERY = 3  # iterations
_SETTLED = 30  # iterations after which a support that hardly changes ends the search
_CG_TOLERANCE = 1e-4
_LARGEST_RHO = 1e6


@dataclass
class ALPS(Pruner):
    """Solve for mask and weights together by ADMM, and for the weights alone at the end (Meng et al., NeurIPS 2024).

    In coordinates where every input has norm one, B minimises the layer's squared output error plus a penalty rho that
    ties it to a sparse D. Every three iterations rho rises by 30, 20 or 10 %, the more D's support has changed the
    more; it falls to a fifth as long as the support has not begun to move. Weights compete over the whole matrix, or
    inside the groups of an N:M pattern. At last conjugate gradients fit the weights on the mask of B.

    Args:
        damping: multiple of the mean diagonal of the Gram matrix, in the target as well: it pulls towards the dense
            weights.
        rho: the first penalty.
        iterations: of ADMM at most.
        cg_steps: of conjugate gradients at most.
    """

    damping: float = 0.01
    rho: float = 0.1
    iterations: int = 300
    cg_steps: int = 10
    stat = Gram
    solver_bytes = (48, 36)  # eigenvectors by way of float64

    def __post_init__(self) -> None:
        for name, allowed in (("damping", "a number of at least 0 (the paper: 0.01)"), ("rho", "a number above 0")):
            value = finite_number(f"method.{name}", getattr(self, name), allowed)
            if value < 0 or (name == "rho" and value == 0):
                raise UserError(f"method.{name}={value!r}: expected {allowed}")
            setattr(self, name, value)
        whole_number("method.iterations", self.iterations, least=1)
        whole_number("method.cg_steps", self.cg_steps, least=0)

    def comparison_dim(self, role: Role, pattern: Pattern) -> int | None:
        del role
        return 1 if isinstance(pattern, NM) else None

    def prune_linear(self, linear: LinearView, block: Block, pattern: Pattern) -> MaskResult:
        del block
        gram: Gram = linear.stat
        normalised, dim = gram.normalised(self.damping), self.comparison_dim(linear.role, pattern)
        start = linear.weight.float() * normalised.scale
        low, high = torch.aminmax(start.abs())
        target = start @ normalised.matrix
        weight = self._admm(start, target, normalised, pattern, dim)
        keep = pattern.keep(weight.abs(), dim)
        weight = _fit(weight * keep, target, normalised.matrix, keep, self.cg_steps)
        linear.write(weight.div_(normalised.scale))
        return MaskResult(keep, dim, low, high)

    def _admm(
        self, start: Tensor, target: Tensor, normalised: NormalisedGram, pattern: Pattern, dim: int | None
    ) -> Tensor:
        """Return B [out, in] when the support of D has settled; ``start`` is the dense weight."""
        support = pattern.keep(start.abs(), dim)
        weight, sparse, dual = start, start * support, torch.zeros_like(start)
        before, kept, rho, moving = support, int(support.sum()), self.rho, False
        inverse = _inverse(normalised, rho)
        for iteration in range(1, self.iterations + 1):
            weight = (target - dual + rho * sparse) @ inverse
            proposal = weight + dual / rho
            support = pattern.keep(proposal.abs(), dim)
            sparse = proposal * support
            dual = dual + rho * (weight - sparse)
            if iteration % _CHECKED_EVERY:
                continue
            changed, before = int((support ^ before).sum()), support
            moving = moving or changed > 0.005 * kept
            if (moving and not changed) or (iteration > _SETTLED and changed < 3e-4 * kept):
                break
            if moving:
                rho *= 1.3 if changed > 0.1 * kept else 1.2 if changed > 0.005 * kept else 1.1
                rho = min(rho, _LARGEST_RHO)
            else:
                rho /= 5
                if changed:  # start again
                    before = pattern.keep(start.abs(), dim)
                    weight, sparse, dual = start, start * before, torch.zeros_like(start)
            inverse = _inverse(normalised, rho)
        return weight


def _inverse(normalised: NormalisedGram, rho: float) -> Tensor:
    values, vectors = normalised.eigen
    return (vectors / (values + rho)) @ vectors.T


def _fit(weight: Tensor, target: Tensor, gram: Tensor, keep: Tensor, steps: int) -> Tensor:
    """Minimise each row's error over the kept weights by conjugate gradients, all rows at once.

    The Gram matrix has a unit diagonal, which is what a diagonal preconditioner would make of it.
    """
    residual = (target - weight @ gram) * keep
    direction, square = residual, residual.square().sum(1, keepdim=True)
    limit = _CG_TOLERANCE**2 * target.square().sum(1, keepdim=True)
    for _ in range(steps):
        if bool((square <= limit).all()):
            break
        product = (direction @ gram) * keep
        curvature = (direction * product).sum(1, keepdim=True)
        length = torch.where(curvature > 0, square / curvature, 0)
        weight = weight + length * direction
        residual = residual - length * product
        last, square = square, residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(last > 0, square / last, 0) * direction
    return weight
