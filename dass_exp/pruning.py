"""Prune a run's model and verify it block by block: in memory, or while its blocks are read one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from dass_exp import models
from dass_exp.bench import Bench
from dass_exp.calibrate import BlockReport, Options, prune_model
from dass_exp.checkpoint import Growing
from dass_exp.config import Settings
from dass_exp.decoder import decoder_of
from dass_exp.evaluate.alongside import Alongside
from dass_exp.evaluate.perplexity import Perplexity
from dass_exp.maskfile import PackedMask
from dass_exp.source import Streamed
from dass_exp.verify import Layer, verify

Result = TypeVar("Result")


@dataclass
class Pruned:
    """What was done to a model.

    Args:
        layers: verified, one a linear.
        starved: experts that saw too few tokens.
        masks: by linear, where they are wanted.
        seconds: of pruning; what scoring beside it took is not in it.
    """

    layers: list[Layer] = field(default_factory=list)
    starved: list[str] = field(default_factory=list)
    masks: dict[str, PackedMask] | None = None
    seconds: float = 0.0

    def note(self, report: BlockReport, settings: Settings) -> None:
        """Verify a block and keep what is asked for."""
        self.layers.extend(verify(report, settings.pattern))
        self.starved.extend(report.starved)
        if self.masks is not None:
            self.masks.update({name: PackedMask.of(cut.keep) for name, cut in report.cuts.items()})


@dataclass
class Walked:
    """What one read of a model gave.

    Args:
        pruned: what was done to it.
        dense: perplexity of the model as it was read; None where no windows are scored.
        scored: perplexity of the pruned model.
        scoring_s: seconds of scoring both.
        size: parameters of the model.
        decoder_size: weights of all matrices in its blocks.
        model: embedding, norm and head in memory, its blocks gone.
    """

    pruned: Pruned
    dense: Perplexity | None
    scored: Perplexity | None
    scoring_s: float
    size: int
    decoder_size: int
    model: Any


def prune_in_memory(settings: Settings, bench: Bench) -> Pruned:
    """Prune the model that is in memory, and leave it pruned."""
    done = Pruned(masks=_masks(settings))
    start = time.perf_counter()
    with bench.observer.phase(f"pruning with {settings.method.name}", len(bench.decoder.blocks)) as step:

        def on_block(report: BlockReport) -> None:
            done.note(report, settings)
            step()

        _prune(settings, bench, bench.model, _options(settings, bench, on_block))
    done.seconds = time.perf_counter() - start
    return done


def walk(settings: Settings, bench: Bench, growing: Growing | None) -> Walked:
    """Read the model once, block by block: prune each, score the dense and the pruned model beside it, and hand the block on.

    Args:
        settings: of the run.
        bench: its tokens and its model's name.
        growing: the checkpoint that is written meanwhile, or None.
    """
    model, source = models.load_streamed(bench.spec)
    decoder = decoder_of(model, bench.spec.roles)
    if growing is not None:
        source.keep = growing.add
        growing.begin(source.stored, len(decoder.blocks))
    done, beside = Pruned(masks=_masks(settings)), None
    if bench.windows is not None:
        beside = Alongside(model, bench.windows.ids, settings.config.eval.batch_size, bench.spec.roles)
    clock, passed = _Clock(), 0
    try:
        with bench.observer.phase(f"reading, pruning with {settings.method.name} and scoring block by block", len(decoder.blocks)) as step:

            def before(index: int) -> None:
                if beside is not None:
                    clock.time(lambda: beside.before(index))

            def after(report: BlockReport) -> None:
                nonlocal passed
                done.note(report, settings)
                if beside is not None:
                    clock.time(lambda: beside.after(passed))
                passed += 1
                step()

            start = time.perf_counter()
            if settings.method.uses:
                _prune(settings, bench, model, _options(settings, bench, after, source, before))
            else:
                _look(len(decoder.blocks), source, before, step)
            done.seconds = time.perf_counter() - start - clock.seconds
    finally:
        source.stop()
    dense = scored = None
    if beside is not None:
        dense = clock.time(beside.dense)
        scored = clock.time(beside.pruned) if settings.method.uses else dense
    return Walked(done, dense, scored, clock.seconds, sum(parameter.numel() for parameter in model.parameters()), decoder.size, model)


class _Clock:
    """Adds up the seconds of what it times."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def time(self, task: Callable[[], Result]) -> Result:
        start = time.perf_counter()
        found = task()
        self.seconds += time.perf_counter() - start
        return found


def _look(blocks: int, source: Streamed, before: Callable[[int], None], step: Callable[[], None]) -> None:
    """Walk through the blocks of a model that is not to be pruned."""
    for index in range(blocks):
        source.open(index)
        before(index)
        source.close(index)
        step()


def _options(
    settings: Settings, bench: Bench, on_block: Callable[[BlockReport], None], source: Streamed | None = None, before: Callable[[int], None] | None = None
) -> Options:
    config = settings.config
    chosen = Options(config.scope, config.calibration.batch_size, bench.spec.roles, on_block, config.experts.min_tokens, config.experts.starved)
    if source is None or before is None:
        return chosen
    return Options(**{**vars(chosen), "source": source, "before": before})


def _prune(settings: Settings, bench: Bench, model: torch.nn.Module, options: Options) -> None:
    tokens = bench.calibration.ids if settings.method.stat else None
    torch.manual_seed(settings.config.seed)
    prune_model(model, tokens, settings.method, settings.pattern, options)


def _masks(settings: Settings) -> dict[str, PackedMask] | None:
    return {} if settings.config.save_masks or settings.config.save is not None else None
