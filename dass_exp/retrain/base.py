"""The base class of retraining: what is trained, how long, and on what."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dass_exp.data.texts import Text
from dass_exp.errors import UserError, finite_number, one_of, whole_number
from dass_exp.retrain.parts import Values

LOSSES = ("next_token", "kl")


@dataclass
class Retraining:
    """Continues the training of a pruned model by AdamW, in float32, without weight decay; zeros stay zero.

    The learning rate rises over the first tenth of the steps and falls to zero along a cosine; gradients are clipped to
    a norm of 1. Dropout stays off.

    Args:
        text: to train on; consecutive windows of it, in an order drawn anew for each epoch.
        steps: of the optimizer.
        lr: the highest learning rate.
        batch_size: windows of a step.
        seq_len: tokens of a window, a beginning-of-sequence token included.
        loss: ``next_token``, or ``kl``, the divergence of the dense model's predictions from the pruned one's.
        curve: steps behind which the model is scored, beside the start and the end.
        relevance: whether the masks are chosen again, behind each step of the curve and at the end, and compared with
            those that were kept.
    """

    text: Text
    steps: int = 100
    lr: float = 3e-4
    batch_size: int = 4
    seq_len: int = 256
    loss: str = "next_token"
    curve: list[int] = field(default_factory=list)
    relevance: bool = True

    version: ClassVar[int] = 1
    active: ClassVar[bool] = True
    trains_vectors: ClassVar[bool] = False  # norms and biases, instead of matrices

    def __post_init__(self) -> None:
        if not isinstance(self.text, Text):
            raise UserError(f"retrain.text={self.text!r}: expected a text, as calibration.text has it")
        whole_number("retrain.steps", self.steps, least=0)
        whole_number("retrain.batch_size", self.batch_size, least=1)
        whole_number("retrain.seq_len", self.seq_len, least=2)
        one_of("retrain.loss", self.loss, LOSSES)
        allowed = "a number above 0 (such as 0.0001)"
        self.lr = finite_number("retrain.lr", self.lr, allowed)
        if self.lr <= 0:
            raise UserError(f"retrain.lr={self.lr!r}: expected {allowed}")
        if not isinstance(self.curve, Sequence) or isinstance(self.curve, str):
            raise UserError(f"retrain.curve={self.curve!r}: expected a list of steps, such as [10,100]")
        for step in self.curve:
            whole_number("retrain.curve", step, least=0)
        self.curve = sorted({step for step in self.curve if 0 < step < self.steps})

    @property
    def name(self) -> str:
        """The name in tables and records."""
        return type(self).__name__.lower()

    def settings(self) -> dict[str, Any]:
        """Return everything that can change a number, in canonical form."""
        own = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {**own, "text": self.text.identity}

    def part(self, start: Tensor, keep: Tensor | None, generator: torch.Generator) -> nn.Module:
        """Return a module whose call gives one trained tensor of the model, by default with all its values free.

        Args:
            start: the tensor of the pruned model.
            keep: bool of the same shape, False where it must stay zero; None for a norm or a bias.
            generator: on the CPU, for random starts.
        """
        del generator
        return Values(start, keep)

    def trained_numbers(self, shape: Sequence[int]) -> int:
        """Return how many numbers are trained for a tensor of this shape, for the plan of memory."""
        return torch.Size(shape).numel()


@dataclass
class NoRetraining(Retraining):
    """The pruned model is scored as it is."""

    text: Any = None

    active = False

    def __post_init__(self) -> None: ...

    def settings(self) -> dict[str, Any]:
        return {}
