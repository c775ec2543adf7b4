"""Modules that hold what is trained of one tensor of a model, and give the tensor when they are called."""

import math

import torch
from torch import Tensor, nn


class Values(nn.Module):
    """All values of a tensor, in float32; those outside the mask are zero whatever the optimizer does.

    Args:
        start: of the pruned model.
        keep: bool of its shape, or None to train all.
    """

    keep: Tensor | None

    def __init__(self, start: Tensor, keep: Tensor | None) -> None:
        super().__init__()
        self.values = nn.Parameter(start.detach().float().clone())
        self.register_buffer("keep", keep, persistent=False)

    def forward(self) -> Tensor:
        """Return the tensor, float32."""
        return self.values if self.keep is None else self.values * self.keep


class MaskedLowRank(nn.Module):
    """A tensor [..., rows, columns] plus a masked product of two factors, of which the second starts at zero.

    Args:
        start: of the pruned model; kept in its dtype.
        keep: bool of its shape, or None.
        rank: of the product.
        scale: of the product.
        generator: on the CPU, of the first factor: uniform as in a linear layer of ``columns`` inputs.
    """

    start: Tensor
    keep: Tensor | None

    def __init__(self, start: Tensor, keep: Tensor | None, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        *leading, rows, columns = start.shape
        bound = 1 / math.sqrt(columns)
        first = torch.empty(*leading, rank, columns).uniform_(-bound, bound, generator=generator)
        self.first = nn.Parameter(first.to(start.device))
        self.second = nn.Parameter(torch.zeros(*leading, rows, rank, device=start.device))
        self.register_buffer("start", start.detach().clone(), persistent=False)
        self.register_buffer("keep", keep, persistent=False)
        self._scale = scale

    def forward(self) -> Tensor:
        """Return the tensor, float32."""
        update = self._scale * (self.second @ self.first)
        return self.start.float() + (update if self.keep is None else update * self.keep)
