"""Score a model's last hidden states with its head, a few positions at a time, so that logits need little memory."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dass_exp.errors import UserError

_SUMMED = 64  # tokens whose sum is float32
MAX_LOGITS = 1 << 25  # logits computed at a time: 128 MiB in float32, whatever the vocabulary


def last_hidden(model: Any, ids: Tensor) -> Tensor:
    """Return the input of the head, [sequences, tokens, features], for ``ids``, int64 [sequences, tokens]."""
    hidden: Tensor = getattr(model, "base_model", model)(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def check_head(model: Any, ids: Tensor) -> None:
    """Raise a UserError unless applying the head reproduces the model's logits: some families rescale theirs.

    Compared on the first eight tokens of ``ids``, int64 [sequences, tokens].
    """
    ids = ids[:1, :8].to(next(model.parameters()).device)
    compare_head(model, model(input_ids=ids, use_cache=False).logits, last_hidden(model, ids))


def compare_head(model: Any, logits: Tensor, hidden: Tensor) -> None:
    """Raise a UserError unless the head maps ``hidden`` [1, tokens, features] to ``logits`` [1, tokens, vocabulary]."""
    expected = logits.float().flatten(0, 1)
    computed = torch.cat(list(_logits(model, hidden[0]))).to(expected.device)  # the head may lie on another one
    tolerance = 1e-2 * float(expected.abs().nan_to_num().amax())
    if not torch.allclose(computed, expected, rtol=1e-2, atol=tolerance, equal_nan=True):
        name = getattr(model.config.get_text_config(), "model_type", type(model).__name__)
        problem = "its logits are not what its head gives, so it cannot be scored here"
        raise UserError(f"model family {name!r}: {problem}; score another model")


def token_losses(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target in nats, float32 [positions], by a log-softmax in float32.

    ``hidden`` is [positions, features], the input of the head; ``targets`` is int64 [positions].
    """
    parts = zip(_logits(model, hidden), targets.split(positions_at_once(model)), strict=True)
    return torch.cat([cross_entropy(logits, part, reduction="none") for logits, part in parts])


def losses_and_hits(model: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return :func:`token_losses`, and bool [positions]: whether the target is the most likely token."""
    losses, hits = [], []
    for logits, part in zip(_logits(model, hidden), targets.split(positions_at_once(model)), strict=True):
        losses.append(cross_entropy(logits, part, reduction="none"))
        hits.append(logits.argmax(-1) == part)
    return torch.cat(losses), torch.cat(hits)


def losses_and_divergence(
    model: Any, hidden: Tensor, dense: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return :func:`token_losses`, and how the predictions differ from those of the dense model.

    With p the dense model's probabilities and z, y the logits of both models, the Kullback-Leibler divergence of a
    position is sum(p (z - y)) - logsumexp(z) + logsumexp(y); sums over the vocabulary are float64, of float32 sums of
    64 tokens each.

    Args:
        model: gives the head, which is that of the dense model too: it is never pruned.
        hidden: [positions, features], the input of the head.
        dense: the same of the dense model.
        targets: int64 [positions].

    Returns:
        the losses, float32 [positions]; KL(dense || model) in nats, float64 [positions]; bool [positions], whether
        both models hold the same token for the most likely one; the losses of the dense model, float64 [positions].
    """
    losses, divergences, agreements, dense_losses = [], [], [], []
    of_both = zip(_logits(model, hidden), _logits(model, dense), targets.split(positions_at_once(model)), strict=True)
    for logits, reference, part in of_both:
        loss = cross_entropy(logits, part, reduction="none")
        top, likeliest = reference.max(-1, keepdim=True)
        agreements.append(logits.argmax(-1) == likeliest[:, 0])
        log_total = loss.double() + logits.gather(1, part[:, None])[:, 0]
        of_target = reference.gather(1, part[:, None])[:, 0]
        difference = logits.neg_().add_(reference)  # in place: a matrix of this size takes as long to allocate
        weights = reference.sub_(top).exp_()
        total = _sum(weights)
        dense_log_total = total.log() + top[:, 0]
        dense_losses.append(dense_log_total - of_target)
        gap = _sum(weights.mul_(difference))
        divergences.append((gap / total - dense_log_total + log_total).clamp_min_(0))  # rounding aside
        losses.append(loss)
    return torch.cat(losses), torch.cat(divergences), torch.cat(agreements), torch.cat(dense_losses)


def _sum(values: Tensor) -> Tensor:
    """Return the sum of each row in float64; torch would first copy the whole matrix to float64."""
    whole = values.shape[1] // _SUMMED * _SUMMED
    in_float32 = values[:, :whole].unflatten(1, (-1, _SUMMED)).sum(-1)
    return in_float32.sum(-1, dtype=torch.float64) + values[:, whole:].sum(-1, dtype=torch.float64)


def training_losses(model: Any, hidden: Tensor, targets: Tensor, dense: Tensor | None) -> Tensor:
    """Return the loss of each position, float32 [positions], with gradients; all logits are in memory at once.

    Args:
        model: gives the head.
        hidden: [positions, features], the input of the head.
        targets: int64 [positions], whose negative log-likelihood is the loss.
        dense: as ``hidden``, of the dense model: the loss is then KL(dense || model) in nats. Or None.
    """
    logits = _logits_of(model, hidden)
    if dense is None:
        return cross_entropy(logits, targets, reduction="none")
    with torch.no_grad():
        reference = _logits_of(model, dense).log_softmax(-1)
    return (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)


def _logits(model: Any, hidden: Tensor) -> Iterator[Tensor]:
    """Yield the logits, float32 [positions, vocabulary], of some positions at a time."""
    return (_logits_of(model, states) for states in hidden.split(positions_at_once(model)))


def _logits_of(model: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2
    if not cap:
        return logits
    # in place, unless the result of tanh is needed for its gradient
    return (logits / cap).tanh() * cap if logits.requires_grad else torch.tanh_(logits.div_(cap)).mul_(cap)


def positions_at_once(model: Any) -> int:
    """Return how many positions the head scores at a time."""
    return max(1, MAX_LOGITS // model.get_output_embeddings().weight.shape[0])
