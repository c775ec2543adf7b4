"""DaSS: dependency-aware semi-structured sparsity of GLU MLPs (arXiv 2405.01943)."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dass_exp.errors import UserError, non_negative, one_of
from dass_exp.masks import Pattern
from dass_exp.methods.base import Block, LinearView, ScorePruner
from dass_exp.models.families import FC1, READER_OF, Role
from dass_exp.statistics import InputNorm


@dataclass
class Dass(ScorePruner):
    """Score gate and up by |W| * norm(y)**alpha within each input column, y the intermediate activation; rest as Wanda.

    The norm of an intermediate activation measures the importance of a whole neuron: its row of gate and up, its column
    of down (Guo et al., arXiv 2405.01943). N:M groups of gate and up lie along the output axis, so stock 2:4 kernels
    speed up down only.

    Beyond the paper: in an MLP without a GLU the first matrix is scored and grouped like gate and up, with y the input
    of the second; tables and records call this an extension. Attention linears, which the paper leaves dense, are
    scored as in Wanda: with scope=attention DaSS is Wanda.

    Args:
        alpha: exponent of the activation norm, at least 0. The paper uses 0.5 and tries 0.25, 0.5, 0.75, 1; zero is
            magnitude per column.
        granularity: ``input``, weights of one input column compete (the paper); ``output``, weights of one output row
            compete. There norm(y) is constant: row-wise magnitude for every alpha (the paper's ablation).
        input_norm: multiply the score of gate and up by norm(x), the input, as Wanda does. Not in the paper: within an
            input column it is constant, so it matters to patterns along both axes, and to the order of neurons.
    """

    alpha: float = 0.5
    granularity: str = "input"
    input_norm: bool = False
    stat = InputNorm

    def __post_init__(self) -> None:
        self.alpha = non_negative("method.alpha", self.alpha, "the paper: 0.5")
        one_of("method.granularity", self.granularity, ("input", "output"))
        if not isinstance(self.input_norm, bool):
            raise UserError(f"method.input_norm={self.input_norm!r}: expected true or false")

    def settings(self) -> dict[str, Any]:
        settings = {"granularity": self.granularity} if self.granularity == "output" else super().settings()
        settings.pop("input_norm", None)
        return settings | ({"input_norm": True} if self.input_norm else {})

    def remark(self, roles: Collection[Role]) -> str:
        if FC1 not in roles:
            return ""
        return "DaSS on an MLP without a GLU is an extension of dass_exp: the paper defines it for GLU MLPs only"

    def score(self, linear: LinearView, block: Block) -> Tensor:
        if linear.role not in READER_OF:
            return linear.weight.abs() * linear.stat.norm
        weight = linear.weight.abs() * linear.stat.norm if self.input_norm else linear.weight.abs()
        if self.granularity == "output":
            # norm(y) is one number per row: multiplying by it could change the ranking only by rounding
            return weight
        return weight * block.stat(READER_OF[linear.role]).norm.pow(self.alpha)[:, None]

    def comparison_dim(self, role: Role, pattern: Pattern) -> int | None:
        del pattern
        return 0 if role in READER_OF and self.granularity == "input" else 1
