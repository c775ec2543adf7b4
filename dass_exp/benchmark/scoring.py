"""Time perplexity and zero-shot against a plain forward pass over the same tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dass_exp.benchmark.measure import seconds
from dass_exp.engine.capture import evaluating
from dass_exp.evaluate.perplexity import perplexity
from dass_exp.evaluate.zeroshot import Options, zero_shot


def perplexity_ratio(model: Any, windows: Tensor, batch_size: int, repeats: int) -> dict[str, float]:
    """Perplexity against the model's own forward, logits included, over the same windows (int64 [windows, tokens]) in the same batches."""
    return _against(
        lambda: perplexity(model, windows, batch_size),
        lambda: _plain(model, windows.split(batch_size)),
        windows.numel(),
        repeats,
    )


def zero_shot_ratio(model: Any, tokenizer: Any, tasks: Sequence[str], limit: int, repeats: int) -> dict[str, float]:
    """Zero-shot by lm-eval, from the documents to the scores, against the model's forward without its head over the batches that it was asked about."""
    batches: list[Tensor] = []

    def score() -> None:
        zero_shot(model, tokenizer, tasks, limit, "offline", Options())

    with _noting(model.base_model, batches):
        score()  # a first time, which also fetches and prepares the data
    return _against(score, lambda: _plain(model.base_model, batches), sum(ids.numel() for ids in batches), repeats)


@contextmanager
def _noting(trunk: Any, batches: list[Tensor]) -> Iterator[None]:
    hook = trunk.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs["input_ids"]), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _plain(model: Any, batches: Sequence[Tensor]) -> None:
    """A forward over batches of int64 [sequences, tokens], nothing read from it."""
    with evaluating(model):
        for ids in batches:
            model(input_ids=ids, use_cache=False)


def _against(scoring: Callable[[], Any], bare: Callable[[], Any], tokens: int, repeats: int) -> dict[str, float]:
    pairs = [(seconds(bare), seconds(scoring)) for _ in range(repeats)]
    taken = statistics.median(ours for _, ours in pairs)
    return {
        "tokens": tokens,
        "plain_s": statistics.median(plainly for plainly, _ in pairs),
        "seconds": taken,
        "ratio": statistics.median(ours / plainly for plainly, ours in pairs),
        "tokens_per_second": tokens / taken,
    }
