"""Log-likelihoods of continuations, in pure torch: what a multiple-choice task asks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dass_exp.engine.capture import evaluating
from dass_exp.errors import UserError
from dass_exp.evaluate.head import check_head, last_hidden, losses_and_hits

Request = tuple[Sequence[int], Sequence[int]]


@torch.no_grad()
def loglikelihoods(model: Any, requests: Sequence[Request], batch_size: int, longest: int) -> list[tuple[float, bool]]:
    """The log-likelihood of each continuation, and whether it is what greedy decoding would give.

    Sequences of like length pass through the model together, one that several requests share passes once (answers of one token after the same
    question), and the head runs on the positions only that predict a continuation.

    Args:
        model: a transformers causal language model.
        requests: tokens of the context and of its continuation, at least one each.
        batch_size: sequences that pass through the model together.
        longest: tokens that the model takes; of a longer sequence the first ones are left out.

    Returns:
        nats, summed over the continuation, and the greedy flag, in the order of the requests.

    Raises:
        UserError: an answer is empty or longer than the model takes, or the model's logits are not those of its head.
    """
    if wrong := [len(answer) for _, answer in requests if not 0 < len(answer) <= longest]:
        raise UserError(
            f"eval.zeroshot.tasks: an answer of {wrong[0]} tokens cannot be scored; this model takes 1 to {longest}: choose other tasks"
        )
    asked: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(requests):
        asked.setdefault((*context, *continuation)[-longest - 1 : -1], []).append(number)
    found: dict[int, tuple[float, bool]] = {}
    sequences = sorted(asked, key=len, reverse=True)  # what needs most memory comes first
    with evaluating(model):
        if sequences:
            check_head(model, torch.tensor([sequences[0]]))
        for start in range(0, len(sequences), batch_size):
            batch = sequences[start : start + batch_size]
            places = [(row, number) for row, sequence in enumerate(batch) for number in asked[sequence]]
            answers = [requests[number][1] for _, number in places]
            scores = _score(model, batch, [row for row, _ in places], answers)
            found |= {number: score for (_, number), score in zip(places, scores, strict=True)}
    return [found[number] for number in range(len(requests))]


def _score(
    model: Any, batch: Sequence[Sequence[int]], rows: Sequence[int], answers: Sequence[Sequence[int]]
) -> list[tuple[float, bool]]:
    """Scores of some answers, each at the end of one row of a batch."""
    device = next(model.parameters()).device
    ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence)] = torch.tensor(sequence)  # what follows it cannot be seen from within
    hidden = last_hidden(model, ids.to(device))
    read = [
        hidden[row, len(batch[row]) - len(answer) : len(batch[row])] for row, answer in zip(rows, answers, strict=True)
    ]
    targets = torch.tensor([token for answer in answers for token in answer], device=device)
    losses, hits = losses_and_hits(model, torch.cat(read), targets)
    lengths = [len(answer) for answer in answers]
    return [
        (-_total(loss), bool(hit.all())) for loss, hit in zip(losses.split(lengths), hits.split(lengths), strict=True)
    ]


def _total(loss: Tensor) -> float:
    return float(loss.sum())
