"""One run: load, prune, verify, evaluate, record, track."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import Timeout

from dass_exp.config.settings import Settings
from dass_exp.errors import UserError
from dass_exp.methods.dense import Dense
from dass_exp.models.save import writing
from dass_exp.runs.context import Bench, ProgressReporter, Shelf, SilentReporter
from dass_exp.runs.identity import identity_of, key_of
from dass_exp.runs.making import Done, finished, make, scratch_folder, walk
from dass_exp.runs.progress import discard, placement_of, tidy
from dass_exp.runs.record import Made, compose, described
from dass_exp.runs.settled import settled, with_config
from dass_exp.storage.durable import remove_strays
from dass_exp.storage.records import Record, Store


@dataclass(frozen=True)
class Outcome:
    """A record, where it lies, its dense counterpart (None for dense itself, or where nothing was scored), and whether it was there before."""

    record: Record
    path: Path
    dense: Record | None
    found: bool


def run(settings: Settings, observer: ProgressReporter | None = None, shelf: Shelf | None = None) -> Outcome:
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
    bench = Bench(settings, observer or SilentReporter(), shelf)
    settings = bench.settings = settled(settings, bench)
    return _run(settings, bench)


def _run(settings: Settings, bench: Bench) -> Outcome:
    store = Store(settings.config.results_dir)
    key = key_of(settings, bench.spec, bench.bos)
    if (outcome := _found(settings, bench, store, key)) is not None:
        with (
            suppress(Timeout, UserError),
            store.lock(key, wait=False),
            writing(settings.config.save),
        ):  # unless somebody does it again
            _clear(settings, bench, key)
        return outcome
    bench.check(settings)
    with store.lock(key), writing(settings.config.save):
        if (
            outcome := _found(settings, bench, store, key)
        ) is not None:  # another process may have done it while this one waited
            return outcome
        with store.noting_failure(key, described(settings, bench.spec)):
            dense = None if bench.streams else _dense(settings, bench)
            done = _made(settings, bench, key)
            if done.beside is not None:  # before the record, behind which nobody would go on with the state
                dense = _dense(settings, bench, done.beside)
            record = compose(key, settings, bench.spec, done.made)
            path = store.write(
                record, {"documents.json": done.made.zeroshot.documents} if done.made.zeroshot else {}, done.masks
            )
        _clear(settings, bench, key)
    if bench.streams and dense is None:
        dense = _dense(settings, bench)
    settings.tracker.track(record, settings.config.results_dir)
    return Outcome(record, path, dense, found=False)


def _made(settings: Settings, bench: Bench, key: str) -> Done:
    for folder in (scratch := scratch_folder(settings, key), Store(settings.config.results_dir).runs / key):
        remove_strays(folder)
    try:
        return walk(settings, bench, key) if bench.streams else make(settings, bench, key)
    finally:
        tidy(scratch)


def _clear(settings: Settings, bench: Bench, key: str) -> None:
    """Let go of what a finished run wrote down on its way, also where an earlier start of it saved nothing."""
    for folder in {scratch_folder(settings, key), scratch_folder(with_config(settings, save=None), key)}:
        if placement_of(folder, identity_of(settings, bench.spec, bench.bos)):
            discard(folder)
        tidy(folder)


def _found(settings: Settings, bench: Bench, store: Store, key: str) -> Outcome | None:
    record = finished(settings, store, key)
    return None if record is None else Outcome(record, store.path(key), _dense(settings, bench), found=True)


def _dense(settings: Settings, bench: Bench, beside: Made | None = None) -> Record | None:
    """The dense record of the same model and evaluation: found, written from what was scored beside a pruned model, or made on demand."""
    evaluation = settings.config.eval
    if not settings.method.uses or (evaluation.perplexity is None and evaluation.zeroshot is None):
        return None
    settings = dataclasses.replace(with_config(settings, rerun=False, repeat=0, save=None), method=Dense())
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
