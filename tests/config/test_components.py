"""Which code a config may name: classes of this package and of packages that the user has named, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from support import CONF, components_of, compose, contains, settings_of

from dass_exp.config.components import admitted_packages, build, check_targets, choice, target_class
from dass_exp.config.settings import validate
from dass_exp.data.texts import HubText, OfflineText
from dass_exp.errors import UserError
from dass_exp.masks import NM, Pattern
from dass_exp.methods.base import Pruner
from dass_exp.trackers.none import NullTracker
from dass_exp.trackers.wandb import WandbTracker

OURS = frozenset({"dass_exp"})
PLUGIN = """
from dataclasses import dataclass
from pathlib import Path
from dass_exp.methods.magnitude import Magnitude

Path(__file__).with_name("imported").touch()

@dataclass
class Largest(Magnitude):
    factor: float = 1.0
"""
LARGEST = ["method=magnitude", "method._target_=someones_plugin.Largest"]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package ``someones_plugin``; the returned file exists once it was imported."""
    folder = tmp_path / "packages" / "someones_plugin"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delenv("DASS_EXP_PLUGINS", raising=False)
    yield folder / "imported"
    sys.modules.pop("someones_plugin", None)


METHOD = "method._target_"
REFUSED = [
    (f"{METHOD}=os.system", ["os.system", "not admitted", "DASS_EXP_PLUGINS"]),
    (f"{METHOD}=subprocess.Popen", ["subprocess.Popen", "not admitted"]),
    (f"{METHOD}=builtins.eval", ["builtins.eval", "not admitted"]),
    (f"{METHOD}=dass_experiments.Method", ["dass_experiments.Method", "not admitted"]),
    (f"{METHOD}=5", ["5", "not admitted"]),
    (f"{METHOD}=null", ["None"]),
    (f"{METHOD}=''", [METHOD]),
    (f"{METHOD}=dass_exp.data.assets.subprocess.run", ["dass_exp.data.assets.subprocess.run"]),
    (f"{METHOD}=dass_exp.data.assets.subprocess.Popen", ["dass_exp.data.assets.subprocess.Popen"]),
    (f"{METHOD}=dass_exp.data.assets.FileLock", ["dass_exp.data.assets.FileLock", "another package"]),
    (f"{METHOD}=dass_exp.storage.records.Path", ["dass_exp.storage.records.Path", "another package"]),
    (f"{METHOD}=dass_exp.data.assets.fetch", ["dass_exp.data.assets.fetch", "expected a class"]),
    (f"{METHOD}=dass_exp.data.assets.subprocess", ["dass_exp.data.assets.subprocess", "expected a class"]),
    (f"{METHOD}=dass_exp.methods.wanda", [f"{METHOD}=dass_exp.methods.wanda: "]),
    (f"{METHOD}=dass_exp.methods.wanda.Wonder", ["dass_exp.methods.wanda.Wonder", "no such class"]),
    (f"{METHOD}=dass_exp.nothing.Wanda", ["dass_exp.nothing.Wanda", "no such class"]),
    (f"{METHOD}=dass_exp", ["no such class"]),
    (f"{METHOD}=dass_exp..x", ["no such class"]),
    ("calibration.text._target_=subprocess.Popen", ["calibration.text._target_=subprocess.Popen", "not admitted"]),
    ("eval.perplexity.text._target_=os.system", ["eval.perplexity.text._target_=os.system", "not admitted"]),
    ("tracker._target_=os.system", ["tracker._target_=os.system", "not admitted"]),
    ("protocol._target_=os.system", ["protocol._target_=os.system", "not admitted"]),
    ("sweep={_target_: os.system}", ["sweep._target_=os.system", "not admitted"]),
    ("method.inner={_target_: os.system, command: ls}", ["method.inner._target_=os.system", "not admitted"]),
    ("method.steps=[1, {deep: [{_target_: os.system}]}]", ["method.steps.1.deep.0._target_=os.system"]),
    ("calibration.text.more={a: {b: {_target_: os.system}}}", ["calibration.text.more.a.b._target_=os.system"]),
    (f"{METHOD}=${{oc.env:SOMETHING}}", ["method._target_=os.system", "not admitted"]),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("override", "words"), REFUSED, ids=[override for override, _ in REFUSED])
def test_a_foreign_target_is_refused_and_never_called(override, words, monkeypatch):
    def called(*args, **kwargs):
        pytest.fail(f"a refused target was called with {args} {kwargs}")

    monkeypatch.setenv("SOMETHING", "os.system")
    monkeypatch.setattr(os, "system", called)
    monkeypatch.setattr(subprocess, "Popen", called)
    with pytest.raises(UserError) as caught:
        settings_of(f"++{override}")
    assert contains(str(caught.value), words), str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method._target_=dass_exp.masks.NM", ["method", "expected a Pruner"]),
        ("pattern._target_=dass_exp.methods.wanda.Wanda", ["pattern", "expected a Pattern"]),
        ("tracker._target_=dass_exp.data.texts.OfflineText", ["tracker", "expected a Tracker"]),
        ("calibration.text._target_=dass_exp.trackers.none.NullTracker", ["calibration.text", "expected a Text"]),
        ("eval.perplexity.text._target_=dass_exp.masks.NM", ["eval.perplexity.text", "expected a Text"]),
        ("+method._partial_=true", ["method"]),
        ("+pattern._partial_=true", ["pattern"]),
        ("+calibration.text._partial_=true", ["calibration.text"]),
        ("method._target_=dass_exp.methods.base.ScorePruner", ["method: "]),  # an abstract class
        ("+calibration.text.colour=red", ["calibration.text", "colour"]),
        ("method.alpha=-2", ["method.alpha=-2: "]),
    ],
)
def test_a_target_that_does_not_fit_its_setting_is_refused(override, words):
    with pytest.raises(UserError) as caught:
        components_of(override)
    assert contains(str(caught.value), words)


@pytest.mark.parametrize(
    ("environment", "typed", "named"),
    [
        (None, ["plugins=[one]"], {"one"}),
        (None, ["plugins=[one,two]"], {"one", "two"}),
        (None, ["plugins=['one', \"two\"]"], {"one", "two"}),
        (None, ["+plugins=[one]"], {"one"}),
        (None, ["++plugins=[one]"], {"one"}),
        (None, ["plugins=[]"], set()),
        (None, ["method=wanda", "sweeps=plugins"], set()),
        (None, ["model.plugins=[one]"], set()),
        ("one", [], {"one"}),
        ("one,two", [], {"one", "two"}),
        (" one  two ", [], {"one", "two"}),
        ("", ["plugins=[one]"], {"one"}),
    ],
)
def test_packages_are_named_in_the_environment_and_on_the_command_line(environment, typed, named, monkeypatch):
    monkeypatch.delenv("DASS_EXP_PLUGINS", raising=False)
    if environment is not None:
        monkeypatch.setenv("DASS_EXP_PLUGINS", environment)
    assert admitted_packages(typed) == OURS | named


def test_a_plugin_is_refused_without_being_imported(plugin):
    with pytest.raises(UserError, match="not admitted"):
        settings_of(*LARGEST)
    assert not plugin.exists()
    assert "someones_plugin" not in sys.modules


def test_a_plugin_is_admitted_by_the_environment(plugin, monkeypatch):
    monkeypatch.setenv("DASS_EXP_PLUGINS", "someones_plugin")
    assert components_of(*LARGEST, "+method.factor=2.0").method.factor == 2
    assert plugin.exists()


def test_a_plugin_is_admitted_by_the_command_line(plugin):
    assert components_of("plugins=[someones_plugin]", *LARGEST).method.name == "largest"
    assert plugin.exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("    def group(self, role, pattern): ...", ["Largest.group is now called comparison_dim"]),
        ("from dass_exp.stats import InputNorm", ["dass_exp.stats is now called dass_exp.statistics"]),
        ("from dass_exp.methods.base import Cut", ["Cut is now called MaskResult"]),
        ("import nothing_of_the_sort", ["No module named 'nothing_of_the_sort'"]),
    ],
)
def test_a_plugin_that_does_not_fit_this_version_is_refused_with_the_reason(plugin, line, words):
    path = plugin.with_name("__init__.py")
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(UserError) as caught:
        settings_of("plugins=[someones_plugin]", *LARGEST)
    assert contains(str(caught.value), [f"{METHOD}=", "someones_plugin cannot be imported", *words])


def test_a_config_file_cannot_admit_a_plugin(plugin):
    composed = compose("plugins=[someones_plugin]", *LARGEST)
    with pytest.raises(UserError, match="not admitted"):
        validate(composed, admitted_packages(["sweeps=theirs"]))  # the config holds the list, but nobody typed it
    assert not plugin.exists()


def test_a_refusal_says_what_is_admitted_and_our_own_targets_pass():
    targets = {"a": [{"_target_": "dass_exp.masks.NM"}], "b": {"_target_": "dass_exp.methods.dass.Dass"}}
    check_targets(OmegaConf.create(targets), OURS)
    with pytest.raises(UserError, match="admitted: another, dass_exp"):
        check_targets(OmegaConf.create({"method": {"_target_": "os.system"}}), OURS | {"another"})


def test_a_component_is_built_with_its_settings():
    assert build({"_target_": "dass_exp.masks.NM", "n": 1, "m": 8}, Pattern, "pattern") == NM(1, 8)
    assert target_class("pattern._target_", "dass_exp.masks.NM") is NM


@pytest.mark.parametrize("node", [None, "wanda", 5, {}, {"alpha": 1}, []])
def test_a_node_that_names_no_class_is_refused(node):
    with pytest.raises(UserError, match="method="):
        build(node, Pruner, "method")


@pytest.mark.parametrize(
    ("module", "kind"),
    [("data", OfflineText), ("data", HubText)]
    + [(module, kind) for module in ("track", "runs.track") for kind in (NullTracker, WandbTracker)],
)
def test_a_target_under_its_former_name_is_accepted(module, kind):
    former = f"dass_exp.{module}.{kind.__name__}"
    assert target_class("x._target_", former) is kind
    if kind in (OfflineText, WandbTracker):
        components = components_of(f"{'calibration.text' if kind is OfflineText else 'tracker'}._target_={former}")
        assert kind in {type(components.calibration_text), type(components.tracker)}


def test_a_choice_is_the_content_of_its_file():
    assert choice("pattern", "4of8") == {"_target_": "dass_exp.masks.NM", "n": 4, "m": 8}


def test_an_unknown_choice_lists_the_known_ones():
    with pytest.raises(UserError) as caught:
        choice("method", "wandaa")
    known = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
    assert contains(str(caught.value), ["method='wandaa'", ", ".join(known)])


@pytest.mark.parametrize("name", ["../config", "../../dass_exp/x", ""])
def test_a_choice_stays_in_its_group(name):
    with pytest.raises(UserError):
        choice("method", name)
