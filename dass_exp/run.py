"""One run: load, prune, verify, evaluate, record, track."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dass_exp.bench import Bench, Observer, Shelf, Silent
from dass_exp.calibrate import BlockReport, Options, prune_model
from dass_exp.checkpoint import check_room, is_saved, save_checkpoint
from dass_exp.config import Settings
from dass_exp.evaluate.perplexity import Perplexity, perplexity
from dass_exp.evaluate.zeroshot import Options as ZeroShotOptions
from dass_exp.evaluate.zeroshot import ZeroShot, zero_shot
from dass_exp.key import key_of
from dass_exp.maskfile import PackedMask
from dass_exp.methods.dense import Dense
from dass_exp.record import PeakMemory, Record, Store
from dass_exp.summarise import Made, compose, described, manifest
from dass_exp.verify import Layer, verify


@dataclass(frozen=True)
class Outcome:
    """A record, where it lies, its dense counterpart (None for dense itself, or where nothing was scored), and whether it was there before."""

    record: Record
    path: Path
    dense: Record | None
    found: bool


def run(settings: Settings, observer: Observer | None = None, shelf: Shelf | None = None) -> Outcome:
    """Do a run, or find its record if it was done before.

    Args:
        settings: a validated run.
        observer: shown the phases.
        shelf: what the runs of this process share; a run alone needs none.

    Raises:
        UserError: a setting does not fit the model or the data; nothing was loaded or written.
        NumericalError, VerificationError: the method went wrong; a failed.json says where.
    """
    if settings.config.threads:
        torch.set_num_threads(settings.config.threads)
    return _run(settings, Bench(settings, observer or Silent(), shelf))


def _run(settings: Settings, bench: Bench) -> Outcome:
    store = Store(settings.config.results_dir)
    key = key_of(settings, bench.spec, bench.bos)
    if (outcome := _found(settings, bench, store, key)) is not None:
        return outcome
    bench.check(settings)
    with store.lock(key):
        if (outcome := _found(settings, bench, store, key)) is not None:  # another process may have done it while this one waited
            return outcome
        with store.noting_failure(key, described(settings, bench.spec)):
            dense = _dense(settings, bench)
            made, masks = _make(settings, bench, key)
            record = compose(key, settings, bench.spec, made)
            path = store.write(record, {"documents.json": made.zeroshot.documents} if made.zeroshot else {}, masks)
    settings.tracker.track(record, settings.config.results_dir)
    return Outcome(record, path, dense, found=False)


def _found(settings: Settings, bench: Bench, store: Store, key: str) -> Outcome | None:
    config = settings.config
    saved = config.save is None or is_saved(config.save, key)  # whatever else lies there must be said before anything is run
    record = None if config.rerun else store.find(key)
    if record is None or not saved or (config.save_masks and settings.method.uses and not store.masks(key).is_file()):
        return None
    return Outcome(record, store.path(key), _dense(settings, bench), found=True)


def _dense(settings: Settings, bench: Bench) -> Record | None:
    """The dense record of the same model and evaluation, made on demand."""
    evaluation = settings.config.eval
    if not settings.method.uses or (evaluation.perplexity is None and evaluation.zeroshot is None):
        return None
    config = dataclasses.replace(settings.config, rerun=False, repeat=0, save=None)
    return _run(dataclasses.replace(settings, config=config, method=Dense()), bench).record


def _make(settings: Settings, bench: Bench, key: str) -> tuple[Made, dict[str, PackedMask] | None]:
    config, memory = settings.config, PeakMemory()
    with bench.borrowed(config.scope if settings.method.uses else None) as model:
        if config.save is not None:
            check_room(config.save, model)
        size = sum(parameter.numel() for parameter in model.parameters())
        start = time.perf_counter()
        pruned = _prune(settings, bench) if settings.method.uses else _Pruned()
        prune_s = time.perf_counter() - start
        if config.save is not None:
            with bench.observer.phase(f"saving {config.save}"):
                save_checkpoint(config.save, model, bench.tokenizer, pruned.masks or {}, manifest(key, settings, bench.spec, bench.bos, pruned.layers))
        start = time.perf_counter()
        scored, tasks = _evaluate(settings, bench)
    cost = {"load_s": bench.load_s, "prune_s": prune_s, "eval_s": time.perf_counter() - start, **memory.read()}
    made = Made(
        bos=bench.bos,
        layers=pruned.layers,
        starved=pruned.starved,
        calibration=bench.calibration if settings.method.stat else None,
        windows=bench.windows,
        perplexity=scored,
        zeroshot=tasks,
        model_size=size,
        decoder_size=bench.decoder.size,
        cost={name: round(value, 3) if isinstance(value, float) else value for name, value in cost.items()},
    )
    return made, pruned.masks if config.save_masks else None


@dataclass
class _Pruned:
    layers: list[Layer] = field(default_factory=list)
    starved: list[str] = field(default_factory=list)
    masks: dict[str, PackedMask] | None = None


def _prune(settings: Settings, bench: Bench) -> _Pruned:
    config, done = settings.config, _Pruned(masks={} if settings.config.save_masks or settings.config.save is not None else None)
    with bench.observer.phase(f"pruning with {settings.method.name}", len(bench.decoder.blocks)) as step:

        def on_block(report: BlockReport) -> None:
            done.layers.extend(verify(report, settings.pattern))
            done.starved.extend(report.starved)
            if done.masks is not None:
                done.masks.update({name: PackedMask.of(cut.keep) for name, cut in report.cuts.items()})
            step()

        options = Options(config.scope, config.calibration.batch_size, bench.spec.roles, on_block, config.experts.min_tokens, config.experts.starved)
        tokens = bench.calibration.ids if settings.method.stat else None
        torch.manual_seed(config.seed)
        prune_model(bench.model, tokens, settings.method, settings.pattern, options)
    return done


def _evaluate(settings: Settings, bench: Bench) -> tuple[Perplexity | None, ZeroShot | None]:
    evaluation, model = settings.config.eval, bench.model
    scored, tasks = None, None
    if bench.windows is not None:
        with bench.observer.phase(f"perplexity of {settings.method.name}"):
            scored = perplexity(model, bench.windows.ids, evaluation.batch_size)
    if (asked := evaluation.zeroshot) is not None:
        with bench.observer.phase(f"zero-shot tasks of {settings.method.name}"):
            options = ZeroShotOptions(4 * evaluation.batch_size, bench.bos != "never")
            tasks = zero_shot(model, bench.tokenizer, asked.tasks, asked.limit, asked.data, options)
    return scored, tasks
