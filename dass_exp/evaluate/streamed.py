"""Perplexity of the dense and of the pruned model from one walk through the blocks: windows go through each beside the calibration tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dass_exp.engine.activation_cache import ON_DEVICE, Cache
from dass_exp.engine.capture import Batch, behind, capture, evaluating, put
from dass_exp.evaluate.head import compare_head, losses
from dass_exp.evaluate.perplexity import Perplexity, checked
from dass_exp.models.decoder import decoder_of


class StreamedPerplexity:
    """Two sets of hidden states of the same windows, one for each of the two models.

    Args:
        model: a transformers causal language model, whose blocks need not be in memory.
        windows: int64 [windows, tokens].
        batch_size: windows that pass through a block together.
        roles: the roles of a family that the table does not know.
        returns_tuple: as in :func:`dass_exp.engine.capture.capture`.
        cache: where hidden states wait.
    """

    def __init__(
        self,
        model: Any,
        windows: Tensor,
        batch_size: int,
        roles: Any = None,
        returns_tuple: bool | None = None,
        cache: Cache = ON_DEVICE,
    ) -> None:
        self._model, self._windows, self._batch_size = model, windows, batch_size
        self._blocks = list(decoder_of(model, roles).blocks)
        self._returns_tuple, self._cache = returns_tuple, cache
        self._dense: list[Batch] = []
        self._pruned: list[Batch] = []

    @property
    def returns_tuple(self) -> bool:
        """Whether blocks give a tuple."""
        return self._dense[0].returns_tuple

    @property
    def hidden(self) -> dict[str, list[Tensor]]:
        """What must be known to go on behind the last block that passed: hidden states by whose they are, a tensor for each batch."""
        return {name: [batch.held.at_rest() for batch in batches] for name, batches in self._sets().items()}

    @hidden.setter
    def hidden(self, known: dict[str, list[Tensor]]) -> None:
        self._begin()
        for name, batches in self._sets().items():
            put(batches, known[name])

    @torch.no_grad()
    def before(self, index: int) -> None:
        """Block ``index`` is in memory and dense."""
        with evaluating(self._model):
            if not self._dense:
                self._begin()
            self._pass(self._dense, index)

    @torch.no_grad()
    def after(self, index: int) -> None:
        """Block ``index`` is in memory and pruned."""
        with evaluating(self._model):
            self._pass(self._pruned, index)

    @torch.no_grad()
    def dense(self) -> Perplexity:
        """Of the dense model, once all blocks have passed."""
        return self._read(self._dense)

    @torch.no_grad()
    def pruned(self) -> Perplexity:
        """Of the pruned model, once all blocks have passed."""
        return self._read(self._pruned)

    @torch.no_grad()
    def _begin(self) -> None:
        self._dense = capture(
            self._model, self._blocks, self._windows, self._batch_size, self._returns_tuple, self._cache
        )
        self._pruned = [batch.again() for batch in self._dense]
        few, ids = (
            Batch(self._dense[0].hidden[:1, :8], [], self._dense[0].returns_tuple),
            self._windows[:1, :8],
        )  # a wrong head is said now, not at the end
        compare_head(
            self._model,
            behind(self._model, self._blocks, few, ids, whole=True),
            behind(self._model, self._blocks, few, ids),
        )

    def _sets(self) -> dict[str, list[Batch]]:
        return {"windows, dense": self._dense, "windows, pruned": self._pruned}

    def _pass(self, batches: list[Batch], index: int) -> None:
        for batch in batches:
            batch.hidden = batch.through(self._blocks[index], index)

    def _read(self, batches: list[Batch]) -> Perplexity:
        window_nll: list[float] = []
        with evaluating(self._model):
            for batch, part in zip(batches, self._windows.split(self._batch_size), strict=True):
                ids = part.to(batch.held.device)
                hidden = behind(self._model, self._blocks, batch, ids)[:, :-1]
                found = losses(self._model, hidden.reshape(-1, hidden.shape[-1]), ids[:, 1:].reshape(-1))
                window_nll += found.view(len(ids), -1).double().mean(1).tolist()
        return checked(Perplexity(window_nll, self._windows.shape[1] - 1))
