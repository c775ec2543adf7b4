"""Model folders that are damaged, incomplete or ill-typed: one line that names the model, or a sound run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import Case, damages
from safetensors.torch import load_file, save_file
from support import save_tiny, tiny_config

PLACEMENTS = ("resident", "stream")
WRONG = [None, "two", -1, 0, 1.5, 10**30, [], {}, True, "", float("nan")]
both_placements = pytest.mark.parametrize("placement", PLACEMENTS)
HARMLESS = ("generation_config.json",)


def config_fields() -> list[str]:
    """All fields that the config.json of a model holds."""
    return sorted(tiny_config().to_dict())


def run_of(campaign, placement):
    return campaign.base(f"model.placement={placement}", "method=magnitude")


def edit(name, change):
    """A preparation that edits a JSON file of the model."""

    def prepare(box):
        path = box.model / name
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content)))

    return prepare


def numbered(record):
    """Numbers of a finished run are finite."""
    return [
        f"perplexity {value}" for value in record["metrics"]["perplexity"].values() if not 1 <= value < float("inf")
    ]


def finite(box, result):
    """Records of a finished run hold numbers that are possible."""
    paths = box.results.glob("runs/*/result.json")
    return [problem for path in paths for problem in numbered(json.loads(path.read_text()))]


@both_placements
def test_files_of_a_model_that_are_damaged(campaign, hold, placement):
    cases = []
    for name in sorted(path.name for path in (campaign.template / "model").iterdir()):
        for damage, do in damages().items():
            prepare = lambda box, name=name, do=do: do(box.model / name)  # noqa: E731
            argv, job = run_of(campaign, placement), {"unprivileged": damage == "unreadable"}
            cases.append(Case(f"{name}-{damage}", argv, prepare, job, codes=[0, 2], words=["model"], after=finite))
    hold("models", cases)


@both_placements
def test_fields_of_a_config_that_are_wrong(campaign, hold, placement):
    cases = []
    for number, field in enumerate(config_fields(), PLACEMENTS.index(placement)):
        for value in WRONG[number % 3 :: 3]:  # in turns
            prepare = edit("config.json", lambda content, field=field, value=value: {**content, field: value})
            argv = run_of(campaign, placement)
            cases.append(Case(f"{field}={value!r}", argv, prepare, codes=[0, 1, 2], words=["model"], after=finite))
    hold("models", cases)


USABLE = ("fewer blocks", "quantized by nobody")  # its weights are plain numbers
CONFIGS = {
    "a list": [],
    "a word": "llama",
    "null": None,
    "no type": {},
    "unknown type": {"model_type": "nosuch"},
    "vision": {"model_type": "vit"},
    "heads that do not divide": {"num_attention_heads": 5},
    "heads of keys that do not divide": {"num_key_value_heads": 3},
    "bogus dtype": {"dtype": "float3"},
    "dtype of bytes": {"dtype": "int8"},
    "quantized": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "quantized by a word": {"quantization_config": "gptq"},
    "quantized by nobody": {"quantization_config": {"quant_method": "nosuch"}},
    "code": {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}, "model_type": "own"},
    "rope": {"rope_parameters": {"rope_type": "nosuch"}},
    "activation": {"hidden_act": "nosuch"},
    "other sizes": {"hidden_size": 48},
    "more blocks": {"num_hidden_layers": 3},
    "fewer blocks": {"num_hidden_layers": 1},
    "a small vocabulary": {"vocab_size": 100},
}


@both_placements
def test_configs_that_are_none(campaign, hold, placement):
    cases = []
    for name, change in CONFIGS.items():
        whole = not isinstance(change, dict) or not change
        prepare = edit("config.json", lambda content, c=change, w=whole: c if w else {**content, **c})
        argv = run_of(campaign, placement)
        cases.append(Case(name, argv, prepare, codes=[0, 2] if name in USABLE else [2], words=["model"], after=finite))
    hold("models", cases)


def _weights(change):
    def prepare(box):
        path = box.model / "model.safetensors"
        tensors = load_file(path)
        changed = change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, path, {"format": "pt"})

    return prepare


def _with_value(name, value):
    def change(tensors):
        tensors[name][0, 0] = value
        return tensors

    return change


_EMBEDDING, _DOWN = "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"
_KINDS = ["float8_e4m3fn", "float8_e5m2", "int8", "uint8", "bool", "complex64", "int64"]
WEIGHTS = {
    f"{value} in {name}": _with_value(name, value)
    for name in (_EMBEDDING, _DOWN)
    for value in (float("nan"), float("inf"))
}
WEIGHTS |= {f"{kind} weights": lambda t, k=kind: t | {_DOWN: t[_DOWN].to(getattr(torch, k))} for kind in _KINDS}
WEIGHTS |= {
    f"{kind} everywhere": lambda t, k=kind: {n: w.to(getattr(torch, k)) for n, w in t.items()} for kind in _KINDS
}
WEIGHTS |= {
    f"{kind} with {more}": lambda t, k=kind, m=more: (
        t | {_DOWN: t[_DOWN].to(getattr(torch, k)), _DOWN.removesuffix("weight") + m: torch.ones(1)}
    )
    for kind in ("float8_e4m3fn", "int8")
    for more in ("weight_scale_inv", "SCB", "weight_scale")
}
WEIGHTS |= {
    "missing": lambda t: {n: w for n, w in t.items() if n != _DOWN},
    "no embedding": lambda t: {n: w for n, w in t.items() if n != _EMBEDDING},
    "nothing": lambda t: {"x": torch.ones(1)},
    "another shape": lambda t: t | {_DOWN: t[_DOWN].T},
    "an empty tensor": lambda t: t | {_DOWN: t[_DOWN][:0]},
    "a scalar": lambda t: t | {_DOWN: torch.tensor(1.0)},
    "a short embedding": lambda t: t | {_EMBEDDING: t[_EMBEDDING][:100]},
}


@both_placements
def test_weights_that_are_no_weights(campaign, hold, placement):
    cases = [
        Case(name, run_of(campaign, placement), _weights(change), codes=[1, 2], words=["model"], after=finite)
        for name, change in WEIGHTS.items()
    ]
    hold("models", cases)


def _short_vocabulary(box):
    save_tiny(box.model, tiny_config(vocab_size=300))


def _index(entries):
    """The weights in a sub-folder or elsewhere, and an index that names them there."""

    def prepare(box):
        names = load_file(box.model / "model.safetensors")
        target = Path(box.model, entries)
        target.parent.mkdir(parents=True, exist_ok=True)
        (box.model / "model.safetensors").rename(target)
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, str(entries).replace("BOX", str(box.folder)))}
        (box.model / "model.safetensors.index.json").write_text(json.dumps(index))

    return prepare


@both_placements
def test_shards_and_tokenizers_that_lead_elsewhere(campaign, hold, placement):
    places = {"a parent": "../elsewhere/w.safetensors", "a sub-folder": "sub/w.safetensors"}
    cases = [
        Case(name, run_of(campaign, placement), _index(entry), codes=[2] if ".." in entry else [0, 2], words=["model"])
        for name, entry in places.items()
    ]
    indices = {
        "a list": [],
        "no map": {},
        "a map of numbers": {"weight_map": {"x": 1}},
        "a word": "x",
        "nothing": {"weight_map": {}},
    }
    for name, content in indices.items():
        prepare = lambda box, c=content: (  # noqa: E731
            (box.model / "model.safetensors").rename(box.model / "w.safetensors"),
            (box.model / "model.safetensors.index.json").write_text(json.dumps(c)),
        )
        cases.append(Case(f"index-{name}", run_of(campaign, placement), prepare, codes=[2], words=["model"]))
    cases.append(Case("short vocabulary", run_of(campaign, placement), _short_vocabulary, codes=[2], words=["model"]))
    for content in ("[]", "{}", "null", "1", '{"model": 1}', '{"model": {"type": "nosuch"}}'):
        prepare = lambda box, c=content: (box.model / "tokenizer.json").write_text(c)  # noqa: E731
        cases.append(Case(f"tokenizer-{content}", run_of(campaign, placement), prepare, codes=[2], words=["model"]))
    hold("models", cases)


def test_any_changed_byte_of_a_model_is_another_run(campaign, hold):
    """The same command on a model of which one file has changed: another record, or a refusal."""
    argv = run_of(campaign, "resident")
    clean = campaign.state(argv)
    known = set(campaign.clean(argv))
    cases = []
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        for place in (0.2, 0.4, 0.6, 0.95):

            def prepare(box, name=name, place=place):
                clean(box)
                path = box.model / name
                content = bytearray(path.read_bytes())
                content[int(place * len(content))] ^= 1
                path.write_bytes(content)

            def another(box, result):
                new = {path.parent.name for path in box.results.glob("runs/*/result.json")} - known
                return [] if new or result.code else ["an old record was taken for the changed model"]

            cases.append(Case(f"{name}-{place}", argv, prepare, codes=[0, 2], words=["model"], after=another))
    hold("identity", cases)
