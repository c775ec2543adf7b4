"""Perplexity of the dense and the pruned model, computed while their blocks are streamed."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dass_exp.engine.activation_cache import CachedTensor
from dass_exp.engine.callbacks import BlockReport, Callback, LoopState, Stopwatch
from dass_exp.engine.capture import Batch, capture, eval_mode, finish_forward, restore_hidden
from dass_exp.engine.prune import EngineOptions
from dass_exp.evaluate.head import compare_head
from dass_exp.evaluate.perplexity import Perplexity, score_tokens
from dass_exp.models.decoder import decoder_of


class Scores(NamedTuple):
    """What is scored while blocks are streamed."""

    pruned: bool = True  # whether there is a pruned model
    divergence: bool = True  # whether its distance from the dense model is measured


EVERYTHING = Scores()


class StreamedPerplexity(Callback):
    """Passes the same windows through every block twice: before and after it is pruned.

    Args:
        model: a transformers causal language model; its blocks need not be in memory.
        windows: int64 [windows, tokens].
        batch_size: windows that pass through a block together.
        options: of the engine, whose activation cache is used.
        stopwatch: measures the scoring of both models apart from pruning.
        scores: what is scored.
    """

    def __init__(
        self,
        model: Any,
        windows: Tensor,
        batch_size: int,
        options: EngineOptions,
        stopwatch: Stopwatch,
        scores: Scores = EVERYTHING,
    ) -> None:
        self._model, self._windows, self._batch_size = model, windows, batch_size
        self._options, self._stopwatch = options, stopwatch
        self._scores_pruned, self._diverges = scores.pruned, scores.divergence
        self._blocks = list(decoder_of(model, options.roles).blocks)
        self._dense: list[Batch] = []
        self._pruned: list[Batch] = []
        self.dense_perplexity: Perplexity | None = None  # both are None until all blocks have passed, or if not scored
        self.pruned_perplexity: Perplexity | None = None

    @property
    def returns_tuple(self) -> bool:
        """Whether the model's blocks return a tuple."""
        return self._dense[0].returns_tuple

    @property
    def hidden(self) -> dict[str, list[Tensor]]:
        """Hidden states after the last block that passed, one tensor per batch; needed to resume."""
        return {name: [batch.cached.stored() for batch in batches] for name, batches in self._batches().items()}

    @hidden.setter
    def hidden(self, stored: dict[str, list[Tensor]]) -> None:
        for name, batches in self._batches().items():
            restore_hidden(batches, stored[name])

    @torch.no_grad()
    def on_start(self, loop: LoopState) -> None:
        del loop
        options = self._options
        with self._stopwatch.measure("dense"), eval_mode(self._model):
            self._dense = capture(
                self._model, self._blocks, self._windows, self._batch_size, options.returns_tuple, options.cache
            )
            self._pruned = [batch.copy() for batch in self._dense]
            # an unsupported head is reported now, not after hours
            few, ids = Batch(self._dense[0].hidden[:1, :8], [], self._dense[0].returns_tuple), self._windows[:1, :8]
            logits = finish_forward(self._model, self._blocks, few, ids, logits=True)
            compare_head(self._model, logits, finish_forward(self._model, self._blocks, few, ids))

    @torch.no_grad()
    def on_block_start(self, index: int) -> None:
        with self._stopwatch.measure("dense"):
            self._pass(self._dense, index)

    @torch.no_grad()
    def on_block_end(self, report: BlockReport) -> None:
        if self._scores_pruned:
            with self._stopwatch.measure("pruned"):
                self._pass(self._pruned, report.index)

    @torch.no_grad()
    def on_end(self) -> None:
        with self._stopwatch.measure("dense"):
            dense = self._last_hidden(self._dense)
            self.dense_perplexity = self._perplexity(dense)
        if self._scores_pruned:
            with self._stopwatch.measure("pruned"):
                self.pruned_perplexity = self._perplexity(
                    self._last_hidden(self._pruned), dense if self._diverges else None
                )

    def _batches(self) -> dict[str, list[Batch]]:
        return {"windows, dense": self._dense, "windows, pruned": self._pruned}

    def _pass(self, batches: list[Batch], index: int) -> None:
        with eval_mode(self._model):
            for batch in batches:
                batch.hidden = batch.run_block(self._blocks[index], index)

    def _last_hidden(self, batches: list[Batch]) -> list[CachedTensor]:
        """Return the input of the head, by batch."""
        hidden = []
        with eval_mode(self._model):
            for batch, part in zip(batches, self._windows.split(self._batch_size), strict=True):
                ids = part.to(batch.cached.device)
                states = finish_forward(self._model, self._blocks, batch, ids)
                hidden.append(self._options.cache.store(states))
        return hidden

    def _perplexity(self, hidden: list[CachedTensor], dense: list[CachedTensor] | None = None) -> Perplexity:
        scores = []
        for number, part in enumerate(self._windows.split(self._batch_size)):
            reference = None if dense is None else dense[number].load()
            scores.append(score_tokens(self._model, hidden[number].load(), part, reference))
        return Perplexity.of(scores)
