"""Perplexity against transformers' own loss, and against probabilities that are known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dass_exp.errors import NumericalError, UserError
from dass_exp.evaluate import head
from dass_exp.evaluate.perplexity import perplexity
from dass_exp.models.families import FAMILIES


class Table(nn.Module):
    """Predicts the next token from the last one by a table of probabilities [token, next token]."""

    def __init__(self, probabilities: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(*probabilities.T.shape, bias=False)
        self.head.weight.data = probabilities.log().T.contiguous()
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        assert not self.training
        hidden = nn.functional.one_hot(input_ids, self.head.in_features).float()
        return SimpleNamespace(last_hidden_state=hidden, logits=self.head(hidden))


HALVES = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [1 / 8, 3 / 4, 1 / 8], [1 / 3, 1 / 3, 1 / 3]])


def test_known_probabilities():
    """Window 0 1 2: 1/4 and 1/8, the root of 32. Window 2 0 0: 1/3 and 1/2, the root of 6."""
    scored = perplexity(Table(HALVES), torch.tensor([[0, 1, 2], [2, 0, 0]]))
    assert scored.predicted == 2
    assert [math.exp(nll) for nll in scored.window_nll] == pytest.approx([32**0.5, 6**0.5], rel=1e-6)
    assert scored.value == pytest.approx((4 * 8 * 3 * 2) ** (1 / 4), rel=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equals_the_loss_of_transformers(family, tiny_model, tokens):
    model = tiny_model(family)
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in tokens]
    scored = perplexity(model, tokens, batch_size=2)
    assert scored.window_nll == pytest.approx(losses, rel=1e-5)
    assert scored.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert scored.predicted == tokens.shape[1] - 1


def test_the_soft_cap_of_the_tiny_model_matters(tiny_model, tokens):
    """Otherwise the test above would not see that it was forgotten."""
    capped, free = tiny_model("gemma2"), tiny_model("gemma2", final_logit_softcapping=None)
    assert abs(perplexity(capped, tokens).value / perplexity(free, tokens).value - 1) > 0.01


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("rows", [0.5, 1, 3, 7, 22])
def test_a_head_in_pieces_gives_the_same(family, rows, tiny_model, tokens, monkeypatch):
    model, heads = tiny_model(family), []
    whole = perplexity(model, tokens, batch_size=2).window_nll
    model.lm_head.register_forward_hook(lambda module, args, output: heads.append(output.shape[:-1]))
    monkeypatch.setattr(head, "MAX_LOGITS", int(rows * model.config.vocab_size))
    assert perplexity(model, tokens, batch_size=2).window_nll == pytest.approx(whole, rel=1e-6)
    assert heads.pop(0) == (1, 8)  # the model's own, compared with the head's on the first eight tokens
    assert max(heads) == (max(1, int(rows)),)
    assert sum(count for (count,) in heads) == 8 + 5 * 11


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_the_batch_size_changes_nothing(family, tiny_model, tokens):
    model = tiny_model(family)
    whole = perplexity(model, tokens, batch_size=5).window_nll
    for batch_size in (1, 2, 3, 8):
        assert perplexity(model, tokens, batch_size).window_nll == pytest.approx(whole, rel=1e-6)


def test_logits_in_bfloat16_are_scored_in_float32(tiny_model, tokens):
    model = tiny_model("llama").bfloat16()
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].float()
    expected = [float(nn.functional.cross_entropy(*window)) for window in zip(logits, tokens[:, 1:], strict=True)]
    assert perplexity(model, tokens, batch_size=5).window_nll == pytest.approx(expected, rel=1e-6)


def test_dropout_is_off_meanwhile_and_the_mode_of_each_module_is_restored(tiny_model, tokens):
    """A user may hold part of a model in evaluation mode."""
    model = tiny_model("llama", attention_dropout=0.5)
    expected = perplexity(model, tokens).value
    model.train().model.layers[0].eval()
    before = [part.training for part in model.modules()]
    assert perplexity(model, tokens).value == expected
    assert [part.training for part in model.modules()] == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_stop_the_run(bad, tiny_model, tokens):
    model = tiny_model("llama").train()
    model.lm_head.weight.data[tokens[4, 3]] = bad
    with pytest.raises(NumericalError, match="perplexity: the model's logits hold numbers that are not finite"):
        perplexity(model, tokens)
    assert model.training


def test_a_token_that_is_held_impossible_stops_the_run():
    """Its likelihood is infinite, not NaN."""
    model = Table(HALVES)
    model.head.register_forward_hook(lambda head, args, logits: logits.index_fill(-1, torch.tensor([1]), -math.inf))
    assert perplexity(model, torch.tensor([[0, 2, 0]])).predicted == 2
    with pytest.raises(NumericalError, match="not finite"):
        perplexity(model, torch.tensor([[0, 1, 2]]))


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 0), (0, 5), (1, 2, 3)])
def test_tokens_that_are_no_windows_are_refused(shape, tiny_model):
    with pytest.raises(UserError, match="expected"):
        perplexity(tiny_model("llama"), torch.zeros(shape, dtype=torch.int64))
