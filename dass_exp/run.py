"""One run: load, prune, verify, evaluate, record, track."""

from __future__ import annotations

import dataclasses
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dass_exp import data, models
from dass_exp.calibrate import BlockReport, Options, check_shapes, prune_model
from dass_exp.config import Settings
from dass_exp.errors import UserError
from dass_exp.evaluate.perplexity import Perplexity, perplexity
from dass_exp.evaluate.zeroshot import Options as ZeroShotOptions
from dass_exp.evaluate.zeroshot import ZeroShot, zero_shot
from dass_exp.families import decoder_of
from dass_exp.key import key_of
from dass_exp.methods.dense import Dense
from dass_exp.record import PeakMemory, Record, Store
from dass_exp.summarise import Made, compose, described
from dass_exp.verify import Layer, verify


class Observer(Protocol):
    """Shown what a run is doing."""

    def phase(self, name: str, steps: int | None = None) -> AbstractContextManager[Any]:
        """A phase of the run begins; it yields a function to call after each of its ``steps``."""


class Silent:
    """Shows nothing."""

    def phase(self, name: str, steps: int | None = None) -> AbstractContextManager[Any]:
        """Nothing to show."""
        del name, steps
        return nullcontext(lambda: None)


@dataclass(frozen=True)
class Outcome:
    """A record, where it lies, its dense counterpart (None for dense itself, or where nothing was scored), and whether it was there before."""

    record: Record
    path: Path
    dense: Record | None
    found: bool


class Bench:
    """What a run and its dense counterpart share: the model, its tokenizer, the tokens. Each is made when it is first asked for.

    Args:
        settings: a validated run.
        observer: shown the phases.
    """

    def __init__(self, settings: Settings, observer: Observer) -> None:
        self.settings = settings
        self.observer = observer
        with observer.phase(f"finding {settings.config.model.path}"):
            self.spec = models.identify(settings.config.model)
            self.tokenizer = models.load_tokenizer(self.spec)
        self.bos = models.bos_policy(settings.config.model.bos, self.spec, self.tokenizer)
        self.load_s = 0.0

    @cached_property
    def model(self) -> nn.Module:
        """The model in memory; dense until it is pruned."""
        start = time.perf_counter()
        with self.observer.phase("loading the model"):
            model = models.load_model(self.spec)
        self.load_s = time.perf_counter() - start
        return model

    @cached_property
    def calibration(self) -> data.Tokens:
        """The calibration tokens."""
        settings = self.settings
        return data.calibration_tokens(settings.calibration_text, settings.cut, self.tokenizer, self.bos, settings.config.seed)

    @cached_property
    def windows(self) -> data.Tokens | None:
        """The windows to score, None where no perplexity is asked for."""
        scored, text = self.settings.config.eval.perplexity, self.settings.evaluation_text
        if scored is None or text is None:
            return None
        return data.evaluation_windows(text, scored.context, scored.max_windows, self.tokenizer, self.bos)

    def check(self, settings: Settings) -> None:
        """See that the model can do what the settings ask, before its weights are loaded.

        Raises:
            UserError: a sequence is too long for the model or its text, the scope is empty, or an axis is not divisible.
        """
        scored, limit = settings.config.eval.perplexity, self.spec.positions
        lengths = {"calibration.seq_len": settings.cut.seq_len if settings.method.stat else 0, "eval.perplexity.context": scored.context if scored else 0}
        for setting, length in lengths.items():
            if limit is not None and length > limit:
                raise UserError(f"{setting}={length}: model {self.spec.name} has {limit} positions; choose at most that")
        if settings.method.uses:
            check_shapes(decoder_of(models.skeleton(self.spec), self.spec.roles), settings.method, settings.pattern, settings.config.scope)
        _ = self.windows
        if settings.method.stat:
            _ = self.calibration


def run(settings: Settings, observer: Observer | None = None) -> Outcome:
    """Do a run, or find its record if it was done before.

    Raises:
        UserError: a setting does not fit the model or the data; nothing was loaded or written.
        NumericalError, VerificationError: the method went wrong; a failed.json says where.
    """
    if settings.config.threads:
        torch.set_num_threads(settings.config.threads)
    return _run(settings, Bench(settings, observer or Silent()))


def _run(settings: Settings, bench: Bench) -> Outcome:
    store = Store(settings.config.results_dir)
    key = key_of(settings, bench.spec, bench.bos)
    if (outcome := _found(settings, bench, store, key)) is not None:
        return outcome
    bench.check(settings)
    with store.lock(key):
        if (outcome := _found(settings, bench, store, key)) is not None:  # another process may have done it while this one waited
            return outcome
        dense = _dense(settings, bench)
        with store.noting_failure(key, described(settings, bench.spec)):
            made, masks = _make(settings, bench)
            record = compose(key, settings, bench.spec, made)
            path = store.write(record, {"documents.json": made.zeroshot.documents} if made.zeroshot else {}, masks)
    settings.tracker.track(record, settings.config.results_dir)
    return Outcome(record, path, dense, found=False)


def _found(settings: Settings, bench: Bench, store: Store, key: str) -> Outcome | None:
    record = None if settings.config.rerun else store.find(key)
    if record is None or (settings.config.save_masks and settings.method.uses and not store.masks(key).is_file()):
        return None
    return Outcome(record, store.path(key), _dense(settings, bench), found=True)


def _dense(settings: Settings, bench: Bench) -> Record | None:
    """The dense record of the same model and evaluation, made on demand."""
    evaluation = settings.config.eval
    if not settings.method.uses or (evaluation.perplexity is None and evaluation.zeroshot is None):
        return None
    config = dataclasses.replace(settings.config, rerun=False)
    return _run(dataclasses.replace(settings, config=config, method=Dense()), bench).record


def _make(settings: Settings, bench: Bench) -> tuple[Made, dict[str, Tensor] | None]:
    memory, model = PeakMemory(), bench.model
    size = sum(parameter.numel() for parameter in model.parameters())
    start = time.perf_counter()
    layers, masks = _prune(settings, bench) if settings.method.uses else ([], None)
    prune_s = time.perf_counter() - start
    start = time.perf_counter()
    scored, tasks = _evaluate(settings, bench)
    cost = {"load_s": bench.load_s, "prune_s": prune_s, "eval_s": time.perf_counter() - start, **memory.read()}
    made = Made(
        bos=bench.bos,
        layers=layers,
        calibration=bench.calibration if settings.method.stat else None,
        windows=bench.windows,
        perplexity=scored,
        zeroshot=tasks,
        model_size=size,
        decoder_size=decoder_of(model, bench.spec.roles).size,
        cost={name: round(value, 3) if isinstance(value, float) else value for name, value in cost.items()},
    )
    return made, masks


def _prune(settings: Settings, bench: Bench) -> tuple[list[Layer], dict[str, Tensor] | None]:
    layers: list[Layer] = []
    masks: dict[str, Tensor] | None = {} if settings.config.save_masks else None
    blocks = len(decoder_of(bench.model, bench.spec.roles).blocks)
    with bench.observer.phase(f"pruning with {settings.method.name}", blocks) as step:

        def on_block(report: BlockReport) -> None:
            layers.extend(verify(report, settings.pattern))
            if masks is not None:
                masks.update({name: cut.keep for name, cut in report.cuts.items()})
            step()

        options = Options(settings.config.scope, settings.config.calibration.batch_size, bench.spec.roles, on_block)
        tokens = bench.calibration.ids if settings.method.stat else None
        torch.manual_seed(settings.config.seed)
        prune_model(bench.model, tokens, settings.method, settings.pattern, options)
    return layers, masks


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
