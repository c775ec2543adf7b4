"""Greedy generation of a pruned model, compared with that of the dense model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dass_exp.engine.capture import eval_mode

PROMPT = 32  # tokens at the start of a window that are continued
GRAM = 4  # tokens in a row whose repetition is counted
_BATCH = 16  # prompts continued together, whatever eval.batch_size: rounding may decide between two likely tokens


@dataclass(frozen=True)
class Generation:
    """What a model generates, in four numbers.

    Args:
        prompts, tokens: how many prompts were continued, by how many tokens each.
        equal: share of the tokens that the dense model generates in their place.
        distinct_4: different sequences of four tokens over all of them; a model that repeats itself has few.
    """

    prompts: int
    tokens: int
    equal: float
    distinct_4: float

    @classmethod
    def of(cls, generated: Tensor, dense: Tensor) -> "Generation":
        """Compare int64 [prompts, tokens] with what the dense model generates after the same prompts."""
        grams = generated.unfold(1, GRAM, 1).reshape(-1, GRAM)
        distinct = len(grams.unique(dim=0)) / len(grams)
        return cls(len(generated), generated.shape[1], float((generated == dense).double().mean()), distinct)


@torch.no_grad()
def generate(model: Any, prompts: Tensor, tokens: int) -> Tensor:
    """Return the most likely continuation of each prompt, token by token, int64 [prompts, tokens].

    It is transformers' own greedy search, without what the model's generation config adds: penalties, sampling, and an
    end at the end-of-sequence token, which counts as any other.

    Args:
        model: a transformers causal language model, all in memory.
        prompts: int64 [prompts, tokens].
        tokens: how many are generated after each.
    """
    device, length = next(model.parameters()).device, prompts.shape[1]
    parts: list[Tensor] = []
    with eval_mode(model), _plain_generation(model, tokens):
        for part in prompts.split(_BATCH):
            ids = part.to(device)
            parts.append(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))[:, length:].cpu())
    return torch.cat(parts)


@contextmanager
def _plain_generation(model: Any, tokens: int) -> Iterator[None]:
    """Set the model's generation config aside: transformers would fill every gap of another one from it."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(max_new_tokens=tokens, do_sample=False, num_beams=1)
    try:
        yield
    finally:
        model.generation_config = own
