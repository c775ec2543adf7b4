"""The key of a record: equal for runs that must give equal numbers, another for each setting that can change one."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from typing import Any

import pytest
import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load, save_file
from support import command, compose, settings_of

from dass_exp.methods.dass import Dass
from dass_exp.models import load as models
from dass_exp.runs import identity as key_module
from dass_exp.runs.identity import identity_of, key_of
from dass_exp.runs.run import Bench, SilentReporter


def key_with(folder, *overrides: str) -> str:
    settings = settings_of(f"model.path={folder}", *overrides)
    bench = Bench(settings, SilentReporter())
    return key_of(settings, bench.spec, bench.bos)


# One other value for each setting that can change a number, by the way it is named in the composed config (method=dass, eval=mini).
CHANGES = {
    "model.dtype": "model.dtype=bfloat16",
    "model.bos": "model.bos=window",
    "model.roles": "model.roles={q: self_attn.k_proj,k: self_attn.q_proj,v: self_attn.v_proj,o: self_attn.o_proj,"
    "gate: mlp.up_proj,up: mlp.gate_proj,down: mlp.down_proj}",
    "method._target_": "method=wanda",
    "method.alpha": "method.alpha=0.25",
    "method.granularity": "method.granularity=output",
    "pattern._target_": "pattern=unstructured",
    "pattern.n": "pattern.n=1",
    "pattern.m": "pattern.m=8",
    "scope": "scope=all",
    "seed": "seed=1",
    "calibration.text.asset": "calibration.text.asset=wikipedia",
    "calibration.sampling": "calibration.sampling=document",
    "calibration.separator": "calibration.separator=' '",
    "calibration.num_samples": "calibration.num_samples=8",
    "calibration.seq_len": "calibration.seq_len=256",
    "repeat": "repeat=1",
    "eval.perplexity.text.asset": "eval.perplexity.text.asset=c4",
    "eval.perplexity.text.part": "eval.perplexity.text.part=odd",
    "eval.perplexity.context": "eval.perplexity.context=256",
    "eval.perplexity.max_windows": "eval.perplexity.max_windows=8",
    "eval.zeroshot.tasks": "eval.zeroshot.tasks=[piqa]",
    "eval.zeroshot.limit": "eval.zeroshot.limit=10",
    "eval.zeroshot.data": "eval.zeroshot.data=hub",
}
# The others: labels, places, sizes of batches, what is done with the result. (The model's path is neither: its weights are in the key.)
OUTSIDE = {
    "model.name": "model.name=other",
    "model.accept_license": "model.accept_license=true",
    "model.trust_remote_code": "model.trust_remote_code=true",
    "calibration.name": "calibration.name=other",
    "calibration.batch_size": "calibration.batch_size=1",
    "calibration.cache": "calibration.cache=disk",
    "model.placement": "model.placement=stream",
    "model.license": "model.license=other",
    "model.parameters": "model.parameters=1",
    "model.context": "model.context=1",
    "experts.min_tokens": "experts.min_tokens=1",  # this model has none; a mixture stands in a test of its own
    "experts.starved": "experts.starved=refuse",
    "eval.name": "eval.name=other",
    "eval.batch_size": "eval.batch_size=1",
    "protocol.name": "protocol.name=other",
    **{
        f"protocol.{axis}": f"protocol.{axis}=other"
        for axis in ("models", "perplexity_eval", "patterns", "samples", "sample_length", "sources", "sparsities")
    },
    "plan": "plan=true",
    "tracker._target_": "tracker=none",
    "tracker.project": "tracker.project=other",
    "threads": "threads=1",
    "rerun": "rerun=true",
    "save_masks": "save_masks=true",
    "save": "save=/somewhere/else",
    "checkpoint": "checkpoint=true",
    "results_dir": "results_dir=/somewhere/else",
    "plugins": "plugins=[another]",
}
ELSEWHERE = {  # covered by tests of their own below (the training seed: test_tiny.py), or by no number
    "model.path",
    "model.revision",
    "model.device",
    "model.training_seed",
    "sweep",
    "eval.perplexity.name",
    "calibration.text._target_",
    "eval.perplexity.text._target_",
}


def leaves(node: Any, where: str = "") -> set[str]:
    if isinstance(node, dict) and node:
        return {leaf for key, value in node.items() for leaf in leaves(value, f"{where}.{key}" if where else str(key))}
    return {where}


def test_every_setting_is_known_to_these_tests():
    composed = compose("model.name=x")
    assert isinstance(composed, DictConfig)
    assert leaves(OmegaConf.to_container(composed)) == set(CHANGES) | set(OUTSIDE) | ELSEWHERE


@pytest.fixture(scope="module")
def base(tiny):
    return key_with(tiny)


def test_a_key_is_sixteen_hex_digits_and_lasts(tiny, base):
    assert re.fullmatch(r"[0-9a-f]{16}", base)
    assert key_with(tiny) == base


@pytest.mark.parametrize("override", CHANGES.values(), ids=CHANGES)
def test_a_setting_that_matters_changes_the_key(tiny, base, override):
    assert key_with(tiny, override) != base


def test_all_those_keys_differ(tiny, base):
    assert len({key_with(tiny, override) for override in CHANGES.values()} | {base}) == len(CHANGES) + 1


@pytest.mark.parametrize("override", OUTSIDE.values(), ids=OUTSIDE)
def test_a_setting_that_changes_no_number_leaves_the_key(tiny, base, override):
    assert key_with(tiny, override) == base


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["method.alpha=1"], ["method.alpha=1.0"]),
        (["pattern=2of4"], ["pattern=nm", "pattern.n=2", "pattern.m=4"]),
        (["pattern=unstructured", "pattern.sparsity=0"], ["pattern=unstructured", "pattern.sparsity=0.0"]),
        (["model.dtype=auto"], ["model.dtype=float32"]),  # what auto is on a CPU
        (["model.device=auto"], ["model.device=cpu"]),
        (["model.bos=auto"], ["model.bos=never"]),  # what auto is for a tokenizer that adds no such token
        (["method.granularity=output", "method.alpha=0.25"], ["method.granularity=output", "method.alpha=1"]),
        (["method=sparsegpt", "method.damping=1"], ["method=sparsegpt", "method.damping=1.0"]),
        (["eval.zeroshot.tasks=[piqa,boolq]"], ["eval.zeroshot.tasks=[boolq,piqa]"]),
        (
            ["calibration.sampling=document"],
            ["calibration.sampling=document", "calibration.separator=x"],
        ),  # nothing is joined there
        (["protocol=demo"], ["calibration=c4_mini", "eval=mini"]),
    ],
    ids=" ".join,
)
def test_equal_settings_have_equal_keys(tiny, one, other):
    if not torch.accelerator.is_available() or "auto" not in one[0]:
        assert key_with(tiny, *one) == key_with(tiny, *other)


PRUNING = [
    "pattern=4of8",
    "scope=all",
    "seed=3",
    "calibration.num_samples=3",
    "calibration.seq_len=99",
    "calibration.text.asset=wikipedia",
]


@pytest.mark.parametrize("override", PRUNING)
def test_dense_ignores_what_is_about_pruning(tiny, override):
    assert key_with(tiny, "method=dense", override) == key_with(tiny, "method=dense")


def test_dense_depends_on_the_evaluation(tiny):
    assert key_with(tiny, "method=dense", "eval=ppl_mini") != key_with(tiny, "method=dense")


@pytest.mark.parametrize("override", PRUNING)
def test_magnitude_ignores_calibration_and_seed_only(tiny, override):
    same = key_with(tiny, "method=magnitude", override) == key_with(tiny, "method=magnitude")
    assert same == (not override.startswith(("pattern", "scope")))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("override", PRUNING)
def test_a_calibrated_method_ignores_none_of_them(tiny, method, override):
    assert key_with(tiny, f"method={method}", override) != key_with(tiny, f"method={method}")


def test_each_method_and_each_of_its_settings_has_a_key_of_its_own(tiny):
    runs = [["method=dense"], ["method=magnitude"], ["method=wanda"], ["method=dass"], ["method=sparsegpt"]]
    runs += [["method=sparsegpt", "method.blocksize=64"], ["method=sparsegpt", "method.damping=0.1"]]
    assert len({key_with(tiny, *overrides) for overrides in runs}) == len(runs)


@pytest.mark.parametrize(
    ("owner", "name"), [(key_module, "ENGINE_VERSION"), (key_module, "EVALUATION_VERSION"), (Dass, "version")]
)
def test_a_raised_version_changes_the_key(tiny, base, monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, getattr(owner, name) + 1)
    assert key_with(tiny) != base


def test_the_engine_version_does_not_touch_dense(tiny, monkeypatch):
    before = key_with(tiny, "method=dense")
    monkeypatch.setattr(key_module, "ENGINE_VERSION", key_module.ENGINE_VERSION + 1)
    assert key_with(tiny, "method=dense") == before


def test_the_version_of_lm_eval_is_in_the_key_of_zero_shot_runs_only(tiny, base, monkeypatch):
    without = key_with(tiny, "eval=ppl_mini")
    monkeypatch.setattr(key_module, "lm_eval_version", lambda: "99")
    assert key_with(tiny) != base
    assert key_with(tiny, "eval=ppl_mini") == without


def test_the_type_of_device_is_in_the_key(tiny, base):
    settings = settings_of(f"model.path={tiny}")
    bench = Bench(settings, SilentReporter())
    on = {
        device: key_of(settings, dataclasses.replace(bench.spec, device=torch.device(device)), bench.bos)
        for device in ("cuda:0", "cuda:1", "cpu")
    }
    assert on["cuda:0"] == on["cuda:1"] != on["cpu"]


def test_no_path_of_this_machine_is_in_the_key(tiny):
    settings = settings_of(f"model.path={tiny}", "results_dir=/somewhere/else")
    bench = Bench(settings, SilentReporter())
    identity = repr(identity_of(settings, bench.spec, bench.bos))
    assert str(tiny) not in identity
    assert "/somewhere/else" not in identity


def test_moving_a_model_keeps_its_key(tiny, base, tmp_path):
    shutil.copytree(tiny, tmp_path / "moved" / "elsewhere")
    assert key_with(tmp_path / "moved" / "elsewhere") == base


def test_a_folder_of_links_has_the_key_of_the_files(tiny, base, tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()  # as the cache of the hub keeps them
    for number, file in enumerate(sorted(tiny.iterdir())):
        shutil.copy(file, tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / file.name).symlink_to(tmp_path / "blobs" / str(number))
    assert key_with(tmp_path / "snapshot") == base


def test_changing_one_weight_changes_the_key(tiny, base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    weights = load((folder / "model.safetensors").read_bytes())
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert key_with(folder) != base


def test_changing_a_weight_in_place_is_seen_by_the_same_process(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    before = key_with(folder)
    weights = load((folder / "model.safetensors").read_bytes())
    weights["lm_head.weight"][0, 0] = 7
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert key_with(folder) != before


def test_changing_the_tokenizer_changes_the_key(tiny, base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole.replace('"</s>"', '"<end>"'))
    assert key_with(folder) != base


@pytest.fixture(name="hub")
def hub_fixture(tmp_path, tiny):
    """A hub's cache as its client leaves it: blobs, and a folder of links to them for each commit, of which branches are names."""
    place = tmp_path / "hub" / "models--some--model"
    for commit, branch in (("c0ffee" * 6 + "c0ff", "main"), ("decade" * 6 + "deca", "v2")):
        snapshot = place / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in tiny.iterdir():
            blob = place / "blobs" / f"{branch}-{file.name}"
            blob.parent.mkdir(exist_ok=True)
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(blob)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / branch).write_text(commit)
    return tmp_path


def test_a_hub_model_is_known_by_its_commit(hub):
    """In a process of its own: the hub's client looks at the environment when it is imported."""
    base = [
        "method=wanda",
        "eval=ppl_mini",
        "eval.perplexity.context=32",
        "eval.perplexity.max_windows=4",
        "calibration.num_samples=4",
        "calibration.seq_len=32",
        "tracker=none",
        f"results_dir={hub}/results",
        "model.path=some/model",
    ]
    for more in (["model.placement=resident"], ["model.revision=v2", "model.placement=stream", f"save={hub}/saved"]):
        done = command(*base, *more, folder=hub, HF_HOME=str(hub), HF_HUB_CACHE=str(hub / "hub"))
        assert done.returncode == 0, done.stderr
    records = {path.parent.name: json.loads(path.read_text()) for path in hub.glob("results/runs/*/result.json")}
    models_seen = [record["identity"]["model"] for record in records.values()]
    assert sorted(models_seen) == 2 * ["some/model@" + "c0ffee" * 6 + "c0ff"] + 2 * [
        "some/model@" + "decade" * 6 + "deca"
    ]
    assert (hub / "saved" / "model.safetensors.index.json").is_file()
    assert (
        "it cannot be loaded"
        in command(
            *base[:-1], "model.path=some/other", folder=hub, HF_HOME=str(hub), HF_HUB_CACHE=str(hub / "hub")
        ).stderr
    )


def test_the_rule_for_starved_experts_is_in_the_key_of_a_mixture_only(tiny):
    dense = models.identify(settings_of(f"model.path={tiny}").config.model)
    mixture = dataclasses.replace(dense, config=transformers.MixtralConfig())
    keys = {
        (spec is mixture, method): {
            key_of(settings_of(f"method={method}", f"experts.min_tokens={number}"), spec, "never") for number in (1, 2)
        }
        for spec in (dense, mixture)
        for method in ("wanda", "magnitude", "dense")
    }
    assert {place for place, found in keys.items() if len(found) == 2} == {(True, "wanda")}
