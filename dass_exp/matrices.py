"""One weight matrix as methods see it, wherever the model keeps it: a linear's own, transposed, some rows of a fused one, or one expert's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Matrix:
    """A weight [out_features, in_features] inside a module.

    Args:
        module: what is called with the matrix's input.
        parameter: the tensor that holds it, of one linear or of several.
        expert: its place along the first of three dimensions, None for a tensor of two.
        transposed: the tensor is [in_features, out_features] (GPT-2's Conv1D).
        rows: the output features of a fused linear that are its own, None for all.
    """

    module: nn.Module
    parameter: Tensor
    expert: int | None = None
    transposed: bool = False
    rows: slice | Sequence[int] | None = None

    @classmethod
    def of(cls, linear: nn.Linear) -> Matrix:
        """The whole weight of a linear."""
        return cls(linear, linear.weight)

    @property
    def in_features(self) -> int:
        """Columns."""
        return self.parameter.shape[-2 if self.transposed else -1]

    @property
    def out_features(self) -> int:
        """Rows."""
        whole = self.parameter.shape[-1 if self.transposed else -2]
        return whole if self.rows is None else len(range(whole)[self.rows]) if isinstance(self.rows, slice) else len(self.rows)

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], in the model's dtype; not to be changed in place: it may be a copy."""
        whole = self._whole()
        return whole if self.rows is None else whole[self._index()]

    def zero(self, keep: Tensor) -> None:
        """Set the weights to zero where ``keep`` (bool [out, in]) is False; the others stay as they are, bit for bit."""
        if self.rows is None or isinstance(self.rows, slice):
            self.weight.masked_fill_(~keep, 0)
        else:
            self.write(self.weight.masked_fill(~keep, 0))

    def write(self, weight: Tensor) -> None:
        """Replace the matrix by ``weight`` [out, in], rounded to the model's dtype."""
        whole = self._whole()
        if self.rows is None:
            whole.copy_(weight)
        else:
            whole[self._index()] = weight.to(whole.dtype)

    def _whole(self) -> Tensor:
        tensor = self.parameter.detach()  # shares the model's memory
        tensor = tensor if self.expert is None else tensor[self.expert]
        return tensor.T if self.transposed else tensor

    def _index(self) -> slice | Tensor:
        return self.rows if isinstance(self.rows, slice) else torch.tensor(self.rows, device=self.parameter.device)
