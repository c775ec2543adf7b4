"""Wanda (arXiv 2306.11695)."""

from dataclasses import dataclass

from torch import Tensor

from dass_exp.methods.base import Block, LinearView, ScorePruner
from dass_exp.statistics import InputNorm


@dataclass
class Wanda(ScorePruner):
    """Score |W| * norm(x) within each output row, x the input over all calibration tokens (Sun et al., equation 1)."""

    stat = InputNorm

    def score(self, linear: LinearView, block: Block) -> Tensor:
        del block
        return linear.weight.abs() * linear.stat.norm
