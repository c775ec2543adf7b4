"""Callbacks of the engine's loop over blocks, and what the loop passes to them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from dass_exp.engine.capture import Batch
from dass_exp.engine.reorder import Reordered
from dass_exp.masks import Pattern
from dass_exp.methods.base import LinearView, MaskResult
from dass_exp.models.decoder import Decoder
from dass_exp.repair.base import RepairError
from dass_exp.statistics import Statistic


@dataclass(frozen=True)
class BlockSeconds:
    """Seconds spent on one block; on a GPU those of launching kernels, since nothing waits for them."""

    forward: float = 0.0  # passes through the block, without the statistics
    statistics: float = 0.0
    solve: float = 0.0  # choosing masks and solving for weights
    write: float = 0.0

    @classmethod
    def split(
        cls, passes: float, statistics: Iterable[Statistic], pruning: float, linears: Iterable[LinearView]
    ) -> BlockSeconds:
        """Split the seconds measured around passes and around pruning, using those measured inside each."""
        observing, write = sum(entry.seconds for entry in statistics), sum(linear.write_s for linear in linears)
        return cls(passes - observing, observing, pruning - write, write)


@dataclass(frozen=True)
class BlockReport:
    """One pruned block.

    Args:
        index: of the block.
        name: full module name.
        module: the block itself, still in memory.
        linears: the views that were pruned.
        results: masks and how they were chosen, by the name of the linear.
        error: relative L2 error of the block's output, pruned against dense, on the same inputs; None without
            calibration, and for the last block, which is not run again.
        seconds: seconds by purpose.
        starved: experts with too few tokens for statistics of their own.
        orders: what was put in another order, by the name of the linear.
        repaired: errors of the outputs of linears before and after their repair, by the name of the linear.
    """

    index: int
    name: str
    module: nn.Module
    linears: list[LinearView]
    results: dict[str, MaskResult]
    error: float | None
    seconds: BlockSeconds = BlockSeconds()
    starved: tuple[str, ...] = ()
    orders: dict[str, Reordered] = field(default_factory=dict)
    repaired: dict[str, RepairError] = field(default_factory=dict)


@dataclass
class LoopState:
    """The state of the engine's loop when it starts; a callback may restore that of an earlier start.

    Args:
        decoder: the model's blocks.
        batches: calibration batches in front of the first block; empty for a method that needs none.
        patterns: of each block.
        first_block: index of the block at which the loop begins.
    """

    decoder: Decoder
    batches: list[Batch]
    patterns: list[Pattern]
    first_block: int = 0


class Callback:
    """Base class: every method does nothing. The engine calls its callbacks in the order of their list."""

    def on_start(self, loop: LoopState) -> None:
        """Called before the first block."""

    def on_block_start(self, index: int) -> None:
        """Called when block ``index`` is in memory and dense."""

    def on_block_end(self, report: BlockReport) -> None:
        """Called when a block is pruned and the calibration batches have passed it; it is still in memory."""

    def on_end(self) -> None:
        """Called after the last block."""


class SeedEachBlock(Callback):
    """Seed torch before each block, so that a run that resumes draws the same numbers."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_block_start(self, index: int) -> None:
        torch.manual_seed(self._seed + 1_000_003 * index)


class ProgressBar(Callback):
    """Advance a progress bar by one step per block."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self._advance = advance

    def on_block_end(self, report: BlockReport) -> None:
        del report
        self._advance()


class Stopwatch:
    """Seconds by purpose, over all starts of a run; all time that is not measured separately counts as ``prune``.

    Args:
        device: that works; None for the current one.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._started = time.perf_counter()
        self._seconds: Counter[str] = Counter()

    @contextmanager
    def measure(self, purpose: str) -> Iterator[None]:
        """Count the time until the block exits under ``purpose``, what an accelerator still has to do included."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.add({purpose: time.perf_counter() - start, "prune": start - time.perf_counter()})

    def add(self, seconds: dict[str, float]) -> None:
        """Add seconds, such as those of an earlier start."""
        self._seconds.update(seconds)

    def read(self) -> dict[str, float]:
        """Return the seconds so far: ``prune``, and scoring of the ``dense`` and the ``pruned`` model."""
        prune = self._seconds["prune"] + time.perf_counter() - self._started
        return {"prune": prune, "dense": self._seconds["dense"], "pruned": self._seconds["pruned"]}

    def _wait(self) -> None:
        if self._device is not None and self._device.type == "cpu":
            return
        if torch.accelerator.is_available():
            torch.accelerator.synchronize(self._device)
