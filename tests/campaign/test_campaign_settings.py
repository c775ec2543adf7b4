"""Every setting of the schema and of the composed configuration with odd values: one line that names it, or a run."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_type_hints

import pytest
from harness import Case
from omegaconf import DictConfig, OmegaConf
from support import composed_with_hydra

from dass_exp.config.settings import RunConfig

VALUES = {
    "null": "null",
    "list": "[1,2]",
    "mapping": "{a: 1}",
    "empty": "''",
    "long": "x" * 5000,
    "nan": "nan",
    "inf": "inf",
    "minus-one": "-1",
    "zero": "0",
    "fraction": "1.5",
    "huge": "1" + "0" * 30,
    "2-to-64": str(2**64),
    "yes": "true",
    "markup": "'[/x]'",
    "markup-link": "'[link=x]a[bold'",
    "missing": "'???'",
    "surrogate": "a\udcffb",
    "emoji": "\U0001f600",
    "unknown-key": "${no.such.key}",
    "unknown-resolver": "${nosuch:1}",
    "quote": '"',
    "dots": "../../x",
    "tag": "'!!python/object/apply:os.system [true]'",
    "newline": "'a\nb'",
}
FREE = ("save", "results_dir")  # settings that name where files are written


def schema_settings(schema: type = RunConfig, path: str = "") -> list[str]:
    """The dotted names of all typed settings."""
    found = []
    for field in dataclasses.fields(schema):
        kinds = (get_type_hints(schema)[field.name], *get_args(get_type_hints(schema)[field.name]))
        nested = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        found += schema_settings(nested, f"{path}{field.name}.") if nested else [path + field.name]
    return found


def composed_settings(node: DictConfig, path: str = "") -> list[str]:
    """The dotted names of all leaves of a composed configuration."""
    found = []
    for key, value in OmegaConf.to_container(node, resolve=False).items():
        child = node._get_node(key)
        nested = isinstance(child, DictConfig) and isinstance(value, dict)
        found += composed_settings(child, f"{path}{key}.") if nested else [f"{path}{key}"]
    return found


def settings() -> list[str]:
    """All settings of a run, Hydra's left out."""
    composed = composed_with_hydra()
    del_hydra = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
    return list(dict.fromkeys([*schema_settings(), *composed_settings(del_hydra)]))


ALL = settings()
GROUPS = sorted({name.partition(".")[0] for name in ALL})


@pytest.mark.parametrize("group", GROUPS)
def test_a_setting_with_a_value_that_nobody_expects(campaign, hold, group):
    cases = []
    for setting in ALL:
        if setting.partition(".")[0] == group:
            for name, value in list(VALUES.items())[ALL.index(setting) % 3 :: 3]:  # a third of them, in turns
                argv = [*campaign.base(f"{setting}={value}")]
                last = setting.rpartition(".")[2]
                cases.append(Case(f"{setting}-{name}", argv, codes=[0, 1, 2], words=[last], changes=setting in FREE))
    hold("settings", cases)


LOOPS = {
    "itself": ["model.name=${model.name}"],
    "two": ["seed=${repeat}", "repeat=${seed}"],
    "three": ["model.name=${calibration.name}", "calibration.name=${eval.name}", "eval.name=${model.name}"],
    "in a pattern": ["pattern.n=${pattern.m}", "pattern.m=${pattern.n}"],
    "in a folder": ["results_dir=${save}", "save=${results_dir}"],
    "hydra": ["hydra.run.dir=${hydra.run.dir}"],
    "runtime": ["model.name=${hydra:runtime.nosuch}"],
}
GRAMMAR = [
    "=",
    "==",
    "a",
    "a=",
    "=a",
    "~model",
    "~nosuch",
    "+",
    "++",
    "+model=x",
    "model@x=y",
    "model=",
    "method=[",
    "method={",
]
GRAMMAR += [
    "seed=1,2",
    "seed=range(0,3,0)",
    "seed=choice()",
    "seed=int(x)",
    "'seed=1",
    "seed='1",
    "seed=${",
    "seed=${}",
    "seed=\\",
]
GRAMMAR += [
    "sweeps=[demo,alpha]",
    "sweeps=nosuch",
    "hydra/launcher=nosuch",
    "hydra.launcher.n_jobs=0",
    "hydra=x",
    "hydra.mode=x",
]
GRAMMAR += [
    "--nosuch",
    "--config-name=nosuch",
    "--config-dir=/no/such",
    "--config-path=/no/such",
    "--package=x",
    "--cfg=x",
    "--resolve",
]
GRAMMAR += [
    "-m",
    "--multirun=x",
    "hydra.sweeper.max_batch_size=x",
    "hydra.sweep.dir=",
    "hydra.run.dir=",
    "hydra.job.name=[/x]",
    "\x00",
    "\n",
]
GRIDS = {
    "step of zero": ["seed=range(0,3,0)"],
    "no jobs": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=0", "seed=0,1"],
    "two sweeps": ["sweeps=alpha", "sweeps=demo"],
    "a list of sweeps": ["sweeps=[alpha,demo]"],
    "a loop": ["seed=${repeat},1", "repeat=${seed}"],
    "an unknown method": ["method=nosuch,dass"],
    "an unknown key": ["method.nosuch=1,2"],
    "a bad cell": ["seed=-1,-2"],
    "an empty choice": ["seed=choice()"],
}


def test_interpolations_that_end_nowhere(campaign, hold):
    hold("grammar", [Case(name, campaign.base(*loop), codes=[2], changes=True) for name, loop in LOOPS.items()])


def test_overrides_that_are_no_overrides(campaign, hold):
    hold("grammar", [Case(repr(text), [*campaign.base(), text], codes=[0, 1, 2], lines=40) for text in GRAMMAR])


def test_grids_that_cannot_be(campaign, hold):
    cases = [Case(name, ["-m", *campaign.base(), *more], codes=[1, 2], lines=8) for name, more in GRIDS.items()]
    hold("grammar", cases)


REMOVED = [setting for setting in ALL if setting not in ("sweep", "plan", "rerun", "checkpoint")]


def test_a_setting_that_is_removed(campaign, hold):
    cases = []
    for setting in REMOVED:
        argv = [text for text in campaign.base() if text.partition("=")[0] != setting]
        cases.append(Case(setting, [*argv, f"~{setting}"], codes=[0, 1, 2]))
    hold("settings", cases)


@pytest.mark.parametrize("setting", FREE)
def test_folders_to_write_to(campaign, hold, setting):
    targets = [
        "/",
        "",
        ".",
        "..",
        "work",
        "@/model",
        "@/cache",
        "/dev/null",
        "/proc/x",
        "/dev/full/x",
        "@/loop",
        "@/dangling",
    ]
    targets += [
        "@/file",
        "@/file/x",
        "x" * 300,
        "'a\nb'",
        "~nosuch/x",
        "~/x",
        "'[/x]'",
        "'a:b'",
        "'${x'",
        "a\udcff",
        "@/elsewhere",
    ]

    def prepare(box):
        (box.folder / "loop").symlink_to(box.folder / "loop")
        (box.folder / "dangling").symlink_to("/no/such/folder")
        (box.folder / "file").write_text("a file")

    cases = []
    for target in targets:
        kept = lambda box, result: [] if (box.elsewhere / "thesis.partial").is_file() else ["files are gone"]  # noqa: E731
        argv = campaign.base(f"{setting}={target}")
        cases.append(Case(f"{setting}-{target[:20]!r}", argv, prepare, codes=[0, 1, 2], changes=True, after=kept))
    hold("folders", cases)
