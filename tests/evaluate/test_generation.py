"""Greedy generation against a loop over whole sequences, and its two numbers by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from dass_exp.evaluate.generation import Generation, generate


@pytest.fixture(name="model")
def model_fixture(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny)


def by_hand(model, prompts, tokens):
    """The most likely token again and again, without a cache."""
    ids = prompts
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[:, prompts.shape[1] :]


@torch.no_grad()
def test_it_is_the_most_likely_token_each_time_whatever_the_model_suggests(model):
    prompts = torch.randint(3, 512, (19, 7), generator=torch.Generator().manual_seed(0))  # more than one batch
    expected = by_hand(model, prompts, 6)
    assert len(expected.unique(dim=0)) > 10
    own = model.generation_config
    # what a model on the hub may ask for, and an end that a continuation would meet
    own.update(
        do_sample=True, temperature=2.0, repetition_penalty=3.0, eos_token_id=int(expected[0, 2]), pad_token_id=0
    )
    own.update(max_length=9, num_beams=2)
    model.train()
    assert torch.equal(generate(model, prompts, 6), expected)
    assert model.generation_config is own
    assert model.training


def test_the_two_numbers():
    dense = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]])
    pruned = torch.tensor([[1, 2, 3, 4, 5], [9, 1, 2, 3, 4]])
    # 1234 2345 | 9123 1234: three of four are distinct; five of ten tokens are those of the dense model
    assert Generation.of(pruned, dense) == Generation(2, 5, 0.5, 0.75)
    assert Generation.of(dense, dense) == Generation(2, 5, 1.0, 0.75)
    assert Generation.of(torch.full((2, 6), 7), torch.zeros(2, 6)) == Generation(2, 6, 0.0, 1 / 6)
