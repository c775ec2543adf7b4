"""Models that cannot be used are refused in one line that names the model, in memory and streamed alike."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import contains, settings_of, tiny_overrides, tiny_tokenizer

from dass_exp.config.settings import ModelConfig
from dass_exp.errors import UserError
from dass_exp.models.load import bos_policy, identify, load_model, load_streamed, load_tokenizer
from dass_exp.runs.context import RunContext
from dass_exp.runs.resolve import resolve

EMBEDDING, UP = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"


def config(**changes):
    """Change the config of a model folder."""

    def harm(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return harm


def written(name, content):
    return lambda folder: (folder / name).write_text(content)


def weights(**changes):
    """Change tensors of a model folder, ``embedding`` or ``up``, or add one beside ``up``, by functions of these."""

    def harm(folder):
        tensors = load_file(folder / "model.safetensors")
        for name, change in changes.items():
            base = EMBEDDING if name == "embedding" else UP
            target = base if name in ("embedding", "up") else base.replace("weight", name)
            tensors[target] = change(tensors[base]).clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return harm


def with_one(value):
    def change(tensor):
        tensor[3, 3] = value
        return tensor

    return change


def int8_of_unknown_kind(folder):
    weights(up=lambda tensor: tensor.to(torch.int8))(folder)
    config(quantization_config={"quant_method": "unknown"})(folder)


HARMS = {
    "layers in words": (config(num_hidden_layers="two"), ["num_hidden_layers"]),
    "a million layers": (config(num_hidden_layers=10**6), ["1000000 layers", "holds 21 tensors"]),
    "no layer": (config(num_hidden_layers=0), ["0 layers"]),
    "no width": (config(hidden_size=0), ["hidden_size"]),
    "heads": (config(num_attention_heads=5), ["number of attention heads (5)"]),
    "dtype": (config(dtype="float99"), ["float99"]),
    "quantisation": (config(quantization_config="x"), []),
    "config": (written("config.json", "[]"), ["config.json"]),
    "half a config": (written("config.json", '{"a":'), ["config.json"]),
    "tokenizer": (written("tokenizer.json", "[]"), []),
    "settings of the tokenizer": (written("tokenizer_config.json", "[]"), []),
    "NaN": (weights(embedding=with_one(torch.nan)), [EMBEDDING, "NaN or infinite"]),
    "infinite": (weights(embedding=with_one(torch.inf)), [EMBEDDING, "NaN or infinite"]),
    "int8": (weights(up=lambda tensor: tensor.to(torch.int8)), [UP, "stored as I8"]),
    "int8 of an unknown kind": (int8_of_unknown_kind, []),
    "bool": (weights(up=lambda tensor: tensor > 0), [UP, "stored as BOOL"]),
    "float8": (weights(up=lambda tensor: tensor.to(torch.float8_e4m3fn)), [UP, "stored as F8_E4M3"]),
    "complex": (weights(up=lambda tensor: tensor.to(torch.complex64)), [UP, "stored as C64"]),
    "scale": (weights(weight_scale_inv=lambda tensor: tensor[:1]), [f"{UP}_scale_inv", "quantised weight"]),
    "column scale": (weights(SCB=lambda tensor: tensor[0]), ["mlp.up_proj.SCB", "quantised weight"]),
    "shape": (weights(up=lambda tensor: tensor[:3]), ["its config.json"]),
}


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny model."""
    return shutil.copytree(tiny, tmp_path / "model")


def identified(folder):
    return identify(ModelConfig(name="tiny", path=str(folder), device="cpu"))


@pytest.mark.parametrize("load", [load_model, load_streamed])
@pytest.mark.parametrize("harm", HARMS)
def test_a_model_that_cannot_be_used_is_refused_in_one_line(folder, harm, load):
    change, words = HARMS[harm]
    change(folder)
    with pytest.raises(UserError) as caught:
        spec = identified(folder)
        bos_policy("auto", spec.family, load_tokenizer(spec), spec.source)
        load(spec)
    assert contains(str(caught.value), [str(folder), *words]), caught.value


def test_buffers_that_are_no_weights_may_be_whole_numbers(folder):
    weights(mask=lambda tensor: tensor > 0, inv_freq=lambda tensor: tensor[0].long())(folder)
    load_model(identified(folder))


@pytest.mark.usefixtures("short_texts")
def test_tokens_without_an_embedding_that_no_text_holds_are_named_once(folder, results, caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(200)])
    tokenizer.save_pretrained(folder)
    context = RunContext()
    for method in ("dass", "wanda"):
        resolve(settings_of(*tiny_overrides(folder, results), f"method={method}"), context)
    assert contains(caplog.text.strip(), [str(folder), f"{len(tokenizer)} tokens", "its embedding 512"])
