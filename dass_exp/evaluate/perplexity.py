"""Perplexity over token windows, in pure torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dass_exp.engine.capture import evaluating
from dass_exp.errors import NumericalError, UserError
from dass_exp.evaluate.head import check_head, last_hidden, losses

_HIGHEST = 700.0  # nats per token: exp of more is no float


@dataclass(frozen=True)
class Perplexity:
    """exp of the total negative log-likelihood over the predicted tokens.

    Args:
        window_nll: mean negative log-likelihood per predicted token of each window, in nats.
        predicted: tokens predicted in each window: all but the first.
    """

    window_nll: list[float]
    predicted: int

    @property
    def value(self) -> float:
        """The perplexity."""
        return math.exp(math.fsum(self.window_nll) / len(self.window_nll))


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor, batch_size: int = 4) -> Perplexity:
    """Score windows of equal length, each on its own.

    The head runs on a few positions at a time, with the log-softmax in float32: the logits of a batch are never held together.

    Args:
        model: a transformers causal language model.
        tokens: int64 [windows, tokens].
        batch_size: windows that pass through the model together.

    Raises:
        UserError: a window has fewer than two tokens, or the model's logits are not those of its head.
        NumericalError: a likelihood, or the perplexity, is not finite.
    """
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2:
        raise UserError(
            f"tokens of shape {list(tokens.shape)}: expected [windows, tokens], each window with at least two tokens"
        )
    device = next(model.parameters()).device
    window_nll: list[float] = []
    with evaluating(model):
        check_head(model, tokens)
        for part in tokens.split(batch_size):
            ids = part.to(device)
            hidden = last_hidden(model, ids)[:, :-1]
            found = losses(model, hidden.reshape(-1, hidden.shape[-1]), ids[:, 1:].reshape(-1))
            window_nll += found.view(len(ids), -1).double().mean(1).tolist()
    return checked(Perplexity(window_nll, tokens.shape[1] - 1))


def checked(found: Perplexity) -> Perplexity:
    """What was found, if it is a number.

    Raises:
        NumericalError: a likelihood, or the perplexity, is not finite.
    """
    if not sum(found.window_nll) / len(found.window_nll) < _HIGHEST:
        raise NumericalError("perplexity: the model's logits hold numbers that are not finite")
    return found
