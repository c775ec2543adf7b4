"""Train all surviving weights in the scope."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dass_exp.retrain.base import Retraining
from dass_exp.retrain.parts import Values


@dataclass
class Full(Retraining):
    """Train every surviving weight of the linears in the scope; all other parameters of the model stay as they are."""

    def part(self, start: Tensor, keep: Tensor | None, generator: torch.Generator) -> nn.Module:
        del generator
        return Values(start, keep)
