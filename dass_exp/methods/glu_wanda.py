"""Wanda with the sensitivity of the intermediate activation, which differs inside a row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dass_exp.methods.base import Block, LinearView, ScorePruner
from dass_exp.models.decoder import Unit
from dass_exp.models.families import FC1, GATE, READER_OF, UP, Role
from dass_exp.statistics import InputNorm, Statistic


class Sensitivity(Statistic):
    """For each weight of gate and up, the squared change of the intermediate activation that it causes.

    With x the input and z = act(gate) * up the intermediate activation at a token, neuron i moves with its gate's
    output by a_i = act'(gate_i) * up_i, and with its up's output by a_i = act(gate_i). The sum over tokens of
    x_j^2 a_i^2 is one product of squared inputs and squared sensitivities. In an MLP without a GLU a_i = act'(h_i), h
    the output of the first linear.

    Args:
        features: of the input.
        device: of the sums.
        unit: the MLP, whose dense weights are read while tokens pass.
    """

    def __init__(self, features: int, device: torch.device, unit: Unit) -> None:
        super().__init__(features, device)
        self._unit, self._activation = unit, unit.activation
        self._roles = [role for role in (GATE, UP, FC1) if role in unit.matrices]
        self.norms = InputNorm(features, device)
        self.sums = {
            role: torch.zeros(unit.matrices[role].out_features, features, dtype=torch.float32, device=device)
            for role in self._roles
        }

    @classmethod
    def of_unit(cls, features: int, device: torch.device, unit: Unit) -> "Sensitivity":
        return cls(features, device, unit)

    @property
    def norm(self) -> Tensor:
        """The L2 norm of each input feature, float32 [in_features]."""
        return self.norms.norm

    def of(self, role: Role) -> Tensor:
        """Return the root of the sum for the linear with this role, float32 [out_features, in_features]."""
        return self.sums[role].sqrt()

    def _add(self, sequence: Tensor) -> None:
        self.norms.update(sequence)
        squares = sequence.square()
        for role, sensitivity in self._sensitivities(sequence).items():
            self.sums[role].addmm_(sensitivity.square_().T, squares)

    def _sensitivities(self, sequence: Tensor) -> dict[Role, Tensor]:
        """Return a_i at each token by role, float32 [tokens, out_features]."""
        outputs = {role: self._unit.apply(role, sequence) for role in self._roles}
        found = {}
        for role in (GATE, FC1):
            if role in outputs:
                with torch.enable_grad():
                    at = outputs[role].detach().requires_grad_()
                    activated = self._activation(at)
                    (found[role],) = torch.autograd.grad(activated.sum(), at)
                if role == GATE:
                    found |= {GATE: found[GATE] * outputs[UP], UP: activated.detach()}
        return found

    def part(self, kind: type[Statistic]) -> Statistic | None:
        return self.norms if kind is InputNorm else super().part(kind)

    @classmethod
    def replaces(cls, kind: type[Statistic]) -> bool:
        return kind is InputNorm or issubclass(cls, kind)

    def totals(self) -> list[Tensor]:
        return [*self.norms.totals(), *self.sums.values()]

    def count(self, sequences: int, tokens: int) -> None:
        super().count(sequences, tokens)
        self.norms.count(sequences, tokens)

    def reset_to_uniform(self) -> None:
        self.norms.reset_to_uniform()
        for total in self.sums.values():
            total.fill_(1)

    def reorder_outputs(self, order: Tensor) -> None:
        self.sums = {role: total[order] for role, total in self.sums.items()}

    def is_finite(self) -> Tensor:
        return self.norms.is_finite()


@dataclass
class GluWanda(ScorePruner):
    """Score gate and up by |W_ij| * sqrt(sum over tokens of x_j^2 a_i^2) within each output row, the rest as Wanda.

    a_i is how much the block's intermediate activation i moves with the output i of the linear at that token
    (:class:`Sensitivity`). DaSS takes the norm of the intermediate activation for it, which is one number per row; here
    it is weighed token by token with the input, so it differs inside a row, and the groups lie along the input axis,
    where stock 2:4 kernels need them. A score of this project: no paper defines it.
    """

    stat = InputNorm
    solver_bytes = (26, 8)  # two sums of the size of gate and up, besides scores and mask

    @property
    def name(self) -> str:
        return "glu_wanda"

    def stat_of(self, role: Role) -> type[Statistic] | None:
        return Sensitivity if role in READER_OF else InputNorm

    def score(self, linear: LinearView, block: Block) -> Tensor:
        del block
        if linear.role in READER_OF:
            return linear.weight.abs() * linear.statistic_of(Sensitivity).of(linear.role)
        return linear.weight.abs() * linear.norm
