"""Load model, tokenizer and tokens of a run on first use, and share them between the runs of one process."""

import json
import logging
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dass_exp.config.settings import ModelConfig
from dass_exp.data import tokens
from dass_exp.data.texts import Text
from dass_exp.engine.callbacks import Callback
from dass_exp.errors import DamagedFileError, UserError
from dass_exp.evaluate.generation import PROMPT, generate
from dass_exp.evaluate.perplexity import last_hidden_states
from dass_exp.models import load
from dass_exp.models.decoder import decoder_of
from dass_exp.models.families import READER_OF, Role
from dass_exp.runs.memory import available_memory
from dass_exp.runs.resolved_run import ResolvedRun
from dass_exp.storage.checksum import json_digest
from dass_exp.storage.tensor_file import read_tensors, write_tensors

log = logging.getLogger(__name__)

T = TypeVar("T")


class ProgressReporter(Protocol):
    """Shows what a run is doing."""

    def phase(self, name: str, steps: int | None = None) -> AbstractContextManager[Callable[[], None]]:
        """Open a phase of the run; yields a function to call after each of its ``steps``."""


class SilentReporter:
    """Shows nothing."""

    def phase(self, name: str, steps: int | None = None) -> AbstractContextManager[Callable[[], None]]:
        """Show nothing."""
        del name, steps
        return nullcontext(lambda: None)


class ModelCache:
    """Keeps what runs of one process share: identified models, tokenizers, tokens, and one dense model in memory.

    Args:
        size: how many small objects (specs, tokenizers, tokens) are kept.
    """

    def __init__(self, size: int = 32) -> None:
        self._size = size
        self._small: OrderedDict[Hashable, Any] = OrderedDict()
        self._model: tuple[tuple[str, str, str], nn.Module] | None = None
        self.dense_hidden: dict[str, Tensor] = {}  # of the model in memory, by the hash of the windows

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of ``make``, which is called once per key."""
        if key not in self._small:
            self._small[key] = make()
            if len(self._small) > self._size:
                self._small.popitem(last=False)
        value: T = self._small[key]
        return value

    def __contains__(self, key: Hashable) -> bool:
        return key in self._small

    def model(self, spec: load.ModelSpec) -> nn.Module | None:
        """Return the model of this spec if it is the one in memory."""
        return self._model[1] if self._model is not None and self._model[0] == _identity(spec) else None

    def put(self, spec: load.ModelSpec, model: nn.Module) -> None:
        """Keep this model instead of the previous one."""
        self._model, self.dense_hidden = (_identity(spec), model), {}

    def clear(self) -> None:
        """Free the model in memory."""
        self._model, self.dense_hidden = None, {}


def _identity(spec: load.ModelSpec) -> tuple[str, str, str]:
    return spec.identity, spec.dtype_name, str(spec.device)


def _model_key(model: ModelConfig) -> tuple[str, str]:
    return "model", repr(replace(model, placement="auto"))  # wherever it is placed, it is the same model


@cache
def cache_of_process() -> ModelCache:
    """Return the cache that all cells of a sweep in this process share: a launcher's worker outlives a cell."""
    return ModelCache()


class RunContext:
    """Loads what runs need on first use. It holds no settings.

    Args:
        reporter: shows the phases of a run.
        shared: the cache of a process whose later runs use the same model; None for a single run and its dense
            counterpart.
        callbacks: further callbacks of the engine's loop, after the run's own.
        planning: whether runs are only planned, so that their device may be missing here.
    """

    def __init__(
        self,
        reporter: ProgressReporter | None = None,
        shared: ModelCache | None = None,
        callbacks: Sequence[Callback] = (),
        planning: bool = False,
    ) -> None:
        self.reporter, self.callbacks, self._planning = reporter or SilentReporter(), callbacks, planning
        self.shared = shared is not None
        self.cache = shared or ModelCache()
        self.load_s = 0.0

    def available_memory(self, device: torch.device) -> int:
        """Return the free bytes of a device; without limit for one that is only planned with."""
        return available_memory(device) if load.is_present(device) else sys.maxsize

    def find(self, model: ModelConfig) -> tuple[load.ModelSpec, Any]:
        """Identify a model and load its tokenizer.

        Raises:
            UserError: there is no such model, or it cannot be reached.
        """

        def search() -> tuple[load.ModelSpec, Any]:
            with self.reporter.phase(f"finding {model.path}"):
                spec = load.identify(model, self._planning)
                return spec, load.load_tokenizer(spec)

        return self.cache.get(_model_key(model), search)

    def find_for_plan(self, model: ModelConfig) -> tuple[load.ModelSpec, Any]:
        """Identify a model as :meth:`find`; one that cannot be found is searched for once."""
        key = ("missing", _model_key(model))
        if key in self.cache:
            raise UserError(self.cache.get(key, str))
        try:
            return self.find(model)
        except UserError as error:
            text = str(error)
            self.cache.get(key, lambda: text)
            raise

    def has_found(self, model: ModelConfig) -> bool:
        """Check whether the model was identified before."""
        return _model_key(model) in self.cache

    def tokenizer(self, run: ResolvedRun) -> Any:
        """Return the tokenizer of a run's model."""
        return self.find(run.config.model)[1]

    def warn_of_tokens(self, run: ResolvedRun) -> None:
        """Warn, once a model, if its tokenizer has tokens without an embedding; a text that holds one is refused."""

        def warn() -> None:
            if (size := len(self.tokenizer(run))) > run.spec.vocabulary:
                problem = f"has {size} tokens and its embedding {run.spec.vocabulary}; no text holds one of the others"
                log.warning("model.path=%s: its tokenizer %s", run.spec.source, problem)

        self.cache.get(("tokens", run.spec.identity), warn)

    def skeleton(self, run: ResolvedRun) -> nn.Module:
        """Return the model on the meta device: modules and shapes without weights."""
        return self.cache.get(("skeleton", _identity(run.spec)), lambda: load.skeleton(run.spec))

    def calibration(self, run: ResolvedRun) -> tokens.Tokens | None:
        """Return the calibration tokens; None for a method that needs none.

        Raises:
            UserError: the text is too short, or cannot be loaded.
        """
        if not run.calibrated:
            return None
        text, config, seed = run.calibration_text, run.config.calibration, run.config.seed
        cut = config.sampling, config.separator, config.num_samples, config.seq_len
        key = ("calibration", run.spec.identity, run.bos, json.dumps(text.identity, sort_keys=True), cut, seed)

        def draw() -> tokens.Tokens:
            drawn = tokens.calibration_tokens(text, config, self.tokenizer(run), run.bos, seed)
            return drawn.checked(run.spec.vocabulary, run.spec.source)

        return self.cache.get(key, draw)

    def check_length(self, run: ResolvedRun) -> None:
        """Raise a UserError if the calibration text is too short for a single sequence."""
        if run.method.stat:
            config = replace(run.config.calibration, num_samples=1)
            tokens.calibration_tokens(run.calibration_text, config, self.tokenizer(run), run.bos, run.config.seed)

    def windows(self, run: ResolvedRun) -> dict[str, tokens.Tokens]:
        """Return the windows to score by name of the set, that of the tables first; empty without any perplexity.

        Raises:
            UserError: a text is shorter than one window, or cannot be loaded.
        """
        return {name: self._windows(run, name) for name in run.config.eval.perplexity_sets}

    def _windows(self, run: ResolvedRun, name: str) -> tokens.Tokens:
        setting, scored = run.config.eval.perplexity_sets[name]
        return self._cut(run, run.evaluation_texts[name], scored.context, scored.max_windows, f"{setting}.context")

    def training_windows(self, run: ResolvedRun) -> tokens.Tokens:
        """Return all windows of the text that a run retrains on.

        Raises:
            UserError: the text is shorter than one window, or cannot be loaded.
        """
        return self._cut(run, run.retrain.text, run.retrain.seq_len, None, "retrain.seq_len")

    def _cut(self, run: ResolvedRun, text: Text, length: int, count: int | None, setting: str) -> tokens.Tokens:
        key = ("windows", run.spec.identity, run.bos, json.dumps(text.identity, sort_keys=True), length, count)

        def cut() -> tokens.Tokens:
            windows = tokens.evaluation_windows(text, length, count, self.tokenizer(run), run.bos, setting)
            return windows.checked(run.spec.vocabulary, run.spec.source)

        return self.cache.get(key, cut)

    def dense_generation(self, run: ResolvedRun, model: nn.Module) -> Tensor | None:
        """Return what the dense model generates, once per process and model; None if that is not requested.

        ``model`` must still be dense.
        """
        if (prompts := self.prompts(run)) is None or run.config.eval.generation is None:
            return None
        tokens = run.config.eval.generation.tokens

        def generated() -> Tensor:
            with self.reporter.phase("generation of the dense model"):
                return generate(model, prompts, tokens)

        return self.cache.get(("generation", _identity(run.spec), repr(prompts.tolist()), tokens), generated)

    def prompts(self, run: ResolvedRun) -> Tensor | None:
        """Return the starts of the first windows, int64 [prompts, tokens]; None if no generation is requested."""
        check = run.config.eval.generation
        if check is None:
            return None
        return next(iter(self.windows(run).values())).ids[: check.prompts, :PROMPT]

    @contextmanager
    def resident_model(self, run: ResolvedRun) -> Iterator[nn.Module]:
        """Yield the dense model in memory, to be pruned by ``run``; on exit restore it if it is shared."""
        model = self.cache.model(run.spec)
        if model is None:
            self.cache.clear()
            start = time.perf_counter()
            with self.reporter.phase("loading the model"):
                model = load.load_model(run.spec)
            self.load_s += time.perf_counter() - start
            self.cache.put(run.spec, model)
        decoder = decoder_of(model, run.spec.roles)
        sites = run.sites(decoder) if self.shared and run.method.prunes else []
        dense_weights = [(site.matrix, site.matrix.weight.clone()) for site in sites]
        writers = [site.matrix for site in sites if site.role in (*READER_OF, Role.V)]
        biases = [(bias, bias.clone()) for matrix in writers if (bias := matrix.bias) is not None]
        if dense_weights and run.retrain.trains_vectors:
            biases = [(vector.data, vector.data.clone()) for vector in model.parameters() if vector.ndim == 1]
        try:
            yield model
        finally:
            for matrix, weight in dense_weights:
                matrix.write(weight)
            for bias, dense in biases:  # neurons that were put in order took theirs along
                bias.copy_(dense)
            if run.method.prunes and not self.shared:
                self.cache.clear()  # it is not dense any more

    def dense_hidden(self, run: ResolvedRun, model: nn.Module) -> dict[str, Tensor]:
        """Return the last hidden states of a model that is still dense, for the windows of a run that is not streamed.

        They are computed once for a model in memory and, with ``eval.cache=disk``, once for a results folder.

        Returns:
            [windows, tokens, features] on the CPU by name of the set of windows; empty if no divergence is measured.
        """
        sets = self.windows(run) if run.config.eval.divergence else {}
        return {name: self._dense_hidden(run, model, windows) for name, windows in sets.items()}

    def _dense_hidden(self, run: ResolvedRun, model: nn.Module, windows: tokens.Tokens) -> Tensor:
        evaluation, kept = run.config.eval, self.cache.dense_hidden
        if windows.sha256 not in kept:
            path = self._hidden_file(run, windows) if evaluation.cache == "disk" else None
            stored = None if path is None else _read_hidden(path)
            if stored is None:
                steps = math.ceil(len(windows.ids) / evaluation.batch_size)
                with self.reporter.phase("the dense model on the windows", steps) as advance:
                    stored = last_hidden_states(model, windows.ids, evaluation.batch_size, advance)
                if path is not None:
                    write_tensors({"hidden": stored}, path)
            kept[windows.sha256] = stored
        return kept[windows.sha256]

    def _hidden_file(self, run: ResolvedRun, windows: tokens.Tokens) -> Path:
        """Return the file of the last hidden states of the dense model, under these versions of the libraries."""
        versions = torch.__version__, version("transformers")
        digest = json_digest([*_identity(run.spec), run.spec.device.type, windows.sha256, *versions])
        folder = Path(run.config.results_dir) / "dense_hidden"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{digest}.safetensors"


def _read_hidden(path: Path) -> Tensor | None:
    """Return what a file of hidden states holds; None if it is missing or damaged: it is computed again."""
    if not path.is_file():
        return None
    try:
        return read_tensors(path)[0]["hidden"]
    except DamagedFileError as error:
        log.warning("%s; the dense model is run again", error)
        return None
