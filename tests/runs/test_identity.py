"""The key of a record: equal for runs that must give equal numbers, another for each setting that can change one."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load, save_file
from support import command, compose, save_tiny, settings_of, tiny_config, tiny_overrides
from transformers import MixtralConfig

from dass_exp.config import plugin_source
from dass_exp.config.settings import settings_without_effect
from dass_exp.methods.dass import Dass
from dass_exp.runs import resolved_run as identity_module
from dass_exp.runs.context import RunContext
from dass_exp.runs.resolve import identify_run
from dass_exp.runs.resolved_run import ResolvedRun, key_of


def identified(folder, *overrides: str) -> ResolvedRun:
    return identify_run(settings_of(f"model.path={folder}", *overrides), RunContext())


def key_with(folder, *overrides: str) -> str:
    return identified(folder, *overrides).key


# --- every setting, as the composed config names it (method=dass, eval=mini)

# Another value for each setting whose type does not suggest one.
ANOTHER = {
    "tags": "[other]",
    "model.dtype": "bfloat16",
    "model.bos": "window",
    "model.roles": "{q: self_attn.k_proj,k: self_attn.q_proj,v: self_attn.v_proj,o: self_attn.o_proj,"
    "gate: mlp.up_proj,up: mlp.gate_proj,down: mlp.down_proj}",
    "model.placement": "stream",
    "method.granularity": "output",
    "scope": "all",
    "calibration.text.asset": "wikipedia",
    "calibration.sampling": "document",
    "calibration.cache": "disk",
    "experts.starved": "raise",
    "eval.perplexity.text.asset": "c4",
    "eval.perplexity.text.part": "odd",
    "eval.extra_perplexity": "{more: {text: {_target_: dass_exp.data.texts.OfflineText, asset: c4}}}",
    "eval.generation": "{prompts: 3}",
    "eval.zeroshot.tasks": "[piqa]",
    "eval.zeroshot.data": "hub",
    "eval.cache": "disk",
    "plugins": "[another]",
}
GROUPS = {
    "method._target_": "method=wanda",
    "pattern._target_": "pattern=unstructured",
    "tracker._target_": "tracker=none",
    "permute._target_": "permute=neurons",
    "refine._target_": "refine=swaps",
    "repair._target_": "repair=least_squares",
    "retrain._target_": "retrain=norms",
}
OWN_TEST = {  # below, or in test_tiny.py
    *(
        "eval.zeroshot.include_path",
        "allocation._target_",
        "model.path",
        "model.revision",
        "model.device",
        "model.training_seed",
    ),
    *("calibration.text._target_", "eval.perplexity.text._target_"),
}


def leaves(node: Any, where: str = "") -> dict[str, Any]:
    """The values of a nested mapping by dotted name."""
    if not isinstance(node, dict) or not node:
        return {where: node}
    return {leaf: value for key in node for leaf, value in leaves(node[key], f"{where}.{key}".lstrip(".")).items()}


def override_of(name: str, value: Any) -> str:
    """An override that gives a setting another value than this one."""
    if name in GROUPS:
        return GROUPS[name]
    if isinstance(value, bool):
        derived = str(not value).lower()
    else:
        derived = "1" if value is None else value + 1 if isinstance(value, int | float) else "other"
    return f"{name}={ANOTHER.get(name, derived)}"


SETTINGS = leaves(OmegaConf.to_container(compose("model.name=x"))).items()
OVERRIDES = {name: override_of(name, value) for name, value in SETTINGS if name not in OWN_TEST}
WITHOUT_EFFECT = {
    name for name in OVERRIDES for field in settings_without_effect() if f"{name}.".startswith(f"{field}.")
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A mixture of experts, for which every setting has a meaning."""
    settings = {**tiny_config(num_hidden_layers=1).to_dict(), "model_type": "mixtral", "num_local_experts": 2}
    return save_tiny(tmp_path_factory.mktemp("mixture") / "model", MixtralConfig(**settings))


@pytest.fixture(scope="module")
def keys(mixture):
    """The key with each setting changed, by the name of the setting."""
    return {name: key_with(mixture, override) for name, override in OVERRIDES.items()}


@pytest.mark.thorough
def test_a_setting_changes_the_key_unless_its_field_says_that_it_has_no_effect(keys, mixture):
    base = key_with(mixture)
    assert {name for name, key in keys.items() if key == base} == WITHOUT_EFFECT


@pytest.mark.thorough
def test_an_allocation_gives_a_key_of_its_own(tiny):
    unstructured = [f"allocation={name}" for name in ("uniform", "owl", "alpha")]
    assert len({key_with(tiny, "pattern=unstructured", one) for one in unstructured}) == 3
    assert key_with(tiny, "pattern=unstructured", "allocation=uniform") == key_with(tiny, "pattern=unstructured")


@pytest.mark.thorough
def test_each_setting_with_an_effect_gives_a_key_of_its_own(keys):
    effective = [key for name, key in keys.items() if name not in WITHOUT_EFFECT]
    assert len(set(effective)) == len(effective) > 20


def test_the_tables_of_these_tests_name_settings_that_exist():
    assert {*ANOTHER, *GROUPS, *OWN_TEST} <= dict(SETTINGS).keys()


@pytest.fixture(scope="module")
def base(tiny):
    return key_with(tiny)


def test_a_key_is_sixteen_hex_digits_and_lasts(tiny, base):
    assert re.fullmatch(r"[0-9a-f]{16}", base)
    assert key_with(tiny) == base


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("dense", "5b80f15c54ff32eb"),
        ("dass", "68329c45904fe554"),
        ("wanda", "cdf71cfd946296ef"),
        ("magnitude", "01620ee63398b979"),
        ("sparsegpt", "f798774fb33a15a7"),
    ],
)
def test_records_of_the_demo_are_found_by_the_keys_that_they_have_always_had(method, key):
    overrides = ["model=smollm2_135m", "model.device=cpu", f"method={method}", "pattern=2of4", "eval=mini"]
    identity = identify_run(settings_of(*overrides), RunContext()).identity
    identity["eval"]["zeroshot"]["lm_eval"] = "0.4.13"  # which scored them
    identity["eval"]["version"] = 1  # before divergence and the log-likelihoods of all choices
    assert key_of(identity) == key


@pytest.mark.thorough
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
        # nothing is joined there
        (["calibration.sampling=document"], ["calibration.sampling=document", "calibration.separator=x"]),
        (["protocol=demo"], ["calibration=c4_mini", "eval=mini"]),
    ],
    ids=" ".join,
)
def test_equal_settings_have_equal_keys(tiny, one, other):
    if not torch.accelerator.is_available() or "auto" not in one[0]:
        assert key_with(tiny, *one) == key_with(tiny, *other)


SETTINGS_OF_A_METHOD = ["pattern=4of8", "scope=all", "seed=3", "calibration.num_samples=3", "calibration.seq_len=99"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("method", "uses"),
    [("dense", ("eval",)), ("magnitude", ("eval", "pattern", "scope")), ("dass", ""), ("wanda", ""), ("sparsegpt", "")],
)
def test_a_key_holds_what_its_method_uses_and_nothing_else(tiny, method, uses):
    overrides = [*SETTINGS_OF_A_METHOD, "calibration.text.asset=wikipedia", "eval=ppl_mini"]
    key = key_with(tiny, f"method={method}")
    changing = [override for override in overrides if key_with(tiny, f"method={method}", override) != key]
    assert changing == [override for override in overrides if override.startswith(uses)]


@pytest.mark.thorough
def test_each_method_and_each_of_its_settings_has_a_key_of_its_own(tiny):
    runs = [["method=dense"], ["method=magnitude"], ["method=wanda"], ["method=dass"], ["method=sparsegpt"]]
    runs += [["method=sparsegpt", "method.blocksize=64"], ["method=sparsegpt", "method.damping=0.1"]]
    assert len({key_with(tiny, *overrides) for overrides in runs}) == len(runs)


@pytest.mark.thorough
def test_the_rule_for_starved_experts_is_in_the_key_of_a_calibrated_mixture_only(tiny, mixture):
    sensitive = {
        (folder, method)
        for folder in (tiny, mixture)
        for method in ("wanda", "magnitude", "dense")
        if key_with(folder, f"method={method}", "experts.min_tokens=1") != key_with(folder, f"method={method}")
    }
    assert sensitive == {(mixture, "wanda")}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("owner", "name", "raised", "unaffected"),
    [
        (identity_module, "ENGINE_VERSION", 99, "method=dense"),
        (identity_module, "EVALUATION_VERSION", 99, "eval=none"),
        (identity_module, "lm_eval_version", lambda: "99", "eval=ppl_mini"),
        (Dass, "version", 99, "method=wanda"),
    ],
)
def test_a_raised_version_changes_the_keys_that_depend_on_it(tiny, base, monkeypatch, owner, name, raised, unaffected):
    before = key_with(tiny, unaffected)
    monkeypatch.setattr(owner, name, raised)
    assert key_with(tiny) != base
    assert key_with(tiny, unaffected) == before


def test_the_type_of_device_is_in_the_key(tiny):
    run = identified(tiny)
    on = {
        device: dataclasses.replace(run, spec=dataclasses.replace(run.spec, device=torch.device(device))).key
        for device in ("cuda:0", "cuda:1", "cpu")
    }
    assert on["cuda:0"] == on["cuda:1"] != on["cpu"]


@pytest.mark.thorough
def test_own_tasks_are_in_the_key_by_their_content(tiny, base, tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        (folder / "__pycache__").mkdir(parents=True)
        (folder / "task.yaml").write_text("task: mine\ndataset_path: json\nmetric_list: [{metric: acc}]\n")
        (folder / "__pycache__" / "x.pyc").write_text(folder.name)
    keys = [key_with(tiny, f"eval.zeroshot.include_path={folder}") for folder in folders]
    assert keys[0] == keys[1] != base
    (folders[0] / "data.jsonl").write_text("{}")
    assert key_with(tiny, f"eval.zeroshot.include_path={folders[0]}") != keys[0]


# --- which model


def test_no_path_of_this_machine_is_in_the_key(tiny):
    identity = repr(identified(tiny, "results_dir=/somewhere/else").identity)
    assert not any(path in identity for path in (str(tiny), "/somewhere/else"))


def link(files, folder, blobs):
    """Fill a folder with links to copies of files, as the cache of the hub keeps them."""
    folder.mkdir(parents=True)
    blobs.mkdir(parents=True)
    for file in files.iterdir():
        shutil.copy(file, blobs / file.name)
        (folder / file.name).symlink_to(blobs / file.name)


def test_moving_a_model_or_linking_its_files_keeps_its_key(tiny, base, tmp_path):
    shutil.copytree(tiny, tmp_path / "moved" / "elsewhere")
    link(tiny, tmp_path / "snapshot", tmp_path / "blobs")
    assert key_with(tmp_path / "moved" / "elsewhere") == key_with(tmp_path / "snapshot") == base


@pytest.mark.thorough
def test_changing_a_weight_or_the_tokenizer_is_seen_by_the_same_process(tiny, base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    assert key_with(folder) == base
    weights = load((folder / "model.safetensors").read_bytes())
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    another_weight = key_with(folder)
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokenizer.replace('"</s>"', '"<end>"'))
    assert len({base, another_weight, key_with(folder)}) == 3


@pytest.mark.thorough
def test_a_hub_model_is_known_by_its_commit(tmp_path, tiny):
    """In a process of its own: the hub's client looks at the environment when it is imported."""
    commits, cache = {"main": "c0ffee" * 6 + "c0ff", "v2": "decade" * 6 + "deca"}, tmp_path / "hub/models--some--model"
    for branch, commit in commits.items():
        link(tiny, cache / "snapshots" / commit, cache / "blobs" / branch)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / branch).write_text(commit)
    cell = [*tiny_overrides(tmp_path / "none", tmp_path / "results"), "method=wanda"]
    hub = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    for more in (
        ["model.placement=resident"],
        ["model.revision=v2", "model.placement=stream", f"save={tmp_path}/saved"],
    ):
        done = command(*cell, "model.path=some/model", *more, folder=tmp_path, **hub)
        assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in tmp_path.glob("results/runs/*/result.json")]
    models = sorted(record["identity"]["model"] for record in records)
    assert models == sorted(2 * [f"some/model@{commit}" for commit in commits.values()])
    assert (tmp_path / "saved" / "model.safetensors.index.json").is_file()
    assert "it cannot be loaded" in command(*cell, "model.path=some/other", folder=tmp_path, **hub).stderr


# --- code of plugins

PLUGIN = """
from dataclasses import dataclass
from dass_exp.methods.magnitude import Magnitude

@dataclass
class Largest(Magnitude):
    pass
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Write a package with these files and return the key of a run of its method; as often as asked."""
    folder = tmp_path / "packages" / "a_plugin"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("DASS_EXP_PLUGINS", "a_plugin")

    def key(tiny, **files):
        for name, content in {"__init__": "", "method": PLUGIN, **files}.items():
            (folder / f"{name}.py").write_text(content)
        for module in ("a_plugin", "a_plugin.method"):
            sys.modules.pop(module, None)
        for cached in (plugin_source._package_digest, plugin_source._imports, plugin_source._roots):
            cached.cache_clear()
        return key_with(tiny, "method=magnitude", "method._target_=a_plugin.method.Largest")

    yield key
    for module in ("a_plugin", "a_plugin.method"):
        sys.modules.pop(module, None)


@pytest.mark.thorough
def test_edited_code_of_a_plugin_is_another_run(tiny, plugin):
    keys = [plugin(tiny), plugin(tiny), plugin(tiny, method=PLUGIN + "    version = 1"), plugin(tiny, helper="x = 1")]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


@pytest.mark.thorough
def test_edited_code_that_a_plugin_imports_is_another_run(tiny, plugin, tmp_path):
    """Its own packages wherever they lie, also by way of others; not those of no import, nor installed ones."""
    packages = tmp_path / "packages"

    def write(**files):
        for name, content in files.items():
            (packages / f"{name}.py").write_text(content)

    imports = {"method": "import my_scores, numpy, json\n" + PLUGIN, "helper": "def late():\n    import my_late\n"}
    write(my_scores="from my_rest import x", my_rest="x = 1", my_late="y = 1", my_other="z = 1")
    keys = [plugin(tiny, **imports)]
    for edited in (
        {"my_other": "z = 2"},
        {"my_scores": "from my_rest import x, x"},
        {"my_rest": "x = 2"},
        {"my_late": ""},
    ):
        write(**edited)
        for module in ("my_scores", "my_rest"):
            sys.modules.pop(module, None)
        keys.append(plugin(tiny, **imports))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


@pytest.mark.thorough
def test_the_key_of_a_plugin_does_not_depend_on_where_it_runs(tiny, plugin, tmp_path, monkeypatch):
    """An optional import that finds an empty folder, a file that no parser can read, installed libraries."""
    optional = "try:\n    import my_missing, sklearn\nexcept ImportError:\n    pass\n" + PLUGIN
    deep = "x = " + "(" * 3000 + "1" + ")" * 3000
    files = {"method": optional, "deep": deep, "old": "import my_missing\nx = '\\d'"}
    first = plugin(tiny, **files)
    (tmp_path / "elsewhere" / "my_missing").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    assert plugin(tiny, **files) == first
    (tmp_path / "elsewhere" / "my_missing" / "__init__.py").write_text("x = 1")
    assert plugin(tiny, **files) != first


def test_our_own_code_is_known_by_its_versions(tiny):
    assert "code" not in identified(tiny).identity
