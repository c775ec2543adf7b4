"""The Python interface, as a notebook uses it."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

import dass_exp
from dass_exp import Pruned, load, perplexity, prune
from dass_exp.api import method_of, pattern_of
from dass_exp.engine.verify import VerificationError
from dass_exp.errors import UserError
from dass_exp.masks import NM, Unstructured
from dass_exp.methods.base import Block, LinearView, MaskResult
from dass_exp.methods.dass import Dass
from dass_exp.methods.dense import Dense
from dass_exp.methods.magnitude import Magnitude
from dass_exp.methods.sparsegpt import SparseGPT
from dass_exp.methods.wanda import Wanda


@pytest.fixture
def folder(tmp_path, tiny_model):
    """A tiny llama with a tokenizer, saved as ``save_pretrained`` does."""
    tiny_model("llama").save_pretrained(tmp_path)
    words = {f"w{index}": index for index in range(64)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0"
    ).save_pretrained(tmp_path)
    return tmp_path


def test_load_prune_and_score(folder):
    model, tokenizer = load(str(folder), dtype="float32", device="cpu")
    stream = torch.tensor([tokenizer.convert_tokens_to_ids([f"w{index * index % 64}" for index in range(120)])])
    calibration = stream[0, :60].view(5, 12)
    dense = perplexity(model, stream, context=12)
    pruned = prune(model, calibration, method="dass", pattern="2:4")
    assert pruned.sparsity == 0.5
    assert [layer.role for layer in pruned.layers] == ["gate", "up", "down"] * 2
    weights = model.state_dict()
    assert all(not weights[f"{name}.weight"][~keep].any() for name, keep in pruned.masks.items())
    assert math.isfinite(perplexity(model, stream, context=12))
    assert perplexity(model, stream, context=12) != dense


def test_a_loaded_model_is_the_saved_one_in_evaluation_mode(folder, tiny_model):
    model, tokenizer = load(str(folder), device="cpu")
    assert not model.training
    assert tokenizer("w7", add_special_tokens=False)["input_ids"] == [7]
    saved = tiny_model("llama").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert next(load(str(folder), dtype="bfloat16", device="cpu")[0].parameters()).dtype == torch.bfloat16


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
def test_a_model_that_cannot_be_had_is_one_line(path, settings, message):
    with pytest.raises(UserError, match=message) as raised:
        load(path, **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("method", ["dass", "wanda", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("scope", ["mlp", "attention", "all"])
def test_methods_by_name(method, scope, tiny_model, tokens):
    pruned = prune(tiny_model("llama"), tokens, method, "4:8", scope, batch_size=2)
    assert pruned.sparsity == 0.5
    assert pruned.masks.keys() == {layer.name for layer in pruned.layers}
    assert all(keep.dtype == torch.bool for keep in pruned.masks.values())


def test_a_name_stands_for_the_instance_with_the_settings_of_the_config_group(tiny_model, tokens):
    by_name = prune(tiny_model("llama"), tokens, "dass", "2:4").masks
    by_instance = prune(tiny_model("llama"), tokens, Dass(alpha=0.5), NM(2, 4)).masks
    other = prune(tiny_model("llama"), tokens, Dass(alpha=0.0), NM(2, 4)).masks
    assert all(torch.equal(by_name[name], keep) for name, keep in by_instance.items())
    assert not all(torch.equal(by_name[name], keep) for name, keep in other.items())


def test_defaults_are_the_paper(tiny_model, tokens):
    plain = prune(tiny_model("llama"), tokens).masks
    spelt = prune(tiny_model("llama"), tokens, "dass", "2:4", "mlp").masks
    assert plain.keys() == spelt.keys()
    assert all(torch.equal(plain[name], keep) for name, keep in spelt.items())


def test_magnitude_needs_no_tokens(tiny_model):
    pruned = prune(tiny_model("llama"), method="magnitude", pattern="50%", scope="all")
    assert pruned.sparsity == 0.5
    assert {layer.axis for layer in pruned.layers} == {"matrix"}
    assert all(layer.block_error is None for layer in pruned.layers)


def test_dense_prunes_nothing(tiny_model, tokens):
    assert prune(tiny_model("llama"), tokens, "dense") == Pruned({}, [])
    assert Pruned({}, []).sparsity == 0.0


def test_sparsity_counts_the_weights_that_the_masks_remove(tiny_model, tokens):
    pruned = prune(tiny_model("llama"), tokens, "wanda", NM(1, 4), "all")
    assert pruned.sparsity == 0.75
    kept = sum(int(keep.sum()) for keep in pruned.masks.values())
    assert kept / sum(keep.numel() for keep in pruned.masks.values()) == 0.25


def test_what_a_method_did_is_verified(tiny_model, tokens):
    class Liar(Wanda):
        def prune_linear(self, linear: LinearView, block: Block, pattern: NM) -> MaskResult:
            before = linear.weight.clone()
            cut = super().prune_linear(linear, block, pattern)
            linear.write(before)
            return cut

    with pytest.raises(VerificationError, match=r"model\.layers\.0\.\S+: \d+ weights are not zero"):
        prune(tiny_model("llama"), tokens, Liar())


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NM(2, 4)),
        ("2of4", NM(2, 4)),
        ("4:8", NM(4, 8)),
        ("1:16", NM(1, 16)),
        ("50%", Unstructured(0.5)),
        ("62.5%", Unstructured(0.625)),
        ("unstructured", Unstructured(0.5)),
        (NM(3, 4), NM(3, 4)),
    ],
)
def test_patterns_by_text(text, pattern):
    assert pattern_of(text) == pattern


@pytest.mark.parametrize("text", ["2", "2:", ":4", "a:b", "2/4", "", "%", "x%", "2:4:8", "half", None, 0.5])
def test_a_pattern_that_cannot_be_read_is_refused(text):
    with pytest.raises(UserError, match=r"pattern=.*expected 2:4, 4:8, any n:m, 50%"):
        pattern_of(text)


@pytest.mark.parametrize(
    ("text", "setting"),
    [("5:4", "pattern.n"), ("0:4", "pattern.n"), ("100%", "pattern.sparsity"), ("-1%", "pattern.sparsity")],
)
def test_an_impossible_pattern_is_refused(text, setting):
    with pytest.raises(UserError, match=setting):
        pattern_of(text)


@pytest.mark.parametrize(
    ("name", "method"),
    [("dass", Dass()), ("wanda", Wanda()), ("sparsegpt", SparseGPT()), ("magnitude", Magnitude()), ("dense", Dense())],
)
def test_methods_of_the_config_group(name, method):
    assert method_of(name) == method
    assert method_of(method) is method


@pytest.mark.parametrize("name", ["wandas", "", "Dass", None, 3])
def test_an_unknown_method_is_refused_with_the_known_ones(name):
    with pytest.raises(UserError, match=r"method=.*expected one of dass, dense, magnitude, sparsegpt, wanda"):
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
    assert all(
        bool((module.weight != 0).all()) for module in model.model.layers.modules() if isinstance(module, nn.Linear)
    )


# --- perplexity of a stream


def test_a_stream_is_cut_into_windows_and_the_rest_is_dropped(tiny_model, tokens):
    model = tiny_model("llama")
    windows = perplexity(model, tokens)
    stream = torch.cat([tokens.reshape(-1), tokens[0, :7]])
    assert perplexity(model, stream, context=12) == windows
    assert perplexity(model, stream[None], context=12, batch_size=1) == pytest.approx(windows, rel=1e-6)
    assert perplexity(model, tokens, context=6) != windows


@pytest.mark.parametrize("context", [61, 1, 0, -5])
def test_a_context_that_does_not_fit_is_refused(context, tiny_model, tokens):
    with pytest.raises(
        UserError,
        match=f"context={context}: expected (at least 2 and at most the 60 tokens|a whole number of at least 2)",
    ):
        perplexity(tiny_model("llama"), tokens, context=context)


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
def test_tokens_that_are_none_are_refused(wrong, words, tiny_model):
    for use in (perplexity, prune):
        with pytest.raises(UserError, match=words):
            use(tiny_model("llama"), wrong)


def test_a_stream_without_a_context_is_refused(tiny_model, tokens):
    with pytest.raises(UserError, match=r"tokens of shape \[60\]: expected \[windows, tokens\]"):
        perplexity(tiny_model("llama"), tokens.reshape(-1))


def test_the_package_exports_its_interface():
    assert set(dass_exp.__all__) == {"Pruned", "load", "load_masks", "perplexity", "prune"}
    assert all(hasattr(dass_exp, name) for name in dass_exp.__all__)
