"""Time methods and the floor side by side: in one process, one after the other, in several rounds."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dass_exp.benchmark.floor import passes
from dass_exp.engine.block_report import BlockReport
from dass_exp.engine.prune import Options, prune_model
from dass_exp.engine.verify import verify
from dass_exp.masks import NM, Pattern
from dass_exp.methods.base import Pruner
from dass_exp.models.decoder import decoder_of
from dass_exp.storage.records import PeakMemory


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Args:
        model: a transformers causal language model, on its device.
        tokens: int64 [sequences, tokens], calibration.
        pattern: the sparsity pattern.
        scope: ``mlp``, ``attention`` or ``all``.
        batch_size: sequences that pass through a block together.
    """

    model: nn.Module
    tokens: Tensor
    pattern: Pattern = field(default_factory=lambda: NM(2, 4))
    scope: str = "mlp"
    batch_size: int = 4


def seconds(task: Callable[[], Any]) -> float:
    """How long a task takes; on a GPU, with what it launched."""
    _wait()
    start = time.perf_counter()
    task()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextmanager
def dense_afterwards(model: nn.Module, scope: str) -> Iterator[None]:
    """Give the model its weights back at the end."""
    decoder = decoder_of(model)
    matrices = [site.matrix for index in range(len(decoder.blocks)) for site in decoder.sites(index, scope)]
    saved = [matrix.weight.clone() for matrix in matrices]
    try:
        yield
    finally:
        for matrix, weight in zip(matrices, saved, strict=True):
            matrix.write(weight)


def floor_seconds(work: Workload) -> float:
    """The passes that cannot be avoided (:func:`dass_exp.benchmark.floor.passes`)."""
    return seconds(lambda: passes(work.model, work.tokens, work.scope, work.batch_size))


def prune_seconds(work: Workload, method: Pruner) -> dict[str, float]:
    """Prune, verify, and put the weights back: ``total``, what the engine spent it on, ``verify``, ``rest``, and ``peak_rss_bytes``."""
    spent: Counter[str] = Counter()

    def on_block(report: BlockReport) -> None:
        start = time.perf_counter()
        verify(report, work.pattern)
        spent["verify"] += time.perf_counter() - start  # type: ignore[assignment]  # a counter adds floats as well
        spent.update(vars(report.spent))

    options = Options(work.scope, work.batch_size, on_block=on_block)
    with dense_afterwards(work.model, work.scope):
        memory = PeakMemory()
        total = seconds(
            lambda: prune_model(work.model, work.tokens if method.stat else None, method, work.pattern, options)
        )
        peak = memory.read()["peak_rss_bytes"] or 0
    return {**spent, "total": total, "rest": total - sum(spent.values()), "peak_rss_bytes": float(peak)}


def rounds(work: Workload, methods: Sequence[Pruner], repeats: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Floor and methods in turn, ``repeats`` times; medians, and the ratio of each method to the floor of its own round.

    Args:
        work: what is timed.
        methods: timed one after the other behind the floor of their round.
        repeats: rounds.
        tell: told each figure as it comes.
    """
    floors: list[float] = []
    found: dict[str, list[dict[str, float]]] = {method.name: [] for method in methods}
    for number in range(repeats):
        floors.append(floor_seconds(work))
        tell(f"round {number + 1}: floor {floors[-1]:.2f} s")
        for method in methods:
            once = prune_seconds(work, method)
            once["ratio"] = once["total"] / floors[-1]
            found[method.name].append(once)
            tell(f"round {number + 1}: {method.name} {once['total']:.2f} s, {once['ratio']:.3f} of the floor")
    return {
        "floor_s": {"median": statistics.median(floors), "runs": floors},
        "methods": {name: _medians(runs) for name, runs in found.items()},
        "ratios_to_floor": {name: statistics.median(once["ratio"] for once in runs) for name, runs in found.items()},
    }


def _medians(runs: list[dict[str, float]]) -> dict[str, Any]:
    names = ("total", "forward", "statistics", "solve", "write", "verify", "rest", "peak_rss_bytes")
    return {
        **{name: statistics.median(once.get(name, 0.0) for once in runs) for name in names},
        "runs": [once["total"] for once in runs],
    }


def masks_alone(pattern: Pattern, repeats: int) -> dict[str, float]:
    """A DaSS mask of a 4096 x 11008 matrix (the size of LLaMA-2-7B's), and two passes of 16 x 512 tokens through that matrix, in seconds."""
    generator = torch.Generator().manual_seed(0)
    weight, norm = torch.randn(11008, 4096, generator=generator), torch.rand(11008, generator=generator)
    inputs = torch.randn(8192, 4096, generator=generator)
    made = [seconds(lambda: pattern.keep(weight.abs() * norm.sqrt()[:, None], 0)) for _ in range(repeats)]
    passed = [seconds(lambda: [nn.functional.linear(part, weight) for part in inputs.split(2048)]) for _ in range(2)]
    return {
        "mask_s": statistics.median(made),
        "passes_s": sum(passed),
        "share": statistics.median(made) / (statistics.median(made) + sum(passed)),
    }
