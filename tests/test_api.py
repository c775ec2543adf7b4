"""The Python interface, as a notebook uses it."""

from __future__ import annotations

import math

import pytest
import torch
from support import CONF, contains
from torch import nn
from transformers import AutoModelForCausalLM

import dass_exp
from dass_exp import Pruned, load, perplexity, prune
from dass_exp.api import method_of, pattern_of
from dass_exp.engine.verify import VerificationError
from dass_exp.errors import UserError
from dass_exp.masks import NM, TransposableNM
from dass_exp.methods.base import Block, LinearView, MaskResult
from dass_exp.methods.dass import Dass
from dass_exp.methods.wanda import Wanda

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_load_prune_and_score(tiny):
    model, tokenizer = load(str(tiny), dtype="float32", device="cpu")
    stream = torch.tensor([tokenizer("What is the answer to the question? " * 20)["input_ids"][:120]])
    dense = perplexity(model, stream, context=12)
    pruned = prune(model, stream[0, :60].view(5, 12), method="dass", pattern="2:4")
    assert pruned.sparsity == 0.5
    assert [layer.role for layer in pruned.layers] == ["gate", "up", "down"] * 2
    weights = model.state_dict()
    assert all(not weights[f"{name}.weight"][~keep].any() for name, keep in pruned.masks.items())
    assert dense != perplexity(model, stream, context=12) < math.inf


def test_a_loaded_model_is_the_saved_one_in_evaluation_mode(tiny):
    model, tokenizer = load(str(tiny), device="cpu")
    assert not model.training
    assert tokenizer("<s>", add_special_tokens=False)["input_ids"] == [0]
    assert equal(model.state_dict(), AutoModelForCausalLM.from_pretrained(tiny).state_dict())
    assert load(str(tiny), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("nobody/no-such-model", {}, r"model\.path=nobody/no-such-model: it cannot be loaded"),
        ("offline:gpt5", {}, "the offline models are smollm2_135m, gemma3_270m"),
        ("offline:gemma3_270m", {}, r"set model\.accept_license=true"),
        ("offline:smollm2_135m", {"dtype": "int8"}, r"model\.dtype='int8': expected one of auto"),
        ("offline:smollm2_135m", {"device": "abacus"}, r"model\.device='abacus'"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_line(path, settings, message):
    with pytest.raises(UserError, match=message) as raised:
        load(path, **settings)
    assert "\n" not in str(raised.value)


# --- prune


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dense"])
@pytest.mark.parametrize("scope", ["mlp", "attention", "all"])
def test_methods_by_name(method, scope, tiny_model, tokens):
    pruned = prune(tiny_model("llama"), tokens, method, "4:8", scope, batch_size=2)
    assert pruned.sparsity == 0.5
    assert pruned.masks.keys() == {layer.name for layer in pruned.layers}
    assert all(keep.dtype == torch.bool for keep in pruned.masks.values())


def test_defaults_are_the_paper_and_a_name_stands_for_an_instance(tiny_model, tokens):
    def masks(*arguments):
        return prune(tiny_model("llama"), tokens, *arguments).masks

    assert equal(masks(), masks("dass", "2:4", "mlp"))
    assert equal(masks(), masks(Dass(alpha=0.5), NM(2, 4)))
    assert not equal(masks(), masks(Dass(alpha=0.0), NM(2, 4)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_weights_are_refused_before_anything_is_pruned(dtype, tiny_model, tokens):
    model = tiny_model("llama")
    up, down = model.model.layers[1].mlp.up_proj, model.model.layers[0].mlp.down_proj.weight.clone()
    up.weight = nn.Parameter(torch.ones_like(up.weight).to(dtype), requires_grad=False)
    with pytest.raises(UserError) as caught:
        prune(model, tokens, "magnitude")
    assert contains(str(caught.value), ["layers.1.mlp.up_proj", str(dtype).removeprefix("torch."), "bfloat16"])
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, down)


def test_masks_are_kept_packed_and_read_as_bool(tiny_model, tokens):
    model = tiny_model("llama")
    masks = prune(model, tokens).masks
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(masks[name], model.get_submodule(name).weight != 0)
    assert len(masks) == len(list(masks)) == 6 and repr(masks) == "<masks of 6 linears>"
    assert masks[name] is not masks[name]


def test_magnitude_needs_no_tokens(tiny_model):
    pruned = prune(tiny_model("llama"), method="magnitude", pattern="50%", scope="all")
    assert pruned.sparsity == 0.5
    assert {layer.axis for layer in pruned.layers} == {"matrix"}
    assert {layer.block_error for layer in pruned.layers} == {None}


def test_dense_prunes_nothing(tiny_model, tokens):
    pruned = prune(tiny_model("llama"), tokens, "dense")
    assert (pruned, pruned.sparsity) == (Pruned({}, []), 0.0)


def test_sparsity_counts_the_weights_that_the_masks_remove(tiny_model, tokens):
    pruned = prune(tiny_model("llama"), tokens, "wanda", NM(1, 4), "all")
    kept = sum(int(keep.sum()) for keep in pruned.masks.values())
    assert 1 - kept / sum(keep.numel() for keep in pruned.masks.values()) == pruned.sparsity == 0.75


def test_what_a_method_did_is_verified(tiny_model, tokens):
    class Liar(Wanda):
        def prune_linear(self, linear: LinearView, block: Block, pattern: NM) -> MaskResult:
            before = linear.weight.clone()
            result = super().prune_linear(linear, block, pattern)
            linear.write(before)
            return result

    with pytest.raises(VerificationError, match=r"model\.layers\.0\.\S+: \d+ weights are not zero"):
        prune(tiny_model("llama"), tokens, Liar())


def test_patterns_by_text():
    assert [pattern_of(text) for text in ("2:4", "2of4", "1:16")] == [NM(2, 4), NM(2, 4), NM(1, 16)]
    assert pattern_of("4of8_transposable") == pattern_of("4:8 transposable") == TransposableNM(4, 8)
    fractions = {text: pattern_of(text).sparsity for text in ("50%", "62.5%", "unstructured")}
    assert fractions == {"50%": 0.5, "62.5%": 0.625, "unstructured": 0.5}
    assert pattern_of(NM(3, 4)) == NM(3, 4)


REFUSED = dict.fromkeys(
    ["2", "2:", ":4", "a:b", "2/4", "", "%", "x%", "2:4:8", "half", None, "0.5"],
    "pattern=.*expected 2:4, 4:8, any n:m, 50%",
)
REFUSED |= {"5:4": r"pattern\.n", "0:4": r"pattern\.n", "100%": r"pattern\.sparsity", "-1%": r"pattern\.sparsity"}


@pytest.mark.parametrize(("text", "words"), REFUSED.items())
def test_a_pattern_that_cannot_be_read_or_made_is_refused(text, words):
    with pytest.raises(UserError, match=words):
        pattern_of(text)


@pytest.mark.parametrize("name", METHODS)
def test_a_name_stands_for_the_method_with_its_default_settings(name):
    method = method_of(name)
    assert (method, method.name) == (type(method)(), name)
    assert method_of(method) is method


@pytest.mark.parametrize("name", ["wandas", "", "Dass", None, 3])
def test_an_unknown_method_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match=f"method=.*expected one of {', '.join(METHODS)}"):
        method_of(name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "wandas"}, "method='wandas'"),
        ({"pattern": "3of"}, "pattern='3of'"),
        ({"scope": "head"}, "scope='head': expected one of mlp, attention, all"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"pattern": "2:7"}, "m=7 does not divide"),
        ({"tokens": None}, "needs calibration tokens"),
    ],
)
def test_a_wrong_setting_is_refused_and_the_model_stays_whole(settings, message, tiny_model, tokens):
    model = tiny_model("llama")
    with pytest.raises(UserError, match=message):
        prune(model, **{"tokens": tokens, **settings})
    linears = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    assert all(bool(linear.weight.all()) for linear in linears)


# --- perplexity


def test_a_stream_is_cut_into_windows_and_the_rest_is_dropped(tiny_model, tokens):
    model = tiny_model("llama")
    windows = perplexity(model, tokens)
    stream = torch.cat([tokens.reshape(-1), tokens[0, :7]])
    assert perplexity(model, stream, context=12) == windows
    assert perplexity(model, stream[None], context=12, batch_size=1) == pytest.approx(windows, rel=1e-6)
    assert perplexity(model, tokens, context=6) != windows


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (61, "context=61: expected at least 2 and at most the 60 tokens"),
        *((context, f"context={context}: expected a whole number of at least 2") for context in (1, 0, -5)),
        (None, r"tokens of shape \[60\]: expected \[windows, tokens\]"),
    ],
)
def test_a_context_that_does_not_fit_a_stream_is_refused(context, words, tiny_model, tokens):
    with pytest.raises(UserError, match=words):
        perplexity(tiny_model("llama"), tokens.reshape(-1), context=context)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([1, 2, 3], "expected a tensor of token ids, got list"),
        (torch.rand(2, 8), "expected a tensor of token ids, got Tensor torch.float32"),
        (torch.full((2, 8), 10**6), "tokens: ids from 1000000 to 1000000"),
        (torch.full((2, 8), -1), "tokens: ids from -1 to -1"),
        (torch.zeros(1, 10**5, dtype=torch.int64), "tokens: sequences of 100000; this model has"),
    ],
    ids=["a list", "floats", "too high", "negative", "too long"],
)
@pytest.mark.parametrize("use", [perplexity, prune])
def test_tokens_that_are_none_are_refused(wrong, words, use, tiny_model):
    with pytest.raises(UserError, match=words):
        use(tiny_model("llama"), wrong)


def test_the_package_exports_its_interface():
    basic = {"Pruned", "load", "load_masks", "perplexity", "prune"}
    assert set(dass_exp.__all__) == basic | {
        "run",
        "evaluate",
        "dense_states",
        "save",
        "records",
        "compare",
        "calibration_tokens",
    }
    assert all(hasattr(dass_exp, name) for name in dass_exp.__all__)
