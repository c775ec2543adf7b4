"""Train low-rank updates that respect the masks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dass_exp.errors import finite_number, whole_number
from dass_exp.retrain.base import Retraining
from dass_exp.retrain.parts import MaskedLowRank


@dataclass
class LoRA(Retraining):
    """Train a low-rank update of each linear in the scope (LoRA, arXiv 2106.09685), masked as the weight is.

    The weight is W + mask * (alpha / rank) B A in every step, so merging it at the end costs no zero and changes no
    number, other than the usual LoRA, whose product is dense (PERP, arXiv 2312.15230, calls it MaskLoRA).

    Args:
        rank: of each update.
        alpha: scale of the update, relative to the rank.
    """

    lr: float = 1e-3
    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("retrain.rank", self.rank, least=1)
        self.alpha = finite_number("retrain.alpha", self.alpha, "a number (such as 32)")

    def part(self, start: Tensor, keep: Tensor | None, generator: torch.Generator) -> nn.Module:
        return MaskedLowRank(start, keep, self.rank, self.alpha / self.rank, generator)

    def trained_numbers(self, shape: Sequence[int]) -> int:
        *leading, rows, columns = shape
        return torch.Size(leading).numel() * self.rank * (rows + columns)
