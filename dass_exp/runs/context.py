"""What a run needs before it can prune: the model, its tokenizer, the tokens; and what the runs of one process share of it."""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from dass_exp.config.settings import Settings
from dass_exp.data import tokens as data
from dass_exp.engine.prune import check_shapes
from dass_exp.errors import UserError
from dass_exp.models import load as models
from dass_exp.models.decoder import Decoder, Matrix, decoder_of
from dass_exp.runs.memory import MemoryNeeds, Workload, available_memory, choose_placement, needs

log = logging.getLogger(__name__)

Thing = TypeVar("Thing")


class ProgressReporter(Protocol):
    """Shown what a run is doing."""

    def phase(self, name: str, steps: int | None = None) -> AbstractContextManager[Any]:
        """A phase of the run begins; it yields a function to call after each of its ``steps``."""


class SilentReporter:
    """Shows nothing."""

    def phase(self, name: str, steps: int | None = None) -> AbstractContextManager[Any]:
        """Nothing to show."""
        del name, steps
        return nullcontext(lambda: None)


class Shelf:
    """What the runs of one process make once: models found, tokens drawn, and the last model in memory, dense.

    Args:
        size: how many of each kind of small thing are kept.
    """

    def __init__(self, size: int = 32) -> None:
        self._size = size
        self._things: OrderedDict[Hashable, Any] = OrderedDict()
        self._model: tuple[tuple[str, str, str], nn.Module] | None = None

    def once(self, key: Hashable, make: Callable[[], Thing]) -> Thing:
        """What ``make`` gave when it was first called for this key."""
        if key not in self._things:
            self._things[key] = make()
            if len(self._things) > self._size:
                self._things.popitem(last=False)
        found: Thing = self._things[key]
        return found

    def model(self, spec: models.ModelSpec) -> nn.Module | None:
        """The model of this spec if it is the one in memory."""
        return self._model[1] if self._model is not None and self._model[0] == _placed(spec) else None

    def put(self, spec: models.ModelSpec, model: nn.Module) -> None:
        """Keep this model, in the place of the last one."""
        self._model = (_placed(spec), model)

    def clear(self) -> None:
        """Let the model go before another one is loaded."""
        self._model = None


@cache
def shelf_of_process() -> Shelf:
    """The one that all cells of a sweep share which run in this process: a launcher's worker lives longer than a cell."""
    return Shelf()


def _placed(spec: models.ModelSpec) -> tuple[str, str, str]:
    return spec.identity, spec.dtype_name, str(spec.device)


class Bench:
    """What a run and its dense counterpart share: the model, its tokenizer, the tokens. Each is made when it is first asked for.

    Args:
        settings: a validated run.
        observer: shown the phases.
        shelf: what the runs of this process share; None for a run alone.
    """

    def __init__(self, settings: Settings, observer: ProgressReporter, shelf: Shelf | None = None) -> None:
        self.settings = settings
        self.observer = observer
        self.shelf = shelf
        self.spec, self.tokenizer = self._once(("model", repr(settings.config.model)), self._find)
        self.bos = models.bos_policy(settings.config.model.bos, self.spec, self.tokenizer)
        self.load_s = 0.0

    @cached_property
    def model(self) -> nn.Module:
        """The model in memory; dense until it is pruned."""
        if self.shelf is not None:
            if (shared := self.shelf.model(self.spec)) is not None:
                return shared
            self.shelf.clear()
        start = time.perf_counter()
        with self.observer.phase("loading the model"):
            model = models.load_model(self.spec)
        self.load_s = time.perf_counter() - start
        if self.shelf is not None:
            self.shelf.put(self.spec, model)
        return model

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model's modules and shapes, on the meta device."""
        return models.skeleton(self.spec)

    @cached_property
    def needs(self) -> MemoryNeeds:
        """What the run needs of memory."""
        settings, scored = self.settings, self.settings.config.eval.perplexity
        stat = settings.method.stat
        config = settings.config
        work = Workload(
            config.scope if settings.method.uses else None,
            stat,
            config.calibration.batch_size,
            config.eval.batch_size,
            self.spec.dtype,
            self.spec.device,
            config.calibration.cache,
            self.shelf is not None,
            config.checkpoint is not False,
        )
        calibration = (settings.cut.num_samples, settings.cut.seq_len) if stat else (0, 0)
        windows = (len(self.windows.ids), scored.context) if scored is not None and self.windows is not None else (0, 0)
        return needs(decoder_of(self.skeleton, self.spec.roles), self.skeleton, calibration, windows, work)

    @cached_property
    def streams(self) -> bool:
        """Whether the model is read block by block.

        Raises:
            UserError: the run fits in memory in no way.
        """
        asked, there = self.settings.config.model.placement, 0
        if self.shelf is not None:
            if asked != "stream" and self.shelf.model(self.spec) is not None:
                there = self.needs.model
            else:
                self.shelf.clear()  # the model before this one must not count as memory that is taken
        placement, why = choose_placement(asked, self.needs, available_memory(self.spec.device) + there)
        if placement == "stream":
            if self.shelf is not None:
                self.shelf.clear()
            log.log(logging.WARNING if asked == "auto" else logging.INFO, "model.placement=%s: %s", asked, why)
        return placement == "stream"

    @property
    def decoder(self) -> Decoder:
        """The blocks of the model in memory."""
        return decoder_of(self.model, self.spec.roles)

    @cached_property
    def calibration(self) -> data.Tokens:
        """The calibration tokens."""
        settings = self.settings
        text, cut, seed = settings.calibration_text, settings.cut, settings.config.seed
        key = ("calibration", self.spec.identity, self.bos, json.dumps(text.identity, sort_keys=True), cut, seed)
        return self._once(key, lambda: data.calibration_tokens(text, cut, self.tokenizer, self.bos, seed))

    @cached_property
    def windows(self) -> data.Tokens | None:
        """The windows to score, None where no perplexity is asked for."""
        scored, text = self.settings.config.eval.perplexity, self.settings.evaluation_text
        if scored is None or text is None:
            return None
        key = (
            "windows",
            self.spec.identity,
            self.bos,
            json.dumps(text.identity, sort_keys=True),
            scored.context,
            scored.max_windows,
        )
        return self._once(
            key, lambda: data.evaluation_windows(text, scored.context, scored.max_windows, self.tokenizer, self.bos)
        )

    def check(self, settings: Settings) -> None:
        """See that the model can do what the settings ask, before its weights are loaded.

        Raises:
            UserError: a sequence is too long for the model or its text, the scope is empty, or an axis is not divisible.
        """
        scored, limit = settings.config.eval.perplexity, self.spec.positions
        lengths = {
            "calibration.seq_len": settings.cut.seq_len if settings.method.stat else 0,
            "eval.perplexity.context": scored.context if scored else 0,
        }
        for setting, length in lengths.items():
            if limit is not None and length > limit:
                raise UserError(
                    f"{setting}={length}: model {self.spec.name} has {limit} positions; choose at most that"
                )
        if settings.method.uses:
            check_shapes(
                decoder_of(self.skeleton, self.spec.roles), settings.method, settings.pattern, settings.config.scope
            )
        _ = self.windows
        if settings.method.stat:
            _ = self.calibration

    @contextmanager
    def borrowed(self, scope: str | None) -> Iterator[nn.Module]:
        """The model, to be pruned inside this scope (None: not at all). A shared model is given back dense, whatever happens."""
        saved: list[tuple[Matrix, torch.Tensor]] = []
        if self.shelf is not None and scope is not None:
            matrices = (
                site.matrix for index in range(len(self.decoder.blocks)) for site in self.decoder.sites(index, scope)
            )
            saved = [(matrix, matrix.weight.clone()) for matrix in matrices]
        try:
            yield self.model
        finally:
            for matrix, weight in saved:
                matrix.write(weight)

    def _find(self) -> tuple[models.ModelSpec, Any]:
        with self.observer.phase(f"finding {self.settings.config.model.path}"):
            spec = models.identify(self.settings.config.model)
            return spec, models.load_tokenizer(spec)

    def _once(self, key: Hashable, make: Callable[[], Thing]) -> Thing:
        return make() if self.shelf is None else self.shelf.once(key, make)
