"""Log-likelihoods of continuations, as multiple-choice tasks need them, in pure torch."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dass_exp.engine.capture import eval_mode
from dass_exp.errors import UserError
from dass_exp.evaluate.head import check_head, last_hidden, losses_and_hits

Request = tuple[Sequence[int], Sequence[int]]
Score = tuple[float, bool]


@torch.no_grad()
def loglikelihoods(
    model: Any,
    requests: Sequence[Request],
    batch_size: int,
    max_length: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Score]:
    """Return the log-likelihood of each continuation, and whether greedy decoding would give it.

    Sequences of similar length are batched, a sequence shared by several requests (single-token answers to the same
    question) runs once, and the head runs only at positions that predict a continuation.

    Args:
        model: a transformers causal language model.
        requests: token ids of the context and of its continuation, at least one each.
        batch_size: sequences that pass through the model together.
        max_length: tokens that the model takes; longer sequences are truncated on the left.
        advance: called once for every ``batch_size`` requests, the last of which may be fewer.

    Returns:
        nats, summed over the continuation, and the greedy flag, in the order of the requests.

    Raises:
        UserError: a continuation is empty or longer than the model takes, or the model's logits are not its head's.
    """
    if bad := [len(continuation) for _, continuation in requests if not 0 < len(continuation) <= max_length]:
        limits = f"this model takes 1 to {max_length}: choose other tasks"
        raise UserError(f"eval.zeroshot.tasks: an answer of {bad[0]} tokens cannot be scored; {limits}")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if (largest := max((max(*context, *answer, 0) for context, answer in requests), default=0)) >= vocabulary:
        raise UserError(
            f"eval.zeroshot.tasks: the tokenizer gives the token {largest}, and the embedding of the model has "
            f"{vocabulary} rows; the tokenizer belongs to another model"
        )
    numbers: dict[tuple[int, ...], list[int]] = {}  # of the requests, by the sequence that they share
    for number, (context, continuation) in enumerate(requests):
        numbers.setdefault((*context, *continuation)[-max_length - 1 : -1], []).append(number)
    scores: dict[int, Score] = {}
    sequences = sorted(numbers, key=len, reverse=True)  # the batch that needs most memory comes first
    with eval_mode(model):
        if sequences:
            check_head(model, torch.tensor([sequences[0]]))
        for start in range(0, len(sequences), batch_size):
            batch = sequences[start : start + batch_size]
            rows = [(row, number) for row, sequence in enumerate(batch) for number in numbers[sequence]]
            answers = [(row, requests[number][1]) for row, number in rows]
            before = math.ceil(len(scores) / batch_size)
            for (_, number), score in zip(rows, _score(model, batch, answers), strict=True):
                scores[number] = score
            for _ in range(math.ceil(len(scores) / batch_size) - before):
                advance()
    return [scores[number] for number in range(len(requests))]


def _score(model: Any, batch: Sequence[Sequence[int]], answers: Sequence[tuple[int, Sequence[int]]]) -> list[Score]:
    """Score answers, each given with the row of ``batch`` (sorted, longest first) that ends with it."""
    device = next(model.parameters()).device
    ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence)] = torch.tensor(sequence)  # padded on the right, where causal attention cannot see
    tokens = torch.tensor([token for _, answer in answers for token in answer])
    moved = torch.cat([ids.flatten(), tokens]).to(device)  # one wait for an accelerator
    hidden = last_hidden(model, moved[: ids.numel()].view_as(ids))
    ends = [hidden[row, len(batch[row]) - len(answer) : len(batch[row])] for row, answer in answers]
    losses, hits = losses_and_hits(model, torch.cat(ends), moved[ids.numel() :])
    lengths = [len(answer) for _, answer in answers]
    sums = torch.stack([loss.sum() for loss in losses.split(lengths)])
    right = torch.stack([hit.all() for hit in hits.split(lengths)])
    numbers = torch.stack([sums.double(), right.double()]).tolist()  # and one more
    return [(-total, bool(equal)) for total, equal in zip(*numbers, strict=True)]
