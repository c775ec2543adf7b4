"""One run: load, prune, verify, evaluate, record, track."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dass_exp.bench import Bench, Observer, Shelf, Silent
from dass_exp.checkpoint import writing
from dass_exp.config import Settings
from dass_exp.key import identity_of, key_of
from dass_exp.making import finished, make, scratch_folder, walk
from dass_exp.memory import available
from dass_exp.methods.dense import Dense
from dass_exp.progress import discard, placement_of, tidy
from dass_exp.record import Record, Store
from dass_exp.summarise import Made, compose, described

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
    without = _with(settings, eval=dataclasses.replace(settings.config.eval, zeroshot=None))
    if settings.config.model.placement == "auto" and (before := _placed_before(settings, bench) or _placed_before(without, bench)):
        model = dataclasses.replace(settings.config.model, placement=before)  # an interrupted run goes on as it began
        settings, without = _with(settings, model=model), _with(without, model=model)
        bench.settings = settings
    whole = None if settings.config.rerun else Store(settings.config.results_dir).find(key_of(settings, bench.spec, bench.bos))
    if settings.config.eval.zeroshot is not None and whole is None and bench.streams and (why := _too_large(settings, bench)):
        log.warning("the model is read block by block, so zero-shot tasks are left out: %s", why)
        settings = bench.settings = without
    return _run(settings, bench)


def _with(settings: Settings, **changes: Any) -> Settings:
    return dataclasses.replace(settings, config=dataclasses.replace(settings.config, **changes))


def _placed_before(settings: Settings, bench: Bench) -> str | None:
    """Where the model went in an earlier start of this run that did not come to its end; None where there was none."""
    return placement_of(scratch_folder(settings, key_of(settings, bench.spec, bench.bos)), identity_of(settings, bench.spec, bench.bos))


def _too_large(settings: Settings, bench: Bench) -> str:
    """Why the saved model cannot be scored on tasks when it is whole; empty where it can."""
    if settings.config.save is None:
        return "save=FOLDER keeps it, to be scored where it fits in memory"
    wanted, free = bench.needs.scored, available(bench.spec.device)
    return "" if wanted <= free else f"the model alone needs {wanted / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; score {settings.config.save} where it fits"


def _run(settings: Settings, bench: Bench) -> Outcome:
    store = Store(settings.config.results_dir)
    key = key_of(settings, bench.spec, bench.bos)
    if (outcome := _found(settings, bench, store, key)) is not None:
        if (scratch := scratch_folder(settings, key)).exists():  # of a run that was killed when all was done
            with store.lock(key):
                if placement_of(scratch, identity_of(settings, bench.spec, bench.bos)):
                    discard(scratch)
                tidy(scratch)
        return outcome
    bench.check(settings)
    with store.lock(key):
        if (outcome := _found(settings, bench, store, key)) is not None:  # another process may have done it while this one waited
            return outcome
        with store.noting_failure(key, described(settings, bench.spec)), writing(settings.config.save):
            dense = None if bench.streams else _dense(settings, bench)
            try:
                done = walk(settings, bench, key) if bench.streams else make(settings, bench, key)
            finally:
                if not bench.streams:
                    tidy(scratch_folder(settings, key))
            record = compose(key, settings, bench.spec, done.made)
            path = store.write(record, {"documents.json": done.made.zeroshot.documents} if done.made.zeroshot else {}, done.masks)
        if done.scratch is not None:
            discard(done.scratch)
    if bench.streams:
        dense = _dense(settings, bench, done.beside)
    settings.tracker.track(record, settings.config.results_dir)
    return Outcome(record, path, dense, found=False)


def _found(settings: Settings, bench: Bench, store: Store, key: str) -> Outcome | None:
    record = finished(settings, store, key)
    return None if record is None else Outcome(record, store.path(key), _dense(settings, bench), found=True)


def _dense(settings: Settings, bench: Bench, beside: Made | None = None) -> Record | None:
    """The dense record of the same model and evaluation: found, written from what was scored beside a pruned model, or made on demand."""
    evaluation = settings.config.eval
    if not settings.method.uses or (evaluation.perplexity is None and evaluation.zeroshot is None):
        return None
    settings = dataclasses.replace(_with(settings, rerun=False, repeat=0, save=None), method=Dense())
    config = settings.config
    if evaluation.zeroshot is not None and bench.streams:  # tasks need the model in memory, and it fits there alone
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, placement="resident"))
        settings = dataclasses.replace(settings, config=config)
        return _run(settings, Bench(settings, bench.observer)).record
    if beside is not None:
        store, key = Store(config.results_dir), key_of(settings, bench.spec, bench.bos)
        with store.lock(key):
            if store.find(key) is None:
                store.write(compose(key, settings, bench.spec, beside), {})
    return _run(settings, bench).record
