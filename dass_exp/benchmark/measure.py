"""Time methods and the floor side by side: in one process, one after the other, in several rounds."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dass_exp.benchmark.floor import run_floor
from dass_exp.engine.callbacks import BlockReport, Callback, LoopState
from dass_exp.engine.prune import EngineOptions, prune_model
from dass_exp.engine.verify import verify
from dass_exp.masks import NM, Pattern
from dass_exp.methods.base import Pruner
from dass_exp.models.decoder import decoder_of
from dass_exp.storage.environment import PeakMemory

PARTS = ("forward", "statistics", "solve", "write", "verify", "rest")


@dataclass(frozen=True)
class PruningJob:
    """What is timed: a causal language model on its device, calibrated on int64 [sequences, tokens]."""

    model: nn.Module
    tokens: Tensor
    pattern: Pattern = field(default_factory=lambda: NM(2, 4))
    scope: str = "mlp"
    batch_size: int = 4


def time_call(function: Callable[[], Any]) -> float:
    """Seconds that a call takes, including the work it launches on a GPU."""
    _synchronize()
    start = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextmanager
def restoring_weights(model: nn.Module, scope: str) -> Iterator[None]:
    """Restore the weights in ``scope`` on exit."""
    decoder = decoder_of(model)
    matrices = [site.matrix for index in range(len(decoder.blocks)) for site in decoder.sites(index, scope)]
    weights = [matrix.weight.clone() for matrix in matrices]
    try:
        yield
    finally:
        for matrix, weight in zip(matrices, weights, strict=True):
            matrix.write(weight)


class _TimedVerification(Callback):
    """Verify each block; add up the seconds of that, and those that the engine reports."""

    def __init__(self) -> None:
        self._patterns: list[Pattern] = []
        self.seconds: Counter[str] = Counter()

    def on_start(self, loop: LoopState) -> None:
        self._patterns = loop.patterns

    def on_block_end(self, report: BlockReport) -> None:
        start = time.perf_counter()
        verify(report, self._patterns[report.index])
        self.seconds.update({"verify": time.perf_counter() - start, **vars(report.seconds)})


def time_floor(job: PruningJob) -> float:
    """Seconds of the passes that cannot be avoided (:func:`dass_exp.benchmark.floor.run_floor`)."""
    return time_call(lambda: run_floor(job.model, job.tokens, job.scope, job.batch_size))


def time_pruning(job: PruningJob, method: Pruner) -> dict[str, float]:
    """Prune and verify a model, then restore it. Returns seconds, ``total`` and by part, and ``peak_rss_bytes``."""
    options = EngineOptions(scope=job.scope, batch_size=job.batch_size)
    tokens = job.tokens if options.stages.calibrated(method) else None
    verification = _TimedVerification()
    with restoring_weights(job.model, job.scope):
        memory = PeakMemory()
        pruning = partial(prune_model, job.model, tokens, method, job.pattern, options, callbacks=[verification])
        total = time_call(pruning)
        peak = memory.read()["peak_rss_bytes"] or 0
    rest = total - sum(verification.seconds.values())
    return {**verification.seconds, "total": total, "rest": rest, "peak_rss_bytes": float(peak)}


def compare_methods(
    job: PruningJob, methods: Sequence[Pruner], repeats: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Time the floor and each method in turn: medians, and ratios of each method to the floor of its own round."""
    floors: list[float] = []
    runs: dict[str, list[dict[str, float]]] = {method.name: [] for method in methods}
    for number in range(1, repeats + 1):
        floors.append(time_floor(job))
        progress(f"round {number}: floor {floors[-1]:.2f} s")
        for method in methods:
            run = time_pruning(job, method)
            run["ratio"] = run["total"] / floors[-1]
            runs[method.name].append(run)
            progress(f"round {number}: {method.name} {run['total']:.2f} s, {run['ratio']:.3f} of the floor")
    return {
        "floor_s": {"median": statistics.median(floors), "runs": floors},
        "methods": {name: _medians(timed) for name, timed in runs.items()},
        "ratios_to_floor": {name: statistics.median(run["ratio"] for run in timed) for name, timed in runs.items()},
    }


def _medians(runs: list[dict[str, float]]) -> dict[str, Any]:
    names = ("total", *PARTS, "peak_rss_bytes")
    medians = {name: statistics.median(run.get(name, 0.0) for run in runs) for name in names}
    return {**medians, "runs": [run["total"] for run in runs]}


def time_mask(pattern: Pattern, repeats: int) -> dict[str, float]:
    """Seconds of a DaSS mask of LLaMA-2-7B's 4096 x 11008 matrix, and of two passes of 16 x 512 tokens through it."""
    generator = torch.Generator().manual_seed(0)
    weight, norm = torch.randn(11008, 4096, generator=generator), torch.rand(11008, generator=generator)
    inputs = torch.randn(8192, 4096, generator=generator)
    mask = statistics.median(
        time_call(lambda: pattern.keep(weight.abs() * norm.sqrt()[:, None], 0)) for _ in range(repeats)
    )
    passes = sum(
        time_call(lambda: [nn.functional.linear(part, weight) for part in inputs.split(2048)]) for _ in range(2)
    )
    return {"mask_s": mask, "passes_s": passes, "share": mask / (mask + passes)}
