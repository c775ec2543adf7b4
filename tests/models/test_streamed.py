"""A model that is read block by block is pruned and scored to the same numbers as one in memory."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from engine_support import PRUNING
from safetensors.torch import load_file, save_file
from support import contains
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from dass_exp.api import method_of
from dass_exp.engine.callbacks import Callback, Stopwatch
from dass_exp.engine.prune import EngineOptions, prune_model
from dass_exp.errors import UserError
from dass_exp.evaluate.perplexity import last_hidden_states, perplexity
from dass_exp.evaluate.streamed import Scores, StreamedPerplexity
from dass_exp.masks import NM
from dass_exp.models.decoder import decoder_of
from dass_exp.models.families import FAMILIES
from dass_exp.models.shards import Shards
from dass_exp.models.streamed import StreamedBlocks, empty_model

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"


def opened(folder, dtype=torch.float32):
    """The empty model of a folder, and the loader of its blocks."""
    config = AutoConfig.from_pretrained(folder)
    build = functools.partial(AutoModelForCausalLM.from_config, config, dtype=dtype)
    model, names = empty_model(build, Shards(folder), CPU, dtype)
    return model, StreamedBlocks(model, names, CPU)


@pytest.fixture
def sharded(tiny_model, tmp_path):
    """The folder of a llama in several files."""
    tiny_model("llama").save_pretrained(tmp_path / "model", max_shard_size="8KB")
    return tmp_path / "model"


class InMemory(Callback):
    """Copies the weights of each pruned block, and notes which blocks are in memory beside it."""

    def __init__(self):
        self.weights, self.blocks = {}, []

    def on_start(self, loop):
        self._decoder = loop.decoder

    def on_block_end(self, report):
        self.weights |= {f"{report.name}.{name}": tensor.clone() for name, tensor in report.module.state_dict().items()}
        blocks = enumerate(self._decoder.blocks)
        self.blocks.append([index for index, block in blocks if not next(block.parameters()).is_meta])


@pytest.mark.thorough
@pytest.mark.parametrize("method", PRUNING, ids=repr)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_weights_are_identical_and_both_perplexities_those_of_the_models(family, method, tiny_model, tokens, tmp_path):
    resident, windows, options = tiny_model(family), tokens.flip(0)[:4], EngineOptions(scope="all", batch_size=2)
    resident.save_pretrained(tmp_path)
    dense, hidden = perplexity(resident, windows, 2).window_nll, last_hidden_states(resident, windows, 2)
    prune_model(resident, tokens, method, NM(2, 4), options)
    model, blocks = opened(tmp_path)
    scorer, memory = StreamedPerplexity(model, windows, 2, options, Stopwatch()), InMemory()
    prune_model(model, tokens, method, NM(2, 4), options, [scorer, memory], blocks)
    blocks.stop()
    prefixes = tuple(f"{block}." for block in decoder_of(resident).names)
    expected = {name: tensor for name, tensor in resident.state_dict().items() if name.startswith(prefixes)}
    assert memory.weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in memory.weights.items())
    assert scorer.dense_perplexity.window_nll == pytest.approx(dense, rel=1e-6)
    pruned = perplexity(resident, windows, 2, hidden)
    assert scorer.pruned_perplexity.window_nll == pytest.approx(pruned.window_nll, rel=1e-6)
    assert scorer.pruned_perplexity.window_kl == pytest.approx(pruned.window_kl, rel=1e-3, abs=1e-6)
    assert scorer.pruned_perplexity.window_agreement == pruned.window_agreement
    assert pruned.kl > 0 and scorer.dense_perplexity.kl is None
    assert all(parameter.is_meta for block in decoder_of(model).blocks for parameter in block.parameters())


def test_one_block_is_in_memory_at_a_time(tiny_model, tokens, tmp_path):
    tiny_model("llama", num_hidden_layers=6).save_pretrained(tmp_path)
    (model, blocks), memory = opened(tmp_path), InMemory()
    prune_model(model, tokens, method_of("wanda"), NM(2, 4), callbacks=[memory], blocks=blocks)
    assert memory.blocks == [[index] for index in range(6)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_several_shards_are_read_as_one(family, tiny_model, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    shards, state = Shards(tmp_path), model.state_dict()
    names = [name for name in state if name in shards.names]
    tensors = shards.read(names, torch.float32)
    assert all(torch.equal(tensors[name], state[name]) for name in names)
    assert all(shards.shape(name) == list(state[name].shape) for name in names)


def test_a_tensor_that_was_read_does_not_depend_on_its_file(tiny_model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tensor = Shards(tmp_path).read(["model.norm.weight"], torch.float32)["model.norm.weight"]
    before, path = tensor.clone(), tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("damage", ["missing", "cut", "unlisted", "index"])
def test_a_missing_or_damaged_shard_is_named(damage, sharded):
    victim, index = sorted(sharded.glob("*.safetensors"))[1], sharded / INDEX
    if damage == "missing":
        victim.unlink()
    elif damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-7])
    elif damage == "unlisted":
        content = json.loads(index.read_text())
        content["weight_map"]["model.extra.weight"] = victim.name
        index.write_text(json.dumps(content))
    else:
        index.write_text("{}")
    with pytest.raises(UserError) as caught:
        Shards(sharded)
    assert contains(str(caught.value), [index.name if damage == "index" else victim.name])


def test_a_shard_that_is_damaged_during_the_run_is_named(sharded, tokens):
    model, blocks = opened(sharded)
    last = json.loads((sharded / INDEX).read_text())["weight_map"]["model.layers.1.mlp.down_proj.weight"]
    (sharded / last).write_bytes(b"nothing")
    with pytest.raises(UserError, match=f"{last} is damaged"):
        prune_model(model, tokens, method_of("wanda"), NM(2, 4), blocks=blocks)


def test_a_checkpoint_without_the_prefix_of_the_model_is_read(tiny_model, tokens, tmp_path):
    """GPT-2's on the hub has no ``transformer.`` before its names."""
    model, path = tiny_model("gpt2"), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    weights = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    streamed, blocks = opened(tmp_path)
    scorer = StreamedPerplexity(streamed, tokens, 5, EngineOptions(), Stopwatch(), Scores(pruned=False))
    prune_model(streamed, None, method_of("dense"), NM(2, 4), callbacks=[scorer], blocks=blocks)
    assert scorer.dense_perplexity.window_nll == pytest.approx(perplexity(model, tokens, 5).window_nll, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_model_keeps_in_float32_stays_so(dtype, tiny_model, tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm", "model.norm"])
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    (model, blocks), memory = opened(tmp_path, dtype), InMemory()
    prune_model(model, None, method_of("dense"), NM(2, 4), callbacks=[memory], blocks=blocks)
    weights = {**model.state_dict(), **memory.weights}
    assert {tensor.dtype for tensor in weights.values()} == {dtype, torch.float32}
    for name, tensor in expected.items():
        assert weights[name].dtype == tensor.dtype, name
        assert torch.equal(weights[name], tensor)


def test_tensors_of_two_files_are_compared(sharded):
    shards, files = Shards(sharded), json.loads((sharded / INDEX).read_text())["weight_map"]
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert files[name] != files[other]
    assert shards.equal(name, name)
    assert not shards.equal(name, other)
