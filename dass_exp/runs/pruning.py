"""Prune a run's model and verify it block by block: in memory, or while its blocks are read one after the other."""

from __future__ import annotations

import dataclasses
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dass_exp.config.settings import Settings
from dass_exp.engine.activation_cache import Cache
from dass_exp.engine.block_report import BlockReport
from dass_exp.engine.prune import Options, prune_model
from dass_exp.engine.verify import Layer
from dass_exp.evaluate.perplexity import Perplexity
from dass_exp.evaluate.streamed import StreamedPerplexity
from dass_exp.models import load as models
from dass_exp.models.decoder import decoder_of
from dass_exp.models.save import CheckpointWriter
from dass_exp.models.streamed import StreamedBlocks
from dass_exp.runs.context import Bench
from dass_exp.runs.identity import identity_of
from dass_exp.runs.journal import Journal, Keeps
from dass_exp.storage.mask_file import PackedMask


@dataclass(frozen=True)
class Pruned:
    """What was done to a model.

    Args:
        layers: verified, one a linear.
        starved: experts that saw too few tokens.
        masks: by linear, where they are wanted; mapped from the files of the journal.
        seconds: of pruning, in all starts of the run; what scoring beside it took is not in it.
    """

    layers: list[Layer] = field(default_factory=list)
    starved: list[str] = field(default_factory=list)
    masks: dict[str, PackedMask] | None = None
    seconds: float = 0.0

    @classmethod
    def of(cls, journal: Journal) -> Pruned:
        """What a journal tells at its end."""
        return cls(journal.layers, journal.starved, journal.masks(), journal.seconds["prune"])


@dataclass(frozen=True)
class Walked:
    """What one read of a model gave.

    Args:
        pruned: what was done to it.
        dense: perplexity of the model as it was read; None where no windows are scored.
        scored: perplexity of the pruned model; None where nothing is pruned.
        seconds: of scoring the ``dense`` and the ``pruned`` model, in all starts of the run.
        size: parameters of the model.
        decoder_size: weights of all matrices in its blocks.
        model: embedding, norm and head in memory, its blocks gone.
    """

    pruned: Pruned
    dense: Perplexity | None
    scored: Perplexity | None
    seconds: dict[str, float]
    size: int
    decoder_size: int
    model: Any


def prune_in_memory(settings: Settings, bench: Bench, scratch: Path) -> Pruned:
    """Prune the model that is in memory, and leave it pruned.

    Args:
        settings: of the run.
        bench: its tokens and its model.
        scratch: a folder for what is written down on the way; what an earlier start left there is gone on with.

    Raises:
        UserError: ``scratch`` holds the state of a run with other settings.
    """
    config = settings.config
    keeps = Keeps(bool(config.checkpoint), _masks(settings), list(bench.decoder.blocks))
    journal = Journal(scratch, identity_of(settings, bench.spec, bench.bos), "resident", keeps)
    with bench.observer.phase(f"pruning with {settings.method.name}", len(bench.decoder.blocks)) as step:

        def on_block(report: BlockReport) -> None:
            journal.note(report, settings.pattern)
            step()

        _prune(
            settings,
            bench,
            bench.model,
            dataclasses.replace(_options(settings, bench, scratch), on_block=on_block, progress=journal),
        )
    return Pruned.of(journal)


def walk(settings: Settings, bench: Bench, scratch: Path, growing: CheckpointWriter | None) -> Walked:
    """Read the model once, block by block: prune each, score the dense and the pruned model beside it, and hand the block on.

    Args:
        settings: of the run.
        bench: its tokens and its model's name.
        scratch: a folder for the state behind each block; what an earlier run left there is gone on with.
        growing: the checkpoint that is written meanwhile, or None.

    Raises:
        UserError: a file of the model is missing or damaged, or ``scratch`` holds the state of a run with other settings.
    """
    model, source = models.load_streamed(bench.spec)
    decoder, beside = decoder_of(model, bench.spec.roles), None
    keeps = Keeps(settings.config.checkpoint is not False, _masks(settings))
    journal = Journal(scratch, identity_of(settings, bench.spec, bench.bos), "stream", keeps)
    options = _options(settings, bench, scratch)
    if growing is not None:
        source.keep = growing.add
        growing.begin(source.layout.stored, len(decoder.blocks), journal.blocks)
    if bench.windows is not None:
        batch_size = settings.config.eval.batch_size
        beside = journal.beside = StreamedPerplexity(
            model, bench.windows.ids, batch_size, bench.spec.roles, journal.returns_tuple, options.cache
        )
    passed = journal.blocks
    try:
        with bench.observer.phase(
            f"reading, pruning with {settings.method.name} and scoring block by block", len(decoder.blocks)
        ) as step:

            def before(index: int) -> None:
                options.before(index)
                if beside is not None:
                    with journal.scoring("dense"):
                        beside.before(index)

            def after(report: BlockReport) -> None:
                nonlocal passed
                journal.note(report, settings.pattern)
                if beside is not None:
                    with journal.scoring("pruned"):
                        beside.after(passed)
                passed += 1
                step()

            if settings.method.uses:
                _prune(
                    settings,
                    bench,
                    model,
                    dataclasses.replace(options, on_block=after, source=source, before=before, progress=journal),
                )
            else:
                _look(len(decoder.blocks), source, before, journal)
    finally:
        source.stop()
    pruned, dense, scored = Pruned.of(journal), None, None
    if beside is not None:
        with journal.scoring("dense"):
            dense = beside.dense()
        with journal.scoring("pruned"):
            scored = beside.pruned() if settings.method.uses else None
    return Walked(
        pruned,
        dense,
        scored,
        journal.seconds,
        sum(parameter.numel() for parameter in model.parameters()),
        decoder.size,
        model,
    )


def _look(blocks: int, source: StreamedBlocks, before: Callable[[int], None], journal: Journal) -> None:
    """Walk through the blocks of a model that is not to be pruned."""
    for index in range(journal.begin([]), blocks):
        source.open(index)
        before(index)
        source.close(index)
        journal.done(index, [])


def _options(settings: Settings, bench: Bench, scratch: Path) -> Options:
    config = settings.config
    for place in scratch.glob("activations-*"):
        shutil.rmtree(place, ignore_errors=True)  # of an earlier start
    place = (
        scratch / f"activations-{uuid.uuid4().hex}"
    )  # of this one alone: what an earlier one still holds removes its own files only

    def before(index: int) -> None:
        torch.manual_seed(config.seed + 1_000_003 * index)  # each block draws for itself, wherever a run goes on

    return Options(
        config.scope,
        config.calibration.batch_size,
        bench.spec.roles,
        min_tokens=config.experts.min_tokens,
        starved=config.experts.starved,
        before=before,
        cache=Cache(config.calibration.cache, place),
    )


def _prune(settings: Settings, bench: Bench, model: torch.nn.Module, options: Options) -> None:
    prune_model(
        model, bench.calibration.ids if settings.method.stat else None, settings.method, settings.pattern, options
    )


def _masks(settings: Settings) -> bool:
    return settings.method.uses != frozenset() and (settings.config.save_masks or settings.config.save is not None)
