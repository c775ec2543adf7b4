"""Log-likelihoods of continuations: the numbers of lm-eval's own scoring, and of a loop over single tokens."""

from __future__ import annotations

import pytest
import torch
from support import tiny_config, tiny_tokenizer

from dass_exp.errors import UserError
from dass_exp.evaluate import head
from dass_exp.evaluate.loglikelihood import loglikelihoods
from dass_exp.models.families import FAMILIES


def slowly(model, context, continuation, longest):
    """Token by token, each behind a forward pass of its own."""
    total, greedy = 0.0, True
    for number, token in enumerate(continuation):
        behind = [*context, *continuation[:number]]
        whole = len(context) + len(continuation)
        logits = model(torch.tensor([behind[max(0, whole - longest - 1) :]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
    return total, greedy


def some_requests(words=64):
    """Contexts and continuations of all lengths, several answers to one question, and the same request twice."""
    draw = torch.Generator().manual_seed(0)
    take = lambda count: torch.randint(words, (count,), generator=draw).tolist()
    question = take(7)
    found = [(take(1 + number % 9), take(1 + number % 4)) for number in range(12)]
    found += [(question, [answer]) for answer in (3, 5, 8)] + [(question[:5], [*question[5:], 3])]
    return [*found, found[0]]


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_agrees_with_one_token_at_a_time(family, tiny_model):
    model, requests = tiny_model(family), some_requests()
    found = loglikelihoods(model, requests, 4, 40)
    for (context, continuation), (total, greedy) in zip(requests, found, strict=True):
        expected, likeliest = slowly(model, context, continuation, 40)
        assert total == pytest.approx(expected, abs=1e-3)
        assert greedy == likeliest


@torch.no_grad()
def test_what_greedy_decoding_gives_is_said(tiny_model):
    model, context = tiny_model("llama"), [5, 9, 2]
    best = int(model(torch.tensor([context])).logits[0, -1].argmax())
    then = int(model(torch.tensor([[*context, best]])).logits[0, -1].argmax())
    asked = [
        (context, [best, then]),
        (context, [best, (then + 1) % 64]),
        (context, [best]),
        (context, [(best + 1) % 64]),
    ]
    assert [greedy for _, greedy in loglikelihoods(model, asked, 8, 40)] == [True, False, True, False]


@torch.no_grad()
def test_a_sequence_that_is_too_long_loses_its_head(tiny_model):
    model = tiny_model("llama")
    requests = [(list(range(20)), [30, 31]), (list(range(11, 20)), [30, 31])]
    long, short = loglikelihoods(model, requests, 1, 10)
    assert long == short
    assert long[0] == pytest.approx(slowly(model, *requests[0], 10)[0], abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_adds_rounding_only(batch_size, tiny_model):
    model = tiny_model("gemma2")
    found, expected = (loglikelihoods(model, some_requests(), size, 40) for size in (batch_size, 5))
    torch.testing.assert_close(
        torch.tensor([total for total, _ in found]), torch.tensor([total for total, _ in expected]), rtol=0, atol=1e-4
    )


def test_each_sequence_passes_once_and_the_head_reads_only_what_it_must(tiny_model, monkeypatch):
    model, requests = tiny_model("llama"), some_requests()
    rows: list[tuple[int, ...]] = []
    positions: list[int] = []
    inner, read = head.last_hidden, model.lm_head.forward
    monkeypatch.setattr(
        "dass_exp.evaluate.loglikelihood.last_hidden",
        lambda model, ids: rows.append(tuple(ids.shape)) or inner(model, ids),
    )
    monkeypatch.setattr("dass_exp.evaluate.loglikelihood.check_head", lambda *arguments: None)
    monkeypatch.setattr(model.lm_head, "forward", lambda states: positions.append(len(states)) or read(states))
    loglikelihoods(model, requests, 4, 40)
    distinct = {tuple([*context, *continuation][:-1]) for context, continuation in requests}
    assert sum(count for count, _ in rows) == len(distinct) == len(requests) - 4
    assert sum(positions) == sum(len(continuation) for _, continuation in requests)
    assert [length for _, length in rows] == sorted((length for _, length in rows), reverse=True)


@pytest.mark.parametrize("rows", [1, 3])
def test_logits_are_held_a_few_positions_at_a_time(rows, tiny_model, monkeypatch):
    model = tiny_model("gemma2")
    expected = loglikelihoods(model, some_requests(), 4, 40)
    monkeypatch.setattr(head, "LOGITS", rows * 64)
    found = loglikelihoods(model, some_requests(), 4, 40)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    torch.testing.assert_close(
        torch.tensor([total for total, _ in found]), torch.tensor([total for total, _ in expected])
    )


def test_nothing_asked_nothing_answered(tiny_model):
    assert loglikelihoods(tiny_model("llama"), [], 4, 40) == []


@pytest.mark.parametrize("task", ["piqa", "hellaswag", "winogrande", "boolq", "arc_challenge"])
def test_the_likelihoods_are_those_of_lm_eval(task, monkeypatch):
    """Both score what lm-eval asks of a task, tokenised by lm-eval."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    from dass_exp.evaluate import zeroshot

    model, tokenizer, seen = transformers.AutoModelForCausalLM.from_config(tiny_config()).eval(), tiny_tokenizer(), []

    def both(model, requests, batch_size, longest):
        found = loglikelihoods(model, requests, batch_size, longest)
        theirs = HFLM(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, softmax_dtype="float32"
        )
        asked = [((str(number), ""), list(context), list(answer)) for number, (context, answer) in enumerate(requests)]
        seen.append((found, theirs._loglikelihood_tokens(asked, disable_tqdm=True)))
        return found

    monkeypatch.setattr(zeroshot, "score_continuations", both)
    zeroshot.zero_shot(model, tokenizer, [task], 3, "offline", zeroshot.Options(batch_size=4))
    ((ours, theirs),) = seen
    assert len(ours) == len(theirs) >= 6
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    torch.testing.assert_close(
        torch.tensor([total for total, _ in ours]), torch.tensor([total for total, _ in theirs]), rtol=1e-5, atol=1e-4
    )


def test_a_model_whose_logits_are_not_those_of_its_head_is_refused(tiny_model, tokens):
    from transformers import GraniteConfig, GraniteForCausalLM

    from dass_exp.evaluate.perplexity import perplexity

    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    scaled, plain = (
        GraniteForCausalLM(GraniteConfig(**settings, logits_scaling=scale, initializer_range=0.5)).eval()
        for scale in (8.0, 1.0)
    )
    for score in (lambda model: perplexity(model, tokens), lambda model: loglikelihoods(model, some_requests(), 4, 40)):
        score(plain)
        with pytest.raises(UserError, match="'granite': its logits are not what its head gives"):
            score(scaled)


@pytest.mark.parametrize("answer", [[], list(range(11))])
def test_an_answer_that_cannot_be_scored_is_told(answer, tiny_model):
    with pytest.raises(
        UserError, match=rf"an answer of {len(answer)} tokens cannot be scored; this model takes 1 to 10"
    ):
        loglikelihoods(tiny_model("llama"), [([1, 2], answer)], 4, 10)
