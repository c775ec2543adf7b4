"""One run: load, prune, verify, evaluate, record, track."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dass_exp import models
from dass_exp.bench import Bench, Observer, Shelf, Silent
from dass_exp.checkpoint import Growing, check_room, is_saved, save_checkpoint, scratch_of, writing
from dass_exp.config import Settings
from dass_exp.evaluate.perplexity import Perplexity, perplexity
from dass_exp.evaluate.zeroshot import Options as ZeroShotOptions
from dass_exp.evaluate.zeroshot import ZeroShot, zero_shot
from dass_exp.key import identity_of, key_of
from dass_exp.maskfile import PackedMask
from dass_exp.methods.dense import Dense
from dass_exp.progress import discard, is_of
from dass_exp.pruning import Pruned, prune_in_memory, walk
from dass_exp.record import PeakMemory, Record, Store
from dass_exp.summarise import Made, compose, described, manifest

log = logging.getLogger(__name__)


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
    bench = Bench(settings, observer or Silent(), shelf)
    whole = None if settings.config.rerun else Store(settings.config.results_dir).find(key_of(settings, bench.spec, bench.bos))
    if settings.config.eval.zeroshot is not None and whole is None and bench.streams:
        log.warning("the model is read block by block, so zero-shot tasks are left out; save=FOLDER keeps it, to be scored where it fits in memory")
        without = dataclasses.replace(settings.config, eval=dataclasses.replace(settings.config.eval, zeroshot=None))
        settings = bench.settings = dataclasses.replace(settings, config=without)
    return _run(settings, bench)


def _run(settings: Settings, bench: Bench) -> Outcome:
    store = Store(settings.config.results_dir)
    key = key_of(settings, bench.spec, bench.bos)
    if (outcome := _found(settings, bench, store, key)) is not None:
        if is_of(scratch := _scratch(settings, key), identity_of(settings, bench.spec, bench.bos)):
            discard(scratch)  # of a run that was killed when all was done
        return outcome
    bench.check(settings)
    with store.lock(key):
        if (outcome := _found(settings, bench, store, key)) is not None:  # another process may have done it while this one waited
            return outcome
        with store.noting_failure(key, described(settings, bench.spec)), writing(settings.config.save):
            dense = None if bench.streams else _dense(settings, bench)
            done = _walk(settings, bench, key) if bench.streams else _make(settings, bench, key)
            record = compose(key, settings, bench.spec, done.made)
            path = store.write(record, {"documents.json": done.made.zeroshot.documents} if done.made.zeroshot else {}, done.masks)
        if done.scratch is not None:
            discard(done.scratch)
    if done.beside is not None:
        dense = _dense(settings, bench, done.beside)
    settings.tracker.track(record, settings.config.results_dir)
    return Outcome(record, path, dense, found=False)


def _found(settings: Settings, bench: Bench, store: Store, key: str) -> Outcome | None:
    config = settings.config
    saved = config.save is None or is_saved(config.save, key)  # whatever else lies there must be said before anything is run
    record = None if config.rerun else store.find(key)
    if record is None or not saved or (config.save_masks and settings.method.uses and not store.masks(key).is_file()):
        return None
    return Outcome(record, store.path(key), _dense(settings, bench), found=True)


def _dense(settings: Settings, bench: Bench, beside: Made | None = None) -> Record | None:
    """The dense record of the same model and evaluation: found, written from what was scored beside a pruned model, or made on demand."""
    evaluation = settings.config.eval
    if not settings.method.uses or (evaluation.perplexity is None and evaluation.zeroshot is None):
        return None
    config = dataclasses.replace(settings.config, rerun=False, repeat=0, save=None)
    settings = dataclasses.replace(settings, config=config, method=Dense())
    if beside is not None:
        store, key = Store(config.results_dir), key_of(settings, bench.spec, bench.bos)
        with store.lock(key):
            if store.find(key) is None:
                store.write(compose(key, settings, bench.spec, beside), {})
    return _run(settings, bench).record


@dataclass(frozen=True)
class _Done:
    """What a run made: its content, masks to keep, and what was found out about the dense model on the way, and the state to let go of."""

    made: Made
    masks: dict[str, PackedMask] | None
    beside: Made | None = None
    scratch: Path | None = None


def _make(settings: Settings, bench: Bench, key: str) -> _Done:
    """Prune and score the model in memory."""
    config, memory = settings.config, PeakMemory()
    with bench.borrowed(config.scope if settings.method.uses else None) as model:
        if config.save is not None:
            check_room(config.save, _bytes(model, bench))
        size = sum(parameter.numel() for parameter in model.parameters())
        pruned = prune_in_memory(settings, bench) if settings.method.uses else Pruned()
        if config.save is not None:
            with bench.observer.phase(f"saving {config.save}"):
                save_checkpoint(config.save, model, bench.tokenizer, pruned.masks or {}, manifest(key, settings, bench.spec, bench.bos, pruned.layers))
        start = time.perf_counter()
        scored, tasks = _evaluate(settings, bench)
        cost = {"load_s": bench.load_s, "prune_s": pruned.seconds, "eval_s": time.perf_counter() - start, **memory.read()}
    return _Done(_told(settings, bench, pruned, scored, tasks, (size, bench.decoder.size), cost), pruned.masks if config.save_masks else None)


def _walk(settings: Settings, bench: Bench, key: str) -> _Done:
    """Prune and score the model while it is read, and save it as it goes."""
    config, memory = settings.config, PeakMemory()
    scratch = _scratch(settings, key)
    growing = None if config.save is None else Growing(config.save, scratch)
    if growing is not None and growing.placed(key):
        growing = None  # an earlier run was killed when its checkpoint was in place and its record was not
    if growing is not None:
        check_room(growing.folder, _bytes(models.skeleton(bench.spec), bench) - growing.written)
    walked = walk(settings, bench, scratch, growing)
    pruned = walked.pruned
    if growing is not None:
        growing.finish(walked.model, bench.tokenizer, pruned.masks or {}, manifest(key, settings, bench.spec, bench.bos, pruned.layers))
    cost = {"load_s": 0.0, "prune_s": pruned.seconds, "eval_s": walked.scoring_s, **memory.read()}
    sizes = (walked.size, walked.decoder_size)
    made = _told(settings, bench, pruned, walked.scored, None, sizes, cost)
    beside = None
    if settings.method.uses and walked.dense is not None:
        beside = _told(dataclasses.replace(settings, method=Dense()), bench, Pruned(), walked.dense, None, sizes, {**cost, "prune_s": 0.0})
    return _Done(made, pruned.masks if config.save_masks else None, beside, scratch)


def _scratch(settings: Settings, key: str) -> Path:
    """Where a streamed run keeps its state."""
    config = settings.config
    return Store(config.results_dir).runs / key / "work" if config.save is None else scratch_of(config.save)


def _bytes(model: Any, bench: Bench) -> int:
    """What the weights take on the disk."""
    return int(sum(parameter.numel() for parameter in model.parameters()) * bench.spec.dtype.itemsize)


def _told(
    settings: Settings, bench: Bench, pruned: Pruned, scored: Perplexity | None, tasks: ZeroShot | None, sizes: tuple[int, int], cost: dict[str, Any]
) -> Made:
    return Made(
        bos=bench.bos,
        layers=pruned.layers,
        starved=pruned.starved,
        calibration=bench.calibration if settings.method.stat else None,
        windows=bench.windows,
        perplexity=scored,
        zeroshot=tasks,
        model_size=sizes[0],
        decoder_size=sizes[1],
        cost={name: round(value, 3) if isinstance(value, float) else value for name, value in cost.items()},
    )


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
