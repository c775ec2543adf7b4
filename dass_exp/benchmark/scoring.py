"""Time perplexity and zero-shot tasks against plain forward passes over the same tokens."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dass_exp.benchmark.measure import time_call
from dass_exp.engine.capture import eval_mode
from dass_exp.evaluate.perplexity import last_hidden_states, perplexity
from dass_exp.evaluate.zeroshot import ZeroShotOptions, zero_shot


def perplexity_ratio(model: Any, windows: Tensor, batch_size: int, repeats: int) -> dict[str, float]:
    """Compare perplexity with the model's own forward pass, logits included, over int64 [windows, tokens]."""
    batches = windows.split(batch_size)
    return _compare(lambda: perplexity(model, windows, batch_size), model, batches, repeats)


def divergence_ratio(model: Any, windows: Tensor, batch_size: int, repeats: int) -> float:
    """Compare perplexity and divergence from a dense model whose hidden states are kept with perplexity alone."""
    dense = last_hidden_states(model, windows, batch_size)
    pairs = [
        (
            time_call(lambda: perplexity(model, windows, batch_size)),
            time_call(lambda: perplexity(model, windows, batch_size, dense)),
        )
        for _ in range(repeats)
    ]
    return statistics.median(both / alone for alone, both in pairs)


def zero_shot_ratio(model: Any, tokenizer: Any, tasks: Sequence[str], limit: int, repeats: int) -> dict[str, float]:
    """Compare zero-shot tasks, lm-eval's own work included, with the model's forward pass without its head."""
    batches: list[Tensor] = []

    def score() -> None:
        zero_shot(model, tokenizer, tasks, limit, "offline", ZeroShotOptions())

    def record_input(module: Any, args: Any, kwargs: dict[str, Tensor]) -> None:
        batches.append(kwargs["input_ids"])

    with model.base_model.register_forward_pre_hook(record_input, with_kwargs=True):
        score()  # this first call also fetches and prepares the data
    return _compare(score, model.base_model, batches, repeats)


@torch.no_grad()
def _forward(model: Any, batches: Sequence[Tensor]) -> None:
    with eval_mode(model):
        for ids in batches:
            model(input_ids=ids, use_cache=False)


def _compare(score: Callable[[], Any], model: Any, batches: Sequence[Tensor], repeats: int) -> dict[str, float]:
    """Time scoring against plain forward passes of ``model`` over batches of int64 [sequences, tokens]."""
    pairs = [(time_call(lambda: _forward(model, batches)), time_call(score)) for _ in range(repeats)]
    tokens, seconds = sum(ids.numel() for ids in batches), statistics.median(scored for _, scored in pairs)
    return {
        "tokens": tokens,
        "plain_s": statistics.median(plain for plain, _ in pairs),
        "seconds": seconds,
        "ratio": statistics.median(scored / plain for plain, scored in pairs),
        "tokens_per_second": tokens / seconds,
    }
