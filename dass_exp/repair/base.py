"""The base class of repairs, and what they need to know of a pruned block."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from dass_exp.methods.base import LinearView, Stage
from dass_exp.models.decoder import Unit


class RepairError(NamedTuple):
    """The relative L2 error of an output against the dense one, over the calibration tokens, before and after."""

    before: float
    after: float


@dataclass(frozen=True)
class Regression:
    """The least-squares problem of one linear: weights V that minimise the squared error of X V^T against Y.

    Args:
        gram: X^T X of the inputs, float32 [in, in].
        cross: Y^T X, float32 [out, in]; Y are the outputs of the dense linear, without bias.
        energy: sum of Y^2 by output feature, float32 [out].
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor

    @classmethod
    def on_same_inputs(cls, gram: Tensor, dense: Tensor) -> "Regression":
        """Return the problem where the dense outputs were computed from the same inputs: Y = X W^T."""
        cross = dense.float() @ gram
        return cls(gram, cross, (cross * dense.float()).sum(1))

    def squared_error(self, weight: Tensor, product: Tensor | None = None) -> Tensor:
        """Return the squared error of each output feature under ``weight`` [out, in], float32 [out].

        ``product``, weight @ gram, saves computing it; it may be anything where the weight is zero.
        """
        weight = weight.float()
        product = weight @ self.gram if product is None else product
        return ((product - 2 * self.cross) * weight).sum(1) + self.energy

    def relative(self, squared_error: Tensor) -> float:
        """Return a squared error [out] as the relative L2 error of the whole output."""
        total, energy = squared_error.double().clamp_min(0).sum(), self.energy.double().sum()
        return float((total / energy).sqrt()) if energy > 0 else 0.0


class PrunedBlock(Protocol):
    """A pruned decoder block, with what is known of it while it was dense."""

    @property
    def linears(self) -> list[LinearView]:
        """The pruned linears, in the order in which the block computes them."""

    @property
    def units(self) -> Mapping[str, Unit]:
        """The MLPs of the block, one or those of its experts, by name."""

    def mlp_tokens(self, unit: str) -> list[tuple[Tensor, Tensor]]:
        """Return the inputs of an MLP and what its dense weights give for them, without the bias of its last linear.

        One pair for each calibration sequence, [tokens, features] each; empty for a unit without an MLP.
        """

    def dense(self, linear: LinearView) -> Tensor:
        """Return the weight before pruning, [out, in], in the model's dtype."""

    def keep(self, linear: LinearView) -> Tensor:
        """Return the mask, bool [out, in]."""

    def regression(self, linear: LinearView) -> Regression:
        """Return the problem of a linear on the inputs that reach it now, in the block as it is pruned and repaired.

        For linears that read what no other pruned linear of the block has computed these are the dense block's inputs.
        """


class Repair(Stage, ABC):
    """Changes the weights that a method has left, to make up for those that it has removed."""

    @property
    def follows_inputs(self) -> bool:
        """Whether the regressions of linears behind other pruned linears are needed on the inputs they get now."""
        return False

    @property
    def needs_mlp_tokens(self) -> bool:
        """Whether the inputs and outputs of the dense MLPs have to be kept until the block is done."""
        return False

    @abstractmethod
    def repair(self, block: PrunedBlock) -> dict[str, RepairError]:
        """Write new surviving weights; zeros stay zero. Return errors by the name of the linear."""


@dataclass
class NoRepair(Repair):
    """The surviving weights stay as the method has left them."""

    active = False

    def repair(self, block: PrunedBlock) -> dict[str, RepairError]:
        del block
        return {}
