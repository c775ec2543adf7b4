"""A model in two parts, its trunk and its head: the head runs only where a likelihood is read, a few positions at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dass_exp.errors import UserError

LOGITS = 1 << 25  # numbers of logits held at once: 128 MiB in float32, whatever the vocabulary


def last_hidden(model: Any, ids: Tensor) -> Tensor:
    """What the head would read: [sequences, tokens, features] for ``ids``, int64 [sequences, tokens]."""
    hidden: Tensor = getattr(model, "base_model", model)(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def check_head(model: Any, ids: Tensor) -> None:
    """See on a few tokens that trunk and head together are the model: some families scale or cap their logits in a way of their own.

    Args:
        model: a transformers causal language model.
        ids: int64 [sequences, tokens]; the first eight of the first sequence are tried.

    Raises:
        UserError: they are not.
    """
    ids = ids[:1, :8].to(next(model.parameters()).device)
    compare_head(model, model(input_ids=ids, use_cache=False).logits, last_hidden(model, ids))


def compare_head(model: Any, logits: Tensor, hidden: Tensor) -> None:
    """See that the model's own ``logits`` [1, tokens, words] are what its head makes of ``hidden`` [1, tokens, features].

    Raises:
        UserError: they are not.
    """
    whole = logits.float().flatten(0, 1)
    parts = torch.cat(
        [
            part
            for part, _ in _logits(
                model, hidden[0], torch.zeros(hidden.shape[1], dtype=torch.int64, device=hidden.device)
            )
        ]
    )
    if not torch.allclose(parts, whole, rtol=1e-2, atol=1e-2 * float(whole.abs().nan_to_num().amax()), equal_nan=True):
        name = getattr(model.config.get_text_config(), "model_type", type(model).__name__)
        raise UserError(
            f"model family {name!r}: its logits are not what its head gives, so it cannot be scored here; score another model"
        )


def losses(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """float32 [positions]: the negative log-likelihood of each target in nats, by a log-softmax in float32.

    Args:
        model: a transformers causal language model.
        hidden: [positions, features].
        targets: int64 [positions].
    """
    return torch.cat(
        [
            nn.functional.cross_entropy(logits, part, reduction="none")
            for logits, part in _logits(model, hidden, targets)
        ]
    )


def losses_and_hits(model: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`losses`, with bool [positions]: whether the target is the word that the model finds most likely."""
    found = [
        (nn.functional.cross_entropy(logits, part, reduction="none"), logits.argmax(-1) == part)
        for logits, part in _logits(model, hidden, targets)
    ]
    return torch.cat([loss for loss, _ in found]), torch.cat([hit for _, hit in found])


def _logits(model: Any, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """float32 [positions, words] and their targets, for some positions at a time."""
    head, cap = (
        model.get_output_embeddings(),
        getattr(model.config.get_text_config(), "final_logit_softcapping", None),
    )  # Gemma 2 caps softly
    rows = max(1, LOGITS // head.weight.shape[0])
    for states, part in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = head(states).float()
        yield (torch.tanh_(logits.div_(cap)).mul_(cap) if cap else logits), part
