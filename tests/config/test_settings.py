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
from support import CONF, ROOT, compose, contains, settings_of

from dass_exp.config.components import locate
from dass_exp.config.settings import ModelConfig, RunConfig
from dass_exp.errors import UserError

FILES = sorted(CONF.glob("*/*.yaml"))
NEEDED = {"pattern/nm": ["pattern.n=1", "pattern.m=4"]}  # what a file leaves to the user


def choice_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_the_tree_is_groups_of_files_and_nothing_else():
    assert len(FILES) == sum(
        len(list(group.iterdir())) for group in CONF.iterdir() if group.is_dir() and group.name != "hydra"
    )
    launchers = set((CONF / "hydra" / "launcher").iterdir())
    assert {path for path in CONF.rglob("*.yaml") if path not in FILES} == {CONF / "config.yaml", *launchers}
    assert {path.parent.name for path in FILES} >= {
        "model",
        "method",
        "pattern",
        "calibration",
        "eval",
        "protocol",
        "tracker",
    }


@pytest.mark.parametrize(
    ("group", "names"),
    [
        (
            "model",
            {
                "smollm2_135m",
                "gemma3_270m",
                "llama2_7b",
                "llama2_13b",
                "llama2_70b",
                "llama31_8b",
                "mistral_7b",
                "gemma_7b",
            },
        ),
        ("method", {"dass", "wanda", "sparsegpt", "magnitude", "dense"}),
        ("pattern", {"2of4", "4of8", "nm", "unstructured"}),
        ("calibration", {"c4_mini", "c4", "wikitext2"}),
        ("eval", {"mini", "ppl_mini", "zeroshot_mini", "paper", "none"}),
        ("protocol", {"demo", "paper"}),
        ("tracker", {"wandb", "none"}),
    ],
)
def test_the_names_that_users_rely_on_are_there(group, names):
    assert {path.stem for path in FILES if path.parent.name == group} >= names


@pytest.mark.parametrize("path", FILES, ids=choice_of)
def test_every_file_composes_and_validates(path):
    group = path.parent.name
    settings = settings_of(f"{group}={path.stem}", *NEEDED.get(choice_of(path), []))
    own = yaml.safe_load(path.read_text())
    composed = OmegaConf.to_container(OmegaConf.structured(settings.config))
    for key in ("name", "_target_"):
        if key in own:
            assert composed[group][key] == own[key]


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_composes(path):
    axes = yaml.safe_load(path.read_text())["hydra"]["sweeper"]["params"]
    assert axes
    assert compose(f"sweeps={path.stem}").sweep.title


def test_defaults():
    config = settings_of().config
    found = (
        config.model.name,
        config.method["_target_"].rsplit(".", 1)[-1],
        config.method["alpha"],
        config.method["granularity"],
        config.scope,
        config.seed,
    )
    assert found == ("smollm2_135m", "Dass", 0.5, "input", "mlp", 0)
    assert (config.pattern["n"], config.pattern["m"], config.calibration.name, config.eval.name) == (
        2,
        4,
        "c4_mini",
        "mini",
    )
    assert (config.calibration.num_samples, config.calibration.seq_len) == (16, 512)
    assert (config.eval.perplexity.context, config.eval.perplexity.max_windows, config.eval.zeroshot.limit) == (
        512,
        16,
        20,
    )


def test_the_paper_protocol_sets_calibration_and_evaluation_together():
    config = settings_of("protocol=paper").config
    assert (
        config.calibration.name,
        config.calibration.num_samples,
        config.calibration.seq_len,
        config.calibration.sampling,
    ) == ("c4", 128, 2048, "document")
    assert (config.eval.name, config.eval.perplexity.context, config.eval.perplexity.max_windows) == (
        "paper",
        2048,
        None,
    )
    assert (config.eval.zeroshot.limit, len(config.eval.zeroshot.tasks)) == (None, 5)


def dead_keys(node: Any, kind: Any, where: str) -> list[str]:
    """Keys of ``node`` that no field takes: of its target's dataclass, of the schema, or of neither."""
    if not isinstance(node, dict):
        return []
    if "_target_" in node:
        kind = locate(where, node["_target_"])
    if not dataclasses.is_dataclass(kind):
        return [f"{where}: no dataclass takes its keys"] if kind is not dict else []
    hints, found = get_type_hints(kind), []
    for key, value in node.items():
        if key in ("_target_", "defaults"):
            continue
        if key not in {field.name for field in dataclasses.fields(kind)}:
            found.append(f"{where}.{key}")
            continue
        candidates = [part for part in get_args(hints[key]) or (hints[key],) if dataclasses.is_dataclass(part)]
        found += dead_keys(value, candidates[0] if candidates else dict, f"{where}.{key}")
    return found


@pytest.mark.parametrize("path", FILES, ids=choice_of)
def test_no_dead_key(path):
    node, group = yaml.safe_load(path.read_text()), path.parent.name
    if (
        group == "protocol"
    ):  # a package of its own at the root: its name goes into the record, the rest chooses other groups
        assert set(node) == {"defaults", "protocol"}
        sweeps = "".join(path.read_text() for path in (CONF.parent / "sweeps").glob("*.yaml"))
        assert {key for key in node["protocol"] if f"${{protocol.{key}}}" not in sweeps} == {"name"}
        return
    hints = get_type_hints(RunConfig)
    assert group in hints
    assert dead_keys(node, hints[group], group) == []


def test_the_search_for_dead_keys_finds_one():
    assert dead_keys({"name": "x", "pth": "y"}, ModelConfig, "model") == ["model.pth"]
    nested = {"name": "x", "text": {"_target_": "dass_exp.data.tokens.OfflineText", "asset": "c4", "prt": "odd"}}
    assert dead_keys(nested, get_type_hints(RunConfig)["calibration"], "calibration") == ["calibration.text.prt"]


def test_config_yaml_holds_defaults_and_plumbing_only():
    assert set(yaml.safe_load((CONF / "config.yaml").read_text())) == {"defaults", "hydra"}


@pytest.mark.parametrize("path", [path for path in FILES if "name" in yaml.safe_load(path.read_text())], ids=choice_of)
def test_a_file_is_named_as_it_names_itself(path):
    assert yaml.safe_load(path.read_text())["name"] == path.stem


def test_every_model_has_a_name_and_a_path():
    found = [path for path in FILES if path.parent.name == "model"]
    assert found
    assert all(set(yaml.safe_load(path.read_text())) >= {"name", "path"} for path in found)


def test_no_two_files_differ_in_one_word():
    words = {
        path: re.findall(r"\w+", yaml.safe_dump(yaml.safe_load(path.read_text())))
        for path in FILES
        if path.parent.name != "model"
    }
    pairs = [
        (choice_of(one), choice_of(other))
        for (one, left), (other, right) in itertools.combinations(words.items(), 2)
        if len(left) == len(right) and sum(map(str.__ne__, left, right)) < 2
    ]
    assert pairs == []


@pytest.mark.parametrize("path", FILES, ids=choice_of)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= (
        16 if path.parent.name == "protocol" else 12
    )  # a protocol holds the axes of the sweeps


NM = "pattern=nm"
TASKS = "eval.zeroshot.tasks"
BAD = [
    (["method.alpha=-1"], ["method.alpha=-1:", "at least 0"]),
    (["method.alpha=nan"], ["method.alpha=nan:", "a number of at least 0"]),
    (["method.alpha=inf"], ["method.alpha=inf:", "a number of at least 0"]),
    (["method.alpha=abc"], ["method.alpha='abc':", "a number of at least 0"]),
    (["method.alpha=true"], ["method.alpha=True:", "a number of at least 0"]),
    (["method.alpha=null"], ["method.alpha=None:", "a number of at least 0"]),
    (["method.granularity=row"], ["method.granularity='row':", "input, output"]),
    (["method=sparsegpt", "method.blocksize=0"], ["method.blocksize=0:", "at least 1"]),
    (["method=sparsegpt", "method.damping=-0.1"], ["method.damping=-0.1:", "at least 0"]),
    ([NM, "pattern.n=5", "pattern.m=4"], ["pattern.n=5", "pattern.m=4", "n may be at most m"]),
    ([NM, "pattern.n=0", "pattern.m=4"], ["pattern.n=0:", "at least 1"]),
    ([NM, "pattern.n=1.5", "pattern.m=4"], ["pattern.n=1.5:", "whole number"]),
    ([NM, "pattern.n=1", "pattern.m=0"], ["pattern.m=0:", "at least 1"]),
    ([NM, "pattern.m=4"], ["pattern.n has no value"]),
    ([NM, "pattern.n=4"], ["pattern.m has no value"]),
    (["pattern=unstructured", "pattern.sparsity=1"], ["pattern.sparsity=1:", "[0, 1)"]),
    (["pattern=unstructured", "pattern.sparsity=-0.1"], ["pattern.sparsity=-0.1:", "[0, 1)"]),
    (["pattern=unstructured", "pattern.sparsity=nan"], ["pattern.sparsity=nan:", "[0, 1)"]),
    (["pattern=unstructured", "pattern.sparsity=half"], ["pattern.sparsity='half':", "[0, 1)"]),
    (["calibration.num_samples=0"], ["calibration.num_samples=0:", "at least 1"]),
    (["calibration.seq_len=1"], ["calibration.seq_len=1:", "at least 2"]),
    (["calibration.batch_size=0"], ["calibration.batch_size=0:", "at least 1"]),
    (["calibration.sampling=foo"], ["calibration.sampling='foo':", "joined, document"]),
    (["calibration.text.asset=foo"], ["text.asset='foo':", "c4, wikipedia"]),
    (["eval.perplexity.text.part=third"], ["text.part='third':", "all, even, odd"]),
    (["scope=foo"], ["scope='foo':", "mlp, attention, all"]),
    (["seed=-1"], ["seed=-1:", "at least 0"]),
    (["threads=0"], ["threads=0:", "at least 1"]),
    (["eval.batch_size=0"], ["eval.batch_size=0:", "at least 1"]),
    ([f"{TASKS}=[foo]"], [TASKS, "unknown task 'foo'", "hellaswag", "boolq"]),
    ([f"{TASKS}=[]"], [f"{TASKS}=[]:", "at least one"]),
    ([f"{TASKS}=[piqa,piqa]"], [f"{TASKS}=['piqa', 'piqa']:", "none twice"]),
    (["eval=paper", f"{TASKS}=[no_such_task]"], [TASKS, "unknown task 'no_such_task'", "lm-eval"]),
    (["eval.zeroshot.limit=0"], ["eval.zeroshot.limit=0:", "at least 1"]),
    (["eval.zeroshot.data=foo"], ["eval.zeroshot.data='foo':", "offline, hub"]),
    (["eval.perplexity.context=1"], ["eval.perplexity.context=1:", "at least 2"]),
    (["eval.perplexity.max_windows=0"], ["eval.perplexity.max_windows=0:", "at least 1"]),
    (["tracker.project=''"], ["tracker.project='':", "a name"]),
    (["+method.beta=1"], ["method:", "beta"]),
    (["~method"], ["method has no value"]),
    (["seed=${nothing}"], ["seed", "nothing"]),
    (["method.alpha=${nothing}"], ["method.alpha", "nothing"]),
]


@pytest.mark.parametrize(("overrides", "words"), BAD, ids=[" ".join(overrides) for overrides, _ in BAD])
def test_a_bad_value_is_named_with_what_is_allowed(overrides, words):
    with pytest.raises(UserError) as caught:
        settings_of(*overrides)
    assert contains(str(caught.value), words), str(caught.value)


def test_a_value_at_the_edge_of_what_is_allowed_passes():
    assert settings_of("method.alpha=0").method.alpha == 0
    assert settings_of("pattern=unstructured", "pattern.sparsity=0").pattern.sparsity == 0
    assert settings_of("pattern=nm", "pattern.n=4", "pattern.m=4").pattern.name == "4:4"
    assert settings_of("eval.perplexity.context=2", "calibration.seq_len=2", "seed=0").cut.seq_len == 2


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
    assert settings_of(*overrides).config.model.name == name


def test_validation_loads_no_model_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings_of("model.path=nobody/has-this-model", f"results_dir={tmp_path}/results")
    assert list(tmp_path.iterdir()) == []
