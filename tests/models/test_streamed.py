"""A model that is read block by block is pruned and scored to the same numbers as one in memory."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from dass_exp.api import method_of
from dass_exp.engine.prune import Options, prune_model
from dass_exp.errors import UserError
from dass_exp.evaluate.perplexity import perplexity
from dass_exp.evaluate.streamed import StreamedPerplexity
from dass_exp.masks import NM
from dass_exp.models.decoder import decoder_of
from dass_exp.models.families import FAMILIES
from dass_exp.models.shards import Shards
from dass_exp.models.streamed import StreamedBlocks, empty_model

CPU = torch.device("cpu")


def opened(folder, dtype=torch.float32):
    """The empty model of a folder, and the layout of its checkpoint."""
    config = AutoConfig.from_pretrained(folder)
    return empty_model(lambda: AutoModelForCausalLM.from_config(config, dtype=dtype), Shards(folder), CPU, dtype)


def saved(model, folder, **settings):
    model.save_pretrained(folder, **settings)
    return folder


@pytest.mark.parametrize("method", ["dass", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_weights_are_identical_and_both_perplexities_are_those_of_the_models(
    family, method, tiny_model, tokens, tmp_path
):
    resident, windows = tiny_model(family), tokens.flip(0)[:4]
    folder = saved(resident, tmp_path / "model")
    dense = perplexity(resident, windows, 2).window_nll
    prune_model(resident, tokens, method_of(method), NM(2, 4), Options("all", 2))
    expected = {
        name: tensor
        for name, tensor in resident.state_dict().items()
        if name.startswith(tuple(f"{block}." for block in decoder_of(resident).names))
    }

    model, layout = opened(folder)
    found: dict[str, torch.Tensor] = {}
    source = StreamedBlocks(model, layout, CPU, lambda index, weights: found.update(copy.deepcopy(dict(weights))))
    beside = StreamedPerplexity(model, windows, 2)
    done = []
    options = Options(
        "all", 2, source=source, before=beside.before, on_block=lambda report: done.append(beside.after(len(done)))
    )
    prune_model(model, tokens, method_of(method), NM(2, 4), options)
    source.stop()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert beside.dense().window_nll == pytest.approx(dense, rel=1e-6)
    assert beside.pruned().window_nll == pytest.approx(perplexity(resident, windows, 2).window_nll, rel=1e-6)
    assert all(parameter.is_meta for block in decoder_of(model).blocks for parameter in block.parameters())


def test_two_blocks_are_in_memory_at_most(tiny_model, tokens, tmp_path):
    folder = saved(tiny_model("llama", num_hidden_layers=6), tmp_path / "model")
    model, layout = opened(folder)
    blocks, seen = model.model.layers, []
    source = StreamedBlocks(model, layout, CPU)

    def note(index):
        seen.append([number for number, block in enumerate(blocks) if not next(block.parameters()).is_meta])

    prune_model(model, tokens, method_of("wanda"), NM(2, 4), Options("mlp", 2, source=source, before=note))
    assert seen == [[index] for index in range(6)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_several_shards_are_read_as_one(family, tiny_model, tmp_path):
    model = tiny_model(family)
    folder = saved(model, tmp_path / "model", max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    shards, state = Shards(folder), model.state_dict()
    names = [name for name in state if name in shards.names]
    found = shards.read(names, torch.float32)
    assert all(torch.equal(found[name], state[name]) for name in names)
    assert all(shards.shape(name) == list(state[name].shape) for name in names)


def test_what_is_read_is_in_memory_of_its_own(tiny_model, tmp_path):
    folder = saved(tiny_model("llama"), tmp_path / "model")
    found = Shards(folder).read(["model.norm.weight"], torch.float32)["model.norm.weight"]
    before = found.clone()
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    (folder / "model.safetensors").write_bytes(b"\0" * (folder / "model.safetensors").stat().st_size)
    assert torch.equal(found, before)


@pytest.mark.parametrize("harm", ["missing", "cut", "unlisted", "index"])
def test_a_missing_or_damaged_shard_is_named(harm, tiny_model, tmp_path):
    folder = saved(tiny_model("llama"), tmp_path / "model", max_shard_size="8KB")
    victim = sorted(folder.glob("*.safetensors"))[1]
    index = folder / "model.safetensors.index.json"
    if harm == "missing":
        victim.unlink()
    elif harm == "cut":
        victim.write_bytes(victim.read_bytes()[:-7])
    elif harm == "unlisted":
        content = json.loads(index.read_text())
        content["weight_map"]["model.extra.weight"] = victim.name
        index.write_text(json.dumps(content))
    else:
        index.write_text("{}")
    with pytest.raises(UserError) as caught:
        Shards(folder)
    assert "\n" not in str(caught.value)
    assert (victim.name if harm != "index" else index.name) in str(caught.value)


def test_a_shard_that_goes_bad_on_the_way_is_named(tiny_model, tokens, tmp_path):
    folder = saved(tiny_model("llama"), tmp_path / "model", max_shard_size="8KB")
    model, layout = opened(folder)
    last = Shards(folder)._files["model.layers.1.mlp.down_proj.weight"]
    (folder / last).write_bytes(b"nothing")
    with pytest.raises(UserError, match=f"{last} is damaged"):
        prune_model(
            model, tokens, method_of("wanda"), NM(2, 4), Options("mlp", source=StreamedBlocks(model, layout, CPU))
        )


def test_a_checkpoint_without_the_prefix_of_the_model_is_read(tiny_model, tokens, tmp_path):
    """GPT-2's on the hub has no ``transformer.`` before its names."""
    model = tiny_model("gpt2")
    folder = saved(model, tmp_path / "model")
    weights = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    streamed, layout = opened(folder)
    source = StreamedBlocks(streamed, layout, CPU)
    beside = StreamedPerplexity(streamed, tokens, 5)
    for index in range(2):
        source.open(index)
        beside.before(index)
        source.close(index)
    assert beside.dense().window_nll == pytest.approx(perplexity(model, tokens, 5).window_nll, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_model_keeps_in_float32_stays_so(dtype, tiny_model, tmp_path, monkeypatch):
    folder = saved(tiny_model("llama"), tmp_path / "model")
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", ["input_layernorm", "model.norm"])
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model, layout = opened(folder, dtype)
    source, found = StreamedBlocks(model, layout, CPU), dict(model.state_dict())
    for index in range(2):
        source.open(index)
        found |= {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
        source.close(index)
    source.stop()
    assert {tensor.dtype for tensor in found.values()} == {dtype, torch.float32}
    for name, tensor in expected.state_dict().items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor)


def test_tensors_of_two_files_are_compared(tiny_model, tmp_path):
    shards = Shards(saved(tiny_model("llama"), tmp_path / "model", max_shard_size="8KB"))
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert shards._files[name] != shards._files[other]
    assert shards.equal(name, name)
    assert not shards.equal(name, other)
