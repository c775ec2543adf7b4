"""Perplexity over token windows, in pure torch."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dass_exp.engine.capture import eval_mode
from dass_exp.errors import NumericalError, UserError
from dass_exp.evaluate.head import check_head, last_hidden, token_losses

_MAX_NLL = 700.0  # nats per token; exp of more overflows a float


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood per predicted token.

    Raises:
        NumericalError: the mean over the windows is not finite, or too large for its exp.
    """

    window_nll: list[float]  # mean negative log-likelihood per predicted token of each window, in nats
    predicted: int  # tokens predicted in each window: all but the first

    def __post_init__(self) -> None:
        if not sum(self.window_nll) / len(self.window_nll) < _MAX_NLL:
            raise NumericalError("perplexity: the model's logits hold numbers that are not finite")

    @property
    def value(self) -> float:
        """The perplexity."""
        return math.exp(math.fsum(self.window_nll) / len(self.window_nll))


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor, batch_size: int = 4) -> Perplexity:
    """Score windows of equal length independently; ``tokens`` is int64 [windows, tokens].

    Raises:
        UserError: a window has fewer than two tokens, or the model's logits are not those of its head.
        NumericalError: a likelihood, or the perplexity, is not finite.
    """
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2:
        expected = "[windows, tokens], each window with at least two tokens"
        raise UserError(f"tokens of shape {list(tokens.shape)}: expected {expected}")
    device = next(model.parameters()).device
    nll: list[float] = []
    with eval_mode(model):
        check_head(model, tokens)
        for part in tokens.split(batch_size):
            ids = part.to(device)
            nll += window_nll(model, last_hidden(model, ids), ids)
    return Perplexity(nll, tokens.shape[1] - 1)


def window_nll(model: Any, hidden: Tensor, ids: Tensor) -> list[float]:
    """Return the mean negative log-likelihood of each window's tokens after the first, in nats.

    ``hidden`` is [windows, tokens, features], the input of the head; ``ids`` is int64 [windows, tokens].
    """
    hidden = hidden[:, :-1]
    losses = token_losses(model, hidden.reshape(-1, hidden.shape[-1]), ids[:, 1:].reshape(-1))
    nll: list[float] = losses.view(len(ids), -1).double().mean(1).tolist()
    return nll
