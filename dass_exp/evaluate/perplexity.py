"""Perplexity over token windows, and the divergence from the dense model on them, in pure torch."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dass_exp.engine.capture import eval_mode
from dass_exp.errors import NumericalError, UserError
from dass_exp.evaluate.head import check_head, last_hidden, losses_and_divergence, token_losses

_MAX_NLL = 700.0  # nats per token; exp of more overflows a float
_PARTS = 16  # of a window, for the loss by position


class TokenScores(NamedTuple):
    """Scores of the predicted tokens of some windows, float64 [windows, positions] each."""

    nll: Tensor  # negative log-likelihood in nats
    kl: Tensor | None = None  # KL(dense || model) in nats
    agreement: Tensor | None = None  # 1 where the dense model's most likely token is the model's
    dense_nll: Tensor | None = None  # of the dense model


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood per predicted token.

    Args:
        window_nll: mean negative log-likelihood per predicted token of each window, in nats.
        predicted: tokens predicted in each window: all but the first.
        position_nll: the same by position: means over all windows of at most 16 equal parts of the window, in order.
        window_kl: mean KL(dense || model) per predicted token of each window, in nats; None without a dense model.
        window_agreement: share of the positions of each window at which both models predict the same token.
        ratio: of the perplexity to the dense model's.

    Raises:
        NumericalError: the mean over the windows is not finite, or too large for its exp.
    """

    window_nll: list[float]
    predicted: int
    position_nll: list[float]
    window_kl: list[float] | None = None
    window_agreement: list[float] | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        if not sum(self.window_nll) / len(self.window_nll) < _MAX_NLL:
            raise NumericalError("perplexity: the model's logits hold numbers that are not finite")

    @classmethod
    def of(cls, scores: Iterable[TokenScores]) -> "Perplexity":
        """Put together what :func:`score_tokens` gave for the batches of windows, in order."""
        nll, *compared = ([part for part in parts if part is not None] for parts in zip(*scores, strict=True))
        losses = torch.cat(nll)
        parts = losses.mean(0).tensor_split(min(_PARTS, losses.shape[1]))
        by_position = [float(part.mean()) for part in parts]
        if not all(compared):
            return cls(losses.mean(1).tolist(), losses.shape[1], by_position)
        kl, agreement, dense = (torch.cat(parts) for parts in compared)
        ratio = math.exp(min(float((losses - dense).mean()), _MAX_NLL))
        of_windows = kl.mean(1).tolist(), agreement.mean(1).tolist()
        return cls(losses.mean(1).tolist(), losses.shape[1], by_position, of_windows[0], of_windows[1], ratio)

    @property
    def value(self) -> float:
        """The perplexity."""
        return math.exp(_mean(self.window_nll))

    @property
    def kl(self) -> float | None:
        """Mean KL(dense || model) per predicted token, in nats."""
        return None if self.window_kl is None else _mean(self.window_kl)

    @property
    def agreement(self) -> float | None:
        """Share of the positions at which the most likely token is that of the dense model."""
        return None if self.window_agreement is None else _mean(self.window_agreement)


@torch.no_grad()
def perplexity(
    model: Any,
    tokens: Tensor,
    batch_size: int = 4,
    dense: Tensor | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Perplexity:
    """Score windows of equal length independently.

    Args:
        model: a transformers causal language model.
        tokens: int64 [windows, tokens].
        batch_size: windows that pass through the model together.
        dense: :func:`last_hidden_states` of the dense model for the same windows, to measure how far it is.
        advance: called after each batch.

    Raises:
        UserError: a window has fewer than two tokens, or the model's logits are not those of its head.
        NumericalError: a likelihood, or the perplexity, is not finite.
    """
    _check_windows(tokens)
    device = next(model.parameters()).device
    with eval_mode(model):
        check_head(model, tokens)
        references: Sequence[Tensor | None] = [None] * len(tokens) if dense is None else dense.split(batch_size)
        scores = []
        for part, reference in zip(tokens.split(batch_size), references, strict=dense is not None):
            ids = part.to(device)
            scores.append(score_tokens(model, last_hidden(model, ids), ids, reference))
            advance()
    return Perplexity.of(scores)


@torch.no_grad()
def last_hidden_states(
    model: Any, tokens: Tensor, batch_size: int = 4, advance: Callable[[], None] = lambda: None
) -> Tensor:
    """Return the input of the head for windows: [windows, tokens, features] in the model's dtype, on the CPU.

    ``tokens`` is int64 [windows, tokens]; ``batch_size`` windows pass through the model together, and ``advance`` is
    called after each batch.
    """
    _check_windows(tokens)
    device, states = next(model.parameters()).device, []
    with eval_mode(model):
        for part in tokens.split(batch_size):
            states.append(last_hidden(model, part.to(device)).cpu())
            advance()
    return torch.cat(states)


@torch.no_grad()
def perplexity_of_hidden(model: Any, hidden: Tensor, tokens: Tensor, batch_size: int = 4) -> Perplexity:
    """Score windows whose :func:`last_hidden_states` are known; the same number as :func:`perplexity`."""
    with eval_mode(model):
        check_head(model, tokens)
        batches = zip(hidden.split(batch_size), tokens.split(batch_size), strict=True)
        return Perplexity.of([score_tokens(model, states, ids) for states, ids in batches])


def score_tokens(model: Any, hidden: Tensor, ids: Tensor, dense: Tensor | None = None) -> TokenScores:
    """Score the tokens of windows after the first.

    Args:
        model: gives the head.
        hidden: [windows, tokens, features], the input of the head, on any device.
        ids: int64 [windows, tokens].
        dense: as ``hidden``, of the dense model; None to measure no divergence.
    """
    device = model.get_output_embeddings().weight.device
    targets = ids[:, 1:].reshape(-1).to(device)
    states = hidden[:, :-1].reshape(-1, hidden.shape[-1]).to(device)
    shape = len(ids), ids.shape[1] - 1
    if dense is None:
        return TokenScores(token_losses(model, states, targets).double().view(shape).cpu())
    reference = dense[:, :-1].reshape(-1, dense.shape[-1]).to(device)
    scores = losses_and_divergence(model, states, reference, targets)
    return TokenScores(*(entry.double().view(shape).cpu() for entry in scores))


def _check_windows(tokens: Tensor) -> None:
    if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2:
        expected = "[windows, tokens], each window with at least two tokens"
        raise UserError(f"tokens of shape {list(tokens.shape)}: expected {expected}")


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
