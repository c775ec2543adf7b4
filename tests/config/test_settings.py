"""The Hydra tree and the validation of settings: every file composes, no key is dead, every bad value is named."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from omegaconf import OmegaConf
from support import CONF, ROOT, components_of, compose, composed_with_choices, contains, settings_of

from dass_exp.config.components import OURS, target_class
from dass_exp.config.settings import ModelConfig, RunConfig, validate
from dass_exp.errors import UserError
from dass_exp.runs.resolved_run import Components

CONTENT = {path: yaml.safe_load(path.read_text()) for path in sorted(CONF.glob("*/*.yaml"))}
NAMED_GROUPS = ["model", "calibration", "eval", "protocol"]  # their part of a run has a name
RELIED_ON = {
    "model": "smollm2_135m gemma3_270m llama2_7b llama2_13b llama2_70b llama31_8b mistral_7b gemma_7b",
    "method": "dass wanda sparsegpt magnitude dense",
    "pattern": "2of4 4of8 nm unstructured",
    "calibration": "c4_mini c4 wikitext2",
    "eval": "mini ppl_mini zeroshot_mini mmlu_mini paper none",
    "protocol": "demo paper",
    "tracker": "wandb none",
}
NEEDED = {
    "allocation/owl": ["pattern=unstructured"],
    "allocation/alpha": ["pattern=unstructured"],
    "refine/dsnot": ["method=wanda"],
    "pattern/nm": ["pattern.n=1", "pattern.m=4"],
    "calibration/text_file": ["calibration.text.path=my.txt"],
    "eval/ppl_text_file": ["eval.perplexity.text.path=my.txt"],
}  # what a file leaves to the user


def choice_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_the_tree_is_groups_of_files_and_nothing_else():
    groups = {path for path in CONF.iterdir() if path.is_dir() and path.name != "hydra"}
    assert {path for group in groups for path in group.iterdir()} == set(CONTENT)
    others = {CONF / "config.yaml", *(CONF / "hydra" / "launcher").iterdir()}
    assert {path for path in CONF.rglob("*.yaml") if path not in CONTENT} == others
    settings = yaml.safe_load((CONF / "config.yaml").read_text())
    assert set(settings) - set(get_type_hints(RunConfig)) == {"defaults", "hydra"}


@pytest.mark.parametrize("group", RELIED_ON)
def test_the_names_that_users_rely_on_are_there(group):
    assert {path.stem for path in CONTENT if path.parent.name == group} >= set(RELIED_ON[group].split())


@pytest.mark.parametrize(
    "path",
    [
        # lm-eval reads the files of all its tasks to find those of the paper
        pytest.param(path, marks=pytest.mark.thorough if path.stem == "paper" else ())
        for path in CONTENT
    ],
    ids=choice_of,
)
def test_every_file_composes_and_validates(path):
    group, own = path.parent.name, CONTENT[path]
    chosen = "eval=[ppl_mini,generation_mini]" if path.stem == "generation_mini" else f"{group}={path.stem}"
    config = settings_of(chosen, *NEEDED.get(choice_of(path), []))
    assert Components.of(config)
    composed = OmegaConf.to_container(OmegaConf.structured(config)).get(group, {})
    assert composed.get("_target_") == own.get("_target_")
    if group in NAMED_GROUPS and "," not in chosen:
        assert composed["name"] == own.get("name", path.stem) == path.stem


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_composes(path):
    assert yaml.safe_load(path.read_text())["hydra"]["sweeper"]["params"]
    assert compose(f"sweeps={path.stem}").sweep.title


def test_defaults():
    config = settings_of()
    method = {"_target_": "dass_exp.methods.dass.Dass", "alpha": 0.5, "granularity": "input", "input_norm": False}
    assert (config.model.name, config.method, config.scope, config.seed) == ("smollm2_135m", method, "mlp", 0)
    assert config.pattern == {"_target_": "dass_exp.masks.NM", "n": 2, "m": 4}
    assert (config.calibration.name, config.calibration.num_samples, config.calibration.seq_len) == ("c4_mini", 16, 512)
    scored, tasks = config.eval.perplexity, config.eval.zeroshot
    assert (config.eval.name, scored.context, scored.max_windows, tasks.limit) == ("mini", 512, 16, 20)


def test_the_paper_protocol_sets_calibration_and_evaluation_together():
    config = settings_of("protocol=paper")
    calibration, scored, tasks = config.calibration, config.eval.perplexity, config.eval.zeroshot
    size = calibration.num_samples, calibration.seq_len
    assert (calibration.name, *size, calibration.sampling) == ("c4", 128, 2048, "document")
    assert (config.eval.name, scored.context, scored.max_windows) == ("paper", 2048, None)
    assert (tasks.limit, len(tasks.tasks)) == (None, 5)


def dead_keys(node: Any, kind: Any, where: str) -> list[str]:
    """Keys of ``node`` that no field takes: of its target's dataclass, of the schema, or of neither."""
    if not isinstance(node, dict):
        return []
    if "_target_" in node:
        kind = target_class(where, node["_target_"])
    if not dataclasses.is_dataclass(kind):
        return [f"{where}: no dataclass takes its keys"] if kind is not dict else []
    hints, dead = get_type_hints(kind), []
    for key, value in node.items():
        if key in ("_target_", "defaults"):
            continue
        if key not in {field.name for field in dataclasses.fields(kind)}:
            dead.append(f"{where}.{key}")
            continue
        candidates = [part for part in get_args(hints[key]) or (hints[key],) if dataclasses.is_dataclass(part)]
        dead += dead_keys(value, candidates[0] if candidates else dict, f"{where}.{key}")
    return dead


def test_no_key_is_dead():
    dead, hints = [], get_type_hints(RunConfig)
    sweeps = "".join(path.read_text() for path in (ROOT / "sweeps").rglob("*.yaml"))
    for path, node in CONTENT.items():
        group = path.parent.name
        if group == "protocol":  # a package at the root: it chooses other groups, and holds axes of the sweeps
            dead += [f"{choice_of(path)}: {key}" for key in set(node) - {"defaults", "protocol"}]
            unused = [key for key in node["protocol"] if f"${{protocol.{key}}}" not in sweeps and key != "name"]
            dead += [f"{choice_of(path)}: {key}" for key in unused]
        elif group in hints:
            dead += [f"{choice_of(path)}: {key}" for key in dead_keys(node, hints[group], group)]
        else:  # a group of whole settings, such as those of a cell
            dead += [f"{choice_of(path)}: {key}" for key in set(node) - {"defaults", *hints}]
    assert dead == []


def test_the_search_for_dead_keys_finds_one():
    assert dead_keys({"name": "x", "pth": "y"}, ModelConfig, "model") == ["model.pth"]
    nested = {"name": "x", "text": {"_target_": "dass_exp.data.texts.OfflineText", "asset": "c4", "prt": "odd"}}
    assert dead_keys(nested, get_type_hints(RunConfig)["calibration"], "calibration") == ["calibration.text.prt"]


def leaves(node: Any) -> list[Any]:
    """The values of a nested mapping, the defaults list apart."""
    if not isinstance(node, dict):
        return [node]
    return [leaf for key, value in node.items() if key != "defaults" for leaf in leaves(value)]


def test_no_two_files_differ_in_one_word():
    """Models aside, and files that say nothing but the one word that they choose."""
    others = {path: node for path, node in CONTENT.items() if path.parent.name != "model" and len(leaves(node)) > 1}
    words = {choice_of(path): re.findall(r"\w+", yaml.safe_dump(node)) for path, node in others.items()}
    pairs = [
        (one, other)
        for (one, left), (other, right) in itertools.combinations(words.items(), 2)
        if len(left) == len(right) and sum(map(str.__ne__, left, right)) < 2
    ]
    assert pairs == []


def test_files_are_short():
    lengths = {path: len(path.read_text().splitlines()) for path in CONTENT}
    longest = {"protocol": 16}  # it holds the axes of the sweeps
    assert [choice_of(path) for path in CONTENT if lengths[path] > longest.get(path.parent.name, 12)] == []


NM = "pattern=nm"
HALF = "pattern=unstructured"
TASKS = "eval.zeroshot.tasks"
BAD = [
    ("method.alpha=-1", ["method.alpha=-1:", "at least 0"]),
    ("method.alpha=nan", ["method.alpha=nan:", "a number of at least 0"]),
    ("method.alpha=inf", ["method.alpha=inf:", "a number of at least 0"]),
    ("method.alpha=abc", ["method.alpha='abc':", "a number of at least 0"]),
    ("method.alpha=true", ["method.alpha=True:", "a number of at least 0"]),
    ("method.alpha=null", ["method.alpha=None:", "a number of at least 0"]),
    ("method.granularity=row", ["method.granularity='row':", "input, output"]),
    ("method=sparsegpt method.blocksize=0", ["method.blocksize=0:", "at least 1"]),
    ("method=sparsegpt method.damping=-0.1", ["method.damping=-0.1:", "at least 0"]),
    (f"{NM} pattern.n=5 pattern.m=4", ["pattern.n=5", "pattern.m=4", "n may be at most m"]),
    (f"{NM} pattern.n=0 pattern.m=4", ["pattern.n=0:", "at least 1"]),
    (f"{NM} pattern.n=1.5 pattern.m=4", ["pattern.n=1.5:", "whole number"]),
    (f"{NM} pattern.n=1 pattern.m=0", ["pattern.m=0:", "at least 1"]),
    (f"{NM} pattern.m=4", ["pattern.n has no value"]),
    (f"{NM} pattern.n=4", ["pattern.m has no value"]),
    (f"{HALF} pattern.sparsity=1", ["pattern.sparsity=1:", "[0, 1)"]),
    (f"{HALF} pattern.sparsity=-0.1", ["pattern.sparsity=-0.1:", "[0, 1)"]),
    (f"{HALF} pattern.sparsity=nan", ["pattern.sparsity=nan:", "[0, 1)"]),
    (f"{HALF} pattern.sparsity=half", ["pattern.sparsity='half':", "[0, 1)"]),
    ("calibration.num_samples=0", ["calibration.num_samples=0:", "at least 1"]),
    ("calibration.seq_len=1", ["calibration.seq_len=1:", "at least 2"]),
    ("calibration.batch_size=0", ["calibration.batch_size=0:", "at least 1"]),
    ("calibration.sampling=foo", ["calibration.sampling='foo':", "joined, document"]),
    ("calibration.cache=ram", ["calibration.cache='ram':", "device, cpu, disk"]),
    ("calibration.text.asset=foo", ["text.asset='foo':", "c4, wikipedia"]),
    ("eval.perplexity.text.part=third", ["text.part='third':", "all, even, odd"]),
    ("experts.starved=ignore", ["experts.starved='ignore':", "uniform, raise"]),
    ("experts.min_tokens=-1", ["experts.min_tokens=-1:", "at least 0"]),
    ("scope=foo", ["scope='foo':", "mlp, attention, all"]),
    ("seed=-1", ["seed=-1:", "at least 0"]),
    ("threads=0", ["threads=0:", "at least 1"]),
    ("eval.batch_size=0", ["eval.batch_size=0:", "at least 1"]),
    (f"{TASKS}=[foo]", [TASKS, "unknown task 'foo'", "hellaswag", "boolq"]),
    (f"{TASKS}=[]", [f"{TASKS}=[]:", "at least one"]),
    (f"{TASKS}=[piqa,piqa]", [f"{TASKS}=['piqa', 'piqa']:", "none twice"]),
    (f"eval=paper {TASKS}=[no_such_task]", [TASKS, "unknown task 'no_such_task'", "lm-eval"]),
    ("eval.zeroshot.limit=0", ["eval.zeroshot.limit=0:", "at least 1"]),
    ("eval.zeroshot.num_fewshot=-1", ["eval.zeroshot.num_fewshot=-1:", "at least 0"]),
    ("eval=mmlu_mini eval.zeroshot.num_fewshot=6", ["eval.zeroshot.num_fewshot=6:", "5 examples"]),
    ("eval.zeroshot.include_path=/no/where", ["eval.zeroshot.include_path='/no/where':", "a folder"]),
    ("eval.zeroshot.data=foo", ["eval.zeroshot.data='foo':", "offline, hub"]),
    ("eval.perplexity.context=1", ["eval.perplexity.context=1:", "at least 2"]),
    ("eval.perplexity.max_windows=0", ["eval.perplexity.max_windows=0:", "at least 1"]),
    ("tracker.project=''", ["tracker.project='':", "a name"]),
    ("+method.beta=1", ["method:", "beta"]),
    ("~method", ["method has no value"]),
    ("seed=${nothing}", ["seed", "nothing"]),
    ("method.alpha=${nothing}", ["method.alpha", "nothing"]),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("overrides", "words"), BAD, ids=[overrides for overrides, _ in BAD])
def test_a_bad_value_is_named_with_what_is_allowed(overrides, words):
    with pytest.raises(UserError) as caught:
        components_of(*overrides.split())
    assert contains(str(caught.value), words), str(caught.value)


def test_a_value_at_the_edge_of_what_is_allowed_passes():
    edges = ["eval.perplexity.context=2", "calibration.seq_len=2", "seed=0"]
    assert components_of("method.alpha=0", *edges).method.alpha == 0
    assert components_of(HALF, "pattern.sparsity=0").pattern.sparsity == 0
    assert components_of(NM, "pattern.n=4", "pattern.m=4").pattern.name == "4:4"


@pytest.mark.parametrize(
    ("override", "setting", "value"),
    [
        ("checkpoint=true", "resume", True),
        ("checkpoint=false", "resume", False),
        ("experts.starved=level", "experts.starved", "uniform"),
        ("experts.starved=refuse", "experts.starved", "raise"),
    ],
)
def test_a_former_name_is_accepted_with_one_warning(override, setting, value, caplog):
    assert OmegaConf.select(OmegaConf.structured(settings_of(override)), setting) == value
    (warning,) = caplog.messages
    assert contains(warning, [override, "is now called"])


@pytest.mark.parametrize("group", NAMED_GROUPS)
def test_what_has_no_name_of_its_own_is_named_after_the_chosen_file(group):
    composed, choices = composed_with_choices("protocol=paper", "model=llama2_7b")
    OmegaConf.update(composed, f"{group}.name", "???", force_add=True)
    config = OmegaConf.structured(validate(composed, OURS, choices))
    assert config[group].name == choices[group]
    assert settings_of("calibration.name=mine").calibration.name == "mine"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "smollm2_135m"),
        (["model=llama2_7b"], "llama2_7b"),
        (["model.path=meta-llama/Llama-2-7b-hf"], "Llama-2-7b-hf"),  # not the name of the default model
        (["model.path=/some/where/my-model/"], "my-model"),
        (["model.path=/some/where/my-model", "model.name=mine"], "mine"),
    ],
)
def test_a_model_is_called_by_its_own_name(overrides, name):
    assert settings_of(*overrides).model.name == name


def test_validation_loads_no_model_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert components_of("model.path=nobody/has-this-model", f"results_dir={tmp_path}/results")
    assert list(tmp_path.iterdir()) == []
