"""What the engine tells about a block as soon as it is pruned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dass_exp.methods.base import LinearView, MaskResult
from dass_exp.statistics import Statistic


@dataclass(frozen=True)
class Spent:
    """Seconds on one block: its passes without what observers took, statistics, choosing masks and solving for weights, writing them."""

    forward: float = 0.0
    statistics: float = 0.0
    solve: float = 0.0
    write: float = 0.0

    @classmethod
    def on(cls, passes: float, stats: Iterable[Statistic], pruning: float, linears: Iterable[LinearView]) -> Spent:
        """From what was measured around the passes and the pruning, and inside the statistics and the views."""
        statistics, write = sum(stat.seconds for stat in stats), sum(linear.write_s for linear in linears)
        return cls(passes - statistics, statistics, pruning - write, write)


@dataclass
class BlockReport:
    """One pruned block.

    Args:
        name: full module name.
        linears: the views that were pruned.
        cuts: what was cut, by the name of the linear.
        error: relative L2 error of the block's output, pruned against dense, on the same inputs; None without calibration, and for a block that was
            not run again.
        spent: seconds by what they were spent on; on a GPU those of launching, since nothing waits for it.
        starved: experts that saw too few tokens for statistics of their own.
    """

    name: str
    linears: list[LinearView]
    cuts: dict[str, MaskResult]
    error: float | None
    spent: Spent
    starved: tuple[str, ...] = ()
