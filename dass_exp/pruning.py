"""Prune a run's model and verify it block by block: in memory, or while its blocks are read one after the other."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from dass_exp import models
from dass_exp.bench import Bench
from dass_exp.blockreport import BlockReport
from dass_exp.calibrate import Options, prune_model
from dass_exp.capture import Batch, put
from dass_exp.checkpoint import Growing
from dass_exp.config import Settings
from dass_exp.decoder import decoder_of
from dass_exp.evaluate.alongside import Alongside
from dass_exp.evaluate.perplexity import Perplexity
from dass_exp.key import identity_of
from dass_exp.maskfile import PackedMask, read_packed, write_masks
from dass_exp.progress import Step, load_step, save_step
from dass_exp.source import Streamed
from dass_exp.verify import Layer, verify

log = logging.getLogger(__name__)

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


class _Kept:
    """The progress of a walk in a folder.

    Args:
        folder: where it is kept.
        identity: of the run.
        done: filled with what an earlier run did.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], done: Pruned) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._identity, self._done = folder, identity, done
        self._step = load_step(folder, identity)
        if self._step is not None and done.masks is not None and not all(self._masks(index).is_file() for index in range(self._step.blocks)):
            log.warning("%s: the interrupted run kept no masks, so the run begins again", folder)
            self._step = None
        self.beside: Alongside | None = None
        self._told = 0  # layers of whose masks there is a file

    @property
    def wrapped(self) -> bool | None:
        return None if self._step is None else self._step.wrapped

    @property
    def blocks(self) -> int:
        """How many blocks are done."""
        return 0 if self._step is None else self._step.blocks

    def begin(self, batches: Sequence[Batch]) -> int:
        if self._step is None:
            return 0
        if batches:
            put(batches, self._step.hidden["calibration"])
        if self.beside is not None:
            self.beside.hidden = self._step.hidden
        self._done.layers.extend(Layer(**layer) for layer in self._step.told["layers"])
        self._done.starved.extend(self._step.told["starved"])
        if self._done.masks is not None:
            for index in range(self._step.blocks):
                self._done.masks.update(read_packed(self._masks(index)))
        self._told = len(self._done.layers)
        self._step.hidden.clear()
        log.info("going on behind block %d of an interrupted run", self._step.blocks - 1)
        return self._step.blocks

    def done(self, index: int, batches: Sequence[Batch]) -> None:
        if self._done.masks is not None:
            names = {layer.name for layer in self._done.layers[self._told :]}
            write_masks({name: mask for name, mask in self._done.masks.items() if name in names}, self._masks(index))
        self._told = len(self._done.layers)
        hidden = {"calibration": torch.cat([batch.hidden for batch in batches])} if batches else {}
        hidden |= self.beside.hidden if self.beside is not None else {}
        wrapped = batches[0].wrapped if batches else self.beside.wrapped if self.beside is not None else False
        told = {"layers": [dataclasses.asdict(layer) for layer in self._done.layers], "starved": self._done.starved}
        save_step(self._folder, self._identity, Step(index + 1, wrapped, hidden, told))

    def _masks(self, index: int) -> Path:
        return self._folder / f"masks-{index:05d}.safetensors"


def walk(settings: Settings, bench: Bench, scratch: Path, growing: Growing | None) -> Walked:
    """Read the model once, block by block: prune each, score the dense and the pruned model beside it, and hand the block on.

    Args:
        settings: of the run.
        bench: its tokens and its model's name.
        scratch: a folder for the state behind each block; what an earlier run left there is gone on with.
        growing: the checkpoint that is written meanwhile, or None.

    Raises:
        UserError: a file of the model is missing or damaged, or ``scratch`` holds the state of a run with other settings.
    """
    done = Pruned(masks=_masks(settings))
    kept = _Kept(scratch, identity_of(settings, bench.spec, bench.bos), done)
    model, source = models.load_streamed(bench.spec)
    decoder, beside = decoder_of(model, bench.spec.roles), None
    if growing is not None:
        source.keep = growing.add
        growing.begin(source.layout.stored, len(decoder.blocks), kept.blocks)
    if bench.windows is not None:
        beside = kept.beside = Alongside(model, bench.windows.ids, settings.config.eval.batch_size, bench.spec.roles, kept.wrapped)
    clock, passed = _Clock(), kept.blocks
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
                chosen = _options(settings, bench, after)
                _prune(settings, bench, model, dataclasses.replace(chosen, source=source, before=before, progress=kept))
            else:
                _look(len(decoder.blocks), source, before, kept)
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


def _look(blocks: int, source: Streamed, before: Callable[[int], None], kept: _Kept) -> None:
    """Walk through the blocks of a model that is not to be pruned."""
    for index in range(kept.begin([]), blocks):
        source.open(index)
        before(index)
        source.close(index)
        kept.done(index, [])


def _options(settings: Settings, bench: Bench, on_block: Callable[[BlockReport], None]) -> Options:
    config = settings.config
    return Options(config.scope, config.calibration.batch_size, bench.spec.roles, on_block, config.experts.min_tokens, config.experts.starved)


def _prune(settings: Settings, bench: Bench, model: torch.nn.Module, options: Options) -> None:
    tokens = bench.calibration.ids if settings.method.stat else None
    torch.manual_seed(settings.config.seed)
    prune_model(model, tokens, settings.method, settings.pattern, options)


def _masks(settings: Settings) -> dict[str, PackedMask] | None:
    return {} if settings.config.save_masks or settings.config.save is not None else None
