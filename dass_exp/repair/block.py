"""Reconstruct the output of an MLP by gradient steps on its surviving weights."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from dass_exp.errors import NumericalError, UserError, finite_number, whole_number
from dass_exp.methods.base import LinearView
from dass_exp.models.decoder import Unit
from dass_exp.models.families import DOWN, FC1, FC2, GATE, UP, Role
from dass_exp.repair.base import PrunedBlock, RepairError
from dass_exp.repair.least_squares import LeastSquares


@dataclass
class MlpReconstruction(LeastSquares):
    """Least squares first, then Adam on the squared error of the MLP's output, gate, up and down together.

    The inputs are those that reach the MLP behind the pruned blocks before it, the targets what its dense weights give
    for them, as in EBFT (arXiv 2402.12419) and in block reconstruction (arXiv 2510.14444, whose best variant takes
    attention and MLP apart). Each step sees one sequence, in the order of the calibration set; the learning rate falls
    to zero along a cosine. Weights are updated in float32. If the error did not fall, the weights of the least squares
    stay. Attention linears in the scope are repaired by least squares only.

    Args:
        epochs: passes over the calibration sequences.
        lr: of Adam, relative to the root mean square of the surviving weights of each linear.
    """

    epochs: int = 3
    lr: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("repair.epochs", self.epochs, least=1)
        allowed = "a number above 0 (such as 0.02)"
        value = finite_number("repair.lr", self.lr, allowed)
        if value <= 0:
            raise UserError(f"repair.lr={self.lr!r}: expected {allowed}")
        self.lr = value

    @property
    def name(self) -> str:
        return "block"

    @property
    def needs_mlp_tokens(self) -> bool:
        return True

    def repair(self, block: PrunedBlock) -> dict[str, RepairError]:
        errors = super().repair(block)
        for name, unit in block.units.items():
            views = {linear.role: linear for linear in block.linears if linear.unit == name}
            if not (tokens := block.mlp_tokens(name)):
                continue
            last = views.get(DOWN) or views[FC2]
            after = self._reconstruct(unit, views, block, tokens)
            errors[last.name] = errors[last.name]._replace(after=after)
        return errors

    def _reconstruct(
        self, unit: Unit, views: Mapping[Role, LinearView], block: PrunedBlock, tokens: list[tuple[Tensor, Tensor]]
    ) -> float:
        """Train the surviving weights of one MLP, and return the relative L2 error of its output afterwards."""
        mlp = {role: view for role, view in views.items() if role in (GATE, UP, DOWN, FC1, FC2)}
        keep = {role: block.keep(view) for role, view in mlp.items()}
        start = {role: view.weight.float().clone() for role, view in mlp.items()}
        weights = {role: weight.clone().requires_grad_() for role, weight in start.items()}
        groups = [{"params": [weight], "lr": self.lr * _scale(weight, keep[role])} for role, weight in weights.items()]
        optimizer = torch.optim.Adam(groups, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * len(tokens))
        before = _relative_error(unit, start, tokens)
        for inputs, target in tokens * self.epochs:
            with torch.enable_grad():
                _loss(unit, weights, inputs, target).backward()
            for role, weight in weights.items():
                if weight.grad is not None:
                    weight.grad *= keep[role]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        rounded = {role: weight.detach().to(mlp[role].weight.dtype).float() for role, weight in weights.items()}
        after = _relative_error(unit, rounded, tokens)
        if not after < before:
            return before
        for role, view in mlp.items():
            view.write(rounded[role])
        return after


def _scale(weight: Tensor, keep: Tensor) -> float:
    size = keep.sum().clamp_min(1)
    return float((weight.detach().square().sum() / size).sqrt())


def _loss(unit: Unit, weights: Mapping[Role, Tensor], inputs: Tensor, target: Tensor) -> Tensor:
    """Return the squared error over the mean square of the target.

    Without a unit, since Adam's epsilon is absolute and the MLPs of the first blocks give small outputs.
    """
    unit_square = target.float().square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return mse_loss(unit.mlp(inputs.float(), weights), target.float(), reduction="sum") / unit_square


def _relative_error(unit: Unit, weights: Mapping[Role, Tensor], tokens: list[tuple[Tensor, Tensor]]) -> float:
    sums = [torch.zeros(2, dtype=torch.float64, device=tokens[0][0].device)]
    for inputs, target in tokens:
        wrong = (unit.mlp(inputs.float(), weights) - target.float()).square().sum()
        sums.append(sums[-1] + torch.stack([wrong, target.float().square().sum()]))
    off, total = sums[-1].tolist()  # the host of an accelerator waits once
    if not off < float("inf"):
        raise NumericalError("the output of an MLP in reconstruction holds numbers that are not finite")
    return (off / total) ** 0.5 if total else 0.0
