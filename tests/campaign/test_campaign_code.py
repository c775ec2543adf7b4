"""Somebody else's code, and plugins: code that nobody admitted does not run, and code that was admitted may fail."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml
from harness import Case

RAN = "ran"  # a file that foreign code writes, in the box
EVIL = """
import logging, pathlib
pathlib.Path({ran!r}).write_text("foreign code ran")
class Any(logging.Handler):
    uses = frozenset()
    def __init__(self, *arguments, **settings):
        super().__init__()
def anything(*arguments, **settings):
    return Any()
"""
NODES = {  # where Hydra or logging would build something, by dotted name, and what is given there
    "method": {"_target_": "TARGET"},
    "pattern": {"_target_": "TARGET"},
    "tracker": {"_target_": "TARGET"},
    "calibration.text": {"_target_": "TARGET"},
    "eval.perplexity.text": {"_target_": "TARGET"},
    "hydra.callbacks.more": {"_target_": "TARGET"},
    "hydra.launcher": {"_target_": "TARGET"},
    "hydra.sweeper": {"_target_": "TARGET"},
    "hydra.job_logging.handlers.more": {"class": "TARGET"},
    "hydra.job_logging.handlers.factory": {"()": "TARGET"},
    "hydra.job_logging.formatters.simple": {"()": "TARGET"},
    "hydra.job_logging.formatters.more": {"class": "TARGET"},
    "hydra.job_logging.filters.more": {"()": "TARGET"},
    "hydra.hydra_logging.handlers.more": {"class": "TARGET"},
    "hydra.hydra_logging.formatters.more": {"()": "TARGET"},
    "hydra.hydra_logging.filters.more": {"()": "TARGET"},
    "hydra.job_logging.handlers.console": {"stream": "ext://TARGET"},
}
TARGETS = ["evil.Any", "evil.anything", "os.system", "subprocess.Popen", "pathlib.Path.unlink"]
JOB = {"path": ["@/modules"]}
SWEEPS = {"path": ["@/modules"], "env": {"DASS_EXP_ROOT": "@/root"}}


def evil(box):
    """An importable module whose import leaves a trace, on the path and in the working directory."""
    for folder in (box.folder / "modules", box.work):
        folder.mkdir(exist_ok=True)
        (folder / "evil.py").write_text(EVIL.format(ran=str(box.folder / RAN)))


def did_not_run(box, result):
    """No trace of foreign code."""
    return ["foreign code ran"] if (box.folder / RAN).exists() else []


def nested(name, content):
    """A configuration that holds this content under a dotted name."""
    for part in reversed(name.split(".")):
        content = {part: content}
    return content


def written(content, place):
    """A preparation that writes a configuration file of the user."""

    def prepare(box):
        evil(box)
        path = box.folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        path.write_text(f"# @package _global_\n{text}")

    return prepare


@pytest.mark.parametrize("way", ["command line", "sweep", "config folder", "config path"])
def test_code_of_nobody_in_any_node(campaign, hold, way):
    cases = []
    for name, content in NODES.items():
        for target in TARGETS if way == "command line" else TARGETS[:2]:
            filled = {key: value.replace("TARGET", target) for key, value in content.items()}
            argv, prepare, job = campaign.base(), evil, JOB
            if way == "command line":
                argv = [*argv, *(f"++{name}.{key}={value}" for key, value in filled.items())]
            elif way == "sweep":
                prepare, job = written(nested(name, filled), "root/sweeps/theirs.yaml"), SWEEPS
                argv = [*argv, "sweeps=theirs"]
            elif way == "config folder":
                prepare = written(nested(name, filled), "theirs/variant/theirs.yaml")
                argv = ["--config-dir", "@/theirs", *argv, "variant=theirs"]
            else:
                prepare = written(nested(name, filled), "theirs/config.yaml")
                argv = ["--config-path", "@/theirs", *argv]
            promise = {"codes": [1, 2], "after": did_not_run, "lines": 2}
            cases.append(Case(f"{name}-{target}-{next(iter(content))}", argv, prepare, job, **promise))
    hold("foreign code", cases)


SEARCH = {"pkg": "pkg://evil", "pkg of a folder": "pkg://evil.conf", "an unknown scheme": "http://evil"}


def test_packages_in_the_search_path(campaign, hold):
    cases, promise = [], {"codes": [0, 1, 2], "after": did_not_run, "lines": 3}
    for name, place in SEARCH.items():
        argv = [*campaign.base(), f"hydra.searchpath=[{place}]"]
        cases.append(Case(f"override-{name}", argv, evil, JOB, **promise))
        prepare = written({"hydra": {"searchpath": [place]}}, "root/sweeps/theirs.yaml")
        cases.append(Case(f"sweep-{name}", [*campaign.base(), "sweeps=theirs"], prepare, SWEEPS, **promise))
    hold("foreign code", cases)


class Touch:
    """Leaves a trace when it is loaded from a pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


PICKLES = {
    "to run again": (["--experimental-rerun", "@/theirs.pickle"], "theirs.pickle"),
    "to run again, joined": (["--experimental-rerun=@/theirs.pickle"], "theirs.pickle"),
    "to run again, shortened": (["--experimental-r=@/theirs.pickle"], "theirs.pickle"),
    "a checkpoint": (["model.path=@/pickled"], "pickled/pytorch_model.bin"),
    "beside a model": ([], "model/optimizer.pt"),
    "as a text": (["calibration.text.asset=@/theirs.pickle"], "theirs.pickle"),
}


def test_pickles(campaign, hold):
    cases = []
    for name, (more, file) in PICKLES.items():

        def prepare(box, file=file):
            path = box.folder / file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(pickle.dumps(Touch(box.folder / RAN)))
            for other in ("config.json", "tokenizer.json", "tokenizer_config.json"):
                if path.parent.name == "pickled":
                    (path.parent / other).write_bytes((box.model / other).read_bytes())

        codes = [0] if name == "beside a model" else [2]
        cases.append(Case(name, campaign.base(*more), prepare, codes=codes, after=did_not_run))
    hold("foreign code", cases)


TAGS = ["!!python/object/apply:os.system ['touch RAN']", "!!python/name:os.system", "!!python/module:os"]
TAGS += ["!!python/object/new:os.system [x]", "!!binary x", "!nosuch x", "&a [*a]", "'${oc.decode:x}'", "'${eval:1}'"]


def test_tags_of_yaml_files(campaign, hold):
    cases = []
    for tag in TAGS:
        for file, argv in (
            ("root/sweeps/theirs.yaml", ["sweeps=theirs"]),
            ("root/sweeps/theirs.yaml", ["-m", "sweeps=theirs"]),
        ):
            prepare = written(f"seed: {tag}", file)
            promise = {"codes": [1, 2], "after": did_not_run, "lines": 4}
            cases.append(Case(f"{tag}-{len(argv)}", [*campaign.base(), *argv], prepare, SWEEPS, **promise))
    hold("foreign code", cases)


BAD_PLUGINS = {
    "raises": "raise RuntimeError('no')",
    "syntax": "def (",
    "exits": "import sys; sys.exit(0)",
    "exits with words": "import sys; sys.exit('bye')",
    "base exception": "raise BaseException('x')",
    "imports nothing": "import nosuchmodule",
    "no class": "Method = 3",
    "a function": "def Method(): pass",
    "another kind": "class Method: pass",
    "an exception class": "class Method(Exception): pass",
    "recursion": "def f(): f()\nf()",
    "many lines": "raise RuntimeError('a\\nb\\nc')",
    "markup": "raise RuntimeError('[/x]')",
}
METHOD = """
from dataclasses import dataclass
from dass_exp.methods.magnitude import Magnitude
@dataclass
class Method(Magnitude):
    def score(self, linear, block):
        {}
"""
BODIES = {
    "score raises": "raise RuntimeError('[/x]')",
    "score exits": "import sys; sys.exit(0)",
    "score raises nothing known": "raise BaseException('x')",
    "score of NaN": "return linear.weight * float('nan')",
    "score of none": "return None",
    "score of another shape": "return linear.weight[:1]",
    "score of words": "return 'x'",
    "score with many lines": "raise ValueError('a\\nb\\nc')",
    "score without words": "raise ValueError",
    "score of a million letters": "raise ValueError('x' * 1000000)",
    "score that recurses": "return self.score(linear, block)",
}


@pytest.mark.parametrize("grid", [False, True])
def test_plugins_that_do_not_work(campaign, hold, grid):
    sources = BAD_PLUGINS | {name: METHOD.format(body) for name, body in BODIES.items()}
    argv = [*campaign.base("method=magnitude"), "plugins=[plugged]", "method._target_=plugged.Method"]
    cases = []
    for name, source in sources.items():
        prepare = lambda box, source=source: (box.work / "plugged.py").write_text(source)  # noqa: E731
        more, lines = (["-m", "repeat=0,1"], 8) if grid else ([], 1)
        words = ["plugged"] if name in BAD_PLUGINS else []
        promise = {"codes": [1] if grid else [1, 2], "lines": lines, "words": words, "changes": True}
        cases.append(Case(name, [*more, *argv], prepare, {"path": ["@/work"]}, **promise))
    hold("plugins", cases)
