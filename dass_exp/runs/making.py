"""Make what a record tells: prune and score a model in memory, or while it is read block by block."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dass_exp.config.settings import Settings
from dass_exp.evaluate.perplexity import Perplexity, perplexity
from dass_exp.evaluate.zeroshot import Options as ZeroShotOptions
from dass_exp.evaluate.zeroshot import ZeroShot, zero_shot
from dass_exp.methods.dense import Dense
from dass_exp.models import load as models
from dass_exp.models.save import CheckpointWriter, check_room, is_saved, place_of, save_checkpoint, scratch_of
from dass_exp.runs import pruning
from dass_exp.runs.context import Bench
from dass_exp.runs.pruning import Pruned, prune_in_memory
from dass_exp.runs.record import Made, manifest
from dass_exp.storage.mask_file import PackedMask
from dass_exp.storage.records import PeakMemory, Record, Store


@dataclass(frozen=True)
class Done:
    """What a run made: its content, masks to keep, and what was found out about the dense model on the way."""

    made: Made
    masks: dict[str, PackedMask] | None
    beside: Made | None = None


def finished(settings: Settings, store: Store, key: str) -> Record | None:
    """The record of this run, if there is nothing to do any more: its saved model and its masks, where they are asked for, are there too.

    Raises:
        UserError: something else lies where the model is to be saved.
    """
    config = settings.config
    saved = config.save is None or is_saved(
        config.save, key
    )  # whatever else lies there must be said before anything is run
    record = None if config.rerun else store.find(key)
    return (
        record if saved and (not config.save_masks or not settings.method.uses or store.masks(key).is_file()) else None
    )


def make(settings: Settings, bench: Bench, key: str) -> Done:
    """Prune and score the model in memory."""
    config, memory = settings.config, PeakMemory()
    with bench.borrowed(config.scope if settings.method.uses else None) as model:
        if config.save is not None:
            check_room(config.save, (2 if config.checkpoint else 1) * _bytes(model, bench) + bench.needs.disk)
        size = sum(parameter.numel() for parameter in model.parameters())
        pruned = prune_in_memory(settings, bench, scratch_folder(settings, key)) if settings.method.uses else Pruned()
        if config.save is not None:
            with bench.observer.phase(f"saving {config.save}"):
                save_checkpoint(
                    config.save,
                    model,
                    bench.tokenizer,
                    pruned.masks or {},
                    manifest(key, settings, bench.spec, bench.bos, pruned.layers),
                )
        start = time.perf_counter()
        scored, tasks = _evaluate(settings, bench)
        cost = {
            "load_s": bench.load_s,
            "prune_s": pruned.seconds,
            "eval_s": time.perf_counter() - start,
            **memory.read(),
        }
    made = _told(settings, bench, pruned, scored, tasks, (size, bench.decoder.size), cost)
    return Done(made, pruned.masks if config.save_masks else None)


def walk(settings: Settings, bench: Bench, key: str) -> Done:
    """Prune and score the model while it is read, and save it as it goes."""
    config, memory = settings.config, PeakMemory()
    scratch = scratch_folder(settings, key)
    growing = None if config.save is None else CheckpointWriter(config.save, scratch)
    if growing is not None and growing.placed(key):
        growing = None  # an earlier run was killed when its checkpoint was in place and its record was not
    if growing is not None:
        check_room(growing.folder, _bytes(bench.skeleton, bench) + bench.needs.disk - growing.written)
    walked = pruning.walk(settings, bench, scratch, growing)
    pruned = walked.pruned
    if growing is not None:
        growing.finish(
            walked.model,
            bench.tokenizer,
            pruned.masks or {},
            manifest(key, settings, bench.spec, bench.bos, pruned.layers),
        )
    sizes, uses = (walked.size, walked.decoder_size), settings.method.uses
    tasks, scoring_s = None, walked.seconds["pruned" if uses else "dense"]
    if config.eval.zeroshot is not None and config.save is not None:
        walked.model.to("meta")
        start = time.perf_counter()
        tasks = _tasks(
            settings,
            bench,
            models.load_model(dataclasses.replace(bench.spec, source=str(place_of(config.save)), revision=None)),
        )
        scoring_s += time.perf_counter() - start
    cost = {"load_s": 0.0, "prune_s": pruned.seconds, "eval_s": scoring_s, **memory.read()}
    made = _told(settings, bench, pruned, walked.scored if uses else walked.dense, tasks, sizes, cost)
    beside = None
    if uses and walked.dense is not None and tasks is None:
        cost = {**cost, "prune_s": 0.0, "eval_s": walked.seconds["dense"]}
        beside = _told(dataclasses.replace(settings, method=Dense()), bench, Pruned(), walked.dense, None, sizes, cost)
    return Done(made, pruned.masks if config.save_masks else None, beside)


def _bytes(model: Any, bench: Bench) -> int:
    """What the weights take on the disk."""
    return int(sum(parameter.numel() for parameter in model.parameters()) * bench.spec.dtype.itemsize)


def _told(
    settings: Settings,
    bench: Bench,
    pruned: Pruned,
    scored: Perplexity | None,
    tasks: ZeroShot | None,
    sizes: tuple[int, int],
    cost: dict[str, Any],
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
    scored = None
    if bench.windows is not None:
        with bench.observer.phase(f"perplexity of {settings.method.name}"):
            scored = perplexity(model, bench.windows.ids, evaluation.batch_size)
    return scored, _tasks(settings, bench, model)


def _tasks(settings: Settings, bench: Bench, model: Any) -> ZeroShot | None:
    evaluation = settings.config.eval
    if (asked := evaluation.zeroshot) is None:
        return None
    with bench.observer.phase(f"zero-shot tasks of {settings.method.name}"):
        options = ZeroShotOptions(4 * evaluation.batch_size, bench.bos != "never")
        return zero_shot(model, bench.tokenizer, asked.tasks, asked.limit, asked.data, options)


def scratch_folder(settings: Settings, key: str) -> Path:
    """Where a run writes down what it needs to go on, and what waits on the disk."""
    config = settings.config
    return Store(config.results_dir).runs / key / "work" if config.save is None else scratch_of(config.save)
