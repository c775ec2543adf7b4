"""Log-likelihoods of continuations: the numbers of lm-eval's own scoring, and of a loop over single tokens."""

from __future__ import annotations

import pytest
import torch
import transformers
from support import tiny_config, tiny_tokenizer

from dass_exp.errors import UserError
from dass_exp.evaluate import head, zeroshot
from dass_exp.evaluate.loglikelihood import loglikelihoods
from dass_exp.evaluate.perplexity import perplexity
from dass_exp.models.families import FAMILIES


def slowly(model, context, continuation, max_length):
    """Token by token, each after a forward pass of its own."""
    total, greedy = 0.0, True
    first = max(0, len(context) + len(continuation) - max_length - 1)
    for number, token in enumerate(continuation):
        prompt = [*context, *continuation[:number]][first:]
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
    return total, greedy


def some_requests():
    """Contexts and continuations of all lengths, several answers to one question, and the same request twice."""
    draw = torch.Generator().manual_seed(0)

    def take(count):
        return torch.randint(64, (count,), generator=draw).tolist()

    question = take(7)
    requests = [(take(1 + number % 9), take(1 + number % 4)) for number in range(12)]
    requests += [(question, [answer]) for answer in (3, 5, 8)] + [(question[:5], [*question[5:], 3])]
    return [*requests, requests[0]]


def assert_close(scores, expected, **tolerance):
    """The same log-likelihoods, and the very same greedy flags."""
    totals, others = (torch.tensor([total for total, _ in part]) for part in (scores, expected))
    torch.testing.assert_close(totals, others, **tolerance)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_agrees_with_one_token_at_a_time(family, tiny_model):
    model, requests = tiny_model(family), some_requests()
    expected = [slowly(model, context, continuation, 40) for context, continuation in requests]
    assert_close(loglikelihoods(model, requests, 4, 40), expected, rtol=0, atol=1e-3)


@torch.no_grad()
def test_the_flag_says_what_greedy_decoding_gives(tiny_model):
    model, context = tiny_model("llama"), [5, 9, 2]
    best = int(model(torch.tensor([context])).logits[0, -1].argmax())
    then = int(model(torch.tensor([[*context, best]])).logits[0, -1].argmax())
    continuations = [[best, then], [best, (then + 1) % 64], [best], [(best + 1) % 64]]
    scores = loglikelihoods(model, [(context, continuation) for continuation in continuations], 8, 40)
    assert [greedy for _, greedy in scores] == [True, False, True, False]


@torch.no_grad()
def test_a_sequence_that_is_too_long_loses_its_start(tiny_model):
    model = tiny_model("llama")
    requests = [(list(range(20)), [30, 31]), (list(range(11, 20)), [30, 31])]
    long, short = loglikelihoods(model, requests, 1, 10)
    assert long == short
    assert long[0] == pytest.approx(slowly(model, *requests[0], 10)[0], abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_adds_rounding_only(batch_size, tiny_model):
    model, requests = tiny_model("gemma2"), some_requests()
    expected = loglikelihoods(model, requests, 5, 40)
    assert_close(loglikelihoods(model, requests, batch_size, 40), expected, rtol=0, atol=1e-4)


def test_each_sequence_passes_once_and_the_head_reads_only_what_it_must(tiny_model):
    model, requests = tiny_model("llama"), some_requests()
    shapes, positions = [], []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    model.lm_head.register_forward_hook(lambda module, args, output: positions.append(len(output)))
    loglikelihoods(model, requests, 4, 40)
    shapes, positions = shapes[2:], positions[2:]  # the first two calls check the head
    distinct = {tuple([*context, *continuation][:-1]) for context, continuation in requests}
    assert sum(count for count, _ in shapes) == len(distinct) == len(requests) - 4
    assert sum(positions) == sum(len(continuation) for _, continuation in requests)
    assert [length for _, length in shapes] == sorted((length for _, length in shapes), reverse=True)


@pytest.mark.parametrize("rows", [1, 3])
def test_logits_are_held_a_few_positions_at_a_time(rows, tiny_model, monkeypatch):
    model = tiny_model("gemma2")
    expected = loglikelihoods(model, some_requests(), 4, 40)
    monkeypatch.setattr(head, "MAX_LOGITS", rows * 64)
    assert_close(loglikelihoods(model, some_requests(), 4, 40), expected)


def test_without_requests_there_are_no_scores(tiny_model):
    assert loglikelihoods(tiny_model("llama"), [], 4, 40) == []


@pytest.mark.thorough
@pytest.mark.parametrize("task", ["piqa", "hellaswag", "winogrande", "boolq", "arc_challenge"])
def test_the_likelihoods_are_those_of_lm_eval(task, monkeypatch):
    """Both score what lm-eval asks of a task, tokenised by lm-eval."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, calls = transformers.AutoModelForCausalLM.from_config(tiny_config()).eval(), tiny_tokenizer(), []

    def both(model, requests, batch_size, max_length, advance):
        ours = loglikelihoods(model, requests, batch_size, max_length, advance)
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
        asked = [((str(number), ""), list(context), list(answer)) for number, (context, answer) in enumerate(requests)]
        calls.append((ours, theirs._loglikelihood_tokens(asked, disable_tqdm=True)))
        return ours

    monkeypatch.setattr(zeroshot, "loglikelihoods", both)
    zeroshot.zero_shot(model, tokenizer, [task], 3, "offline", zeroshot.ZeroShotOptions(batch_size=4))
    ((ours, theirs),) = calls
    assert len(ours) >= 6
    assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_a_model_whose_logits_are_not_those_of_its_head_is_refused(tokens):
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}

    def granite(scale):
        config = transformers.GraniteConfig(**shape, **heads, logits_scaling=scale)
        return transformers.GraniteForCausalLM(config).eval()

    for score in (lambda model: perplexity(model, tokens), lambda model: loglikelihoods(model, some_requests(), 4, 40)):
        score(granite(1.0))
        with pytest.raises(UserError, match="'granite': its logits are not what its head gives"):
            score(granite(8.0))


@pytest.mark.parametrize("answer", [[], list(range(11))])
def test_an_answer_that_cannot_be_scored_is_refused(answer, tiny_model):
    message = rf"an answer of {len(answer)} tokens cannot be scored; this model takes 1 to 10"
    with pytest.raises(UserError, match=message):
        loglikelihoods(tiny_model("llama"), [([1, 2], answer)], 4, 10)
