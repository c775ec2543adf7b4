"""Perplexity against transformers' own loss, and against probabilities that are known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dass_exp.errors import NumericalError, UserError
from dass_exp.evaluate import head
from dass_exp.evaluate.perplexity import Perplexity, TokenScores, last_hidden_states, perplexity, perplexity_of_hidden
from dass_exp.models.decoder import decoder_of
from dass_exp.models.families import FAMILIES


class Table(nn.Module):
    """Predicts the next token from the last one by a table of probabilities [token, next token]."""

    def __init__(self, probabilities: Tensor, shift: int = 0) -> None:
        super().__init__()
        self.shift = shift  # the row of the table for token 0
        self.head = nn.Linear(*probabilities.shape, bias=False)
        self.head.weight.data = probabilities.log().T.contiguous()
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        assert not self.training
        hidden = nn.functional.one_hot(input_ids + self.shift, self.head.in_features).float()
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


# --- divergence from the dense model


def test_divergence_of_known_probabilities():
    """The dense model predicts 1/2 1/4 1/4 after token 0, the other one 1/4 1/2 1/4; after 1 both predict the same."""
    both = HALVES.repeat(2, 1)  # one head, as a dense and a pruned model have
    both[3] = torch.tensor([1 / 4, 1 / 2, 1 / 4])
    windows = torch.tensor([[0, 0, 0], [0, 1, 1], [1, 1, 1]])
    dense = last_hidden_states(Table(both), windows)
    scored = perplexity(Table(both, shift=3), windows, 2, dense)
    kl = math.log(2) / 2 - math.log(2) / 4
    assert scored.window_kl == pytest.approx([kl, kl / 2, 0], abs=1e-6)
    assert scored.window_agreement == [0, 1 / 2, 1]
    # 1/4 instead of 1/2 twice; 1/2 instead of 1/4 once
    assert scored.ratio == pytest.approx((2 * 2 / 2) ** (1 / 6), rel=1e-6)
    assert scored.position_nll == pytest.approx(
        [(math.log(4) + math.log(2) - math.log(3 / 4)) / 3, (math.log(4) - 2 * math.log(3 / 4)) / 3]
    )


@pytest.mark.parametrize("rows", [3, 1000])
@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_divergence_equals_that_of_full_logits_in_float64(family, rows, tiny_model, tokens, monkeypatch):
    model = tiny_model(family)
    monkeypatch.setattr(head, "MAX_LOGITS", int(rows * model.config.vocab_size))
    dense, logits = last_hidden_states(model, tokens, 2), model(tokens).logits[:, :-1].double()
    for parameter in decoder_of(model).blocks.parameters():
        parameter.mul_(1.3)
    scored = perplexity(model, tokens, 2, dense)
    changed = model(tokens).logits[:, :-1].double()
    p, q = logits.log_softmax(-1), changed.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert float(kl.mean()) > 1e-4
    assert scored.window_kl == pytest.approx(kl.mean(1).tolist(), rel=1e-3, abs=2e-6)
    same = (logits.argmax(-1) == changed.argmax(-1)).double()
    assert scored.window_agreement == pytest.approx(same.mean(1).tolist())
    targets = tokens[:, 1:, None]
    ratio = (p.gather(-1, targets) - q.gather(-1, targets)).mean().exp()
    assert scored.ratio == pytest.approx(float(ratio), rel=1e-5)
    assert scored.kl == pytest.approx(float(kl.mean()), rel=1e-3)


def test_a_model_does_not_diverge_from_itself(tiny_model, tokens):
    model = tiny_model("llama")
    dense = last_hidden_states(model, tokens, 2)
    scored = perplexity(model, tokens, 2, dense)
    assert scored.kl == pytest.approx(0, abs=1e-6)
    assert (scored.agreement, scored.ratio) == (1.0, pytest.approx(1, abs=1e-6))
    plain = perplexity(model, tokens, 2)
    assert (plain.kl, plain.agreement, plain.ratio) == (None, None, None)
    assert plain.window_nll == scored.window_nll == perplexity_of_hidden(model, dense, tokens, 2).window_nll


def test_the_loss_by_position_is_in_order_and_covers_every_position():
    nll = torch.arange(40.0).repeat(2, 1).double()
    parts = Perplexity.of([TokenScores(nll)]).position_nll
    assert len(parts) == 16 and parts == sorted(parts)
    assert parts[0] == 1.0 and parts[-1] == 38.5  # positions 0 to 2, and 38 to 39
