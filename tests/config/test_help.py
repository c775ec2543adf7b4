"""The help names everything that there is, fits the terminal, and needs no torch."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from support import CONF, ROOT, environment

from dass_exp.config import help as help_module
from dass_exp.config.choices import CHOICES, SWITCHES, complete
from dass_exp.config.help import GROUPS, SETTINGS, help_text, settings_of_schema


def test_every_setting_has_its_line():
    assert settings_of_schema() == set(SETTINGS)


def test_every_group_choice_and_sweep_is_named():
    text = " ".join(help_text(100).split())
    groups = {path.name for path in CONF.iterdir() if path.is_dir()} - {"hydra"}
    assert groups == set(GROUPS)
    for group in groups:
        choices = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        assert f"{group}= {GROUPS[group]}: {choices}" in text
    assert all(f" {path.stem} " in text for path in (ROOT / "sweeps").glob("*.yaml"))
    assert "hydra/launcher= basic, joblib" in text and "seed=0 of the calibration sample" in text


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_no_line_is_wider_than_the_terminal(columns):
    usage = help_module._USAGE.splitlines()
    lines = [line for line in help_text(columns).splitlines() if line.strip() not in {each.strip() for each in usage}]
    assert max(map(len, lines)) <= max(columns, 34)


def test_every_word_of_a_choice_is_in_the_help():
    text = " ".join(help_text(200).split())
    for setting, words in CHOICES.items():
        about = help_module.SETTINGS[setting]
        assert about in text
        assert [word for word in words if word not in about] == [], setting


def test_what_is_completed_are_settings():
    assert {*CHOICES, *SWITCHES} <= settings_of_schema()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("dass-exp scope=", ["scope=mlp", "scope=attention", "scope=all"]),
        ("dass-exp method=dass model.placement=s", ["model.placement=stream"]),
        ("dass-exp -m scope=mlp,a", ["scope=mlp,attention", "scope=mlp,all"]),
        ("dass-exp plan=", ["plan=true", "plan=false"]),
        ("dass-exp scope=mlp ", []),
        ("dass-exp scope", []),
        ("dass-exp method=d", []),  # by Hydra, from the files of the group
    ],
)
def test_words_of_a_choice_are_completed(line, found):
    assert complete(line) == found


@pytest.mark.parametrize("arguments", [["--help"], ["method=wanda", "-h"], ["--version"], ["-sc", "query=bash"]])
def test_help_version_and_completion_import_no_torch(arguments):
    code = "import sys, dass_exp.__main__ as command; command.main(); sys.exit('torch' in sys.modules)"
    env = environment() | {"COMP_LINE": "dass-exp method=w", "COMP_POINT": "17", "COMP_WORDBREAKS": " \t\n=:"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 20  # a busy machine; idle it takes less than one second
    if arguments[0] == "-sc":
        assert done.stdout.split() == ["method=wanda"]
    elif "--version" in arguments:
        assert done.stdout.startswith("dass_exp 0.") and "torch 2." in done.stdout
    else:
        assert done.stdout.startswith("dass-exp prunes a language model in one shot")
