"""The README's Python example runs as printed, and its demo table is the committed one."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import settings_of

from dass_exp.models.families import table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    dense, pruned, rest = done.stdout.splitlines()
    assert 1 < float(dense.split()[1]) < float(pruned.split()[1])
    assert rest == "0.5 torch.Size([1536, 576])"


def test_the_demo_table_is_the_committed_one() -> None:
    (shown,) = re.findall(r"<!-- demo -->\n(.*?)<!-- /demo -->", README, re.DOTALL)
    committed = (ROOT / "results" / "demo" / "comparison.md").read_text(encoding="utf-8")
    rows = [line for line in committed.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5
    assert [line for line in shown.splitlines() if line.startswith("|")] == rows


def test_the_family_table_is_that_of_the_code() -> None:
    (shown,) = re.findall(r"<!-- families -->\n(.*?)<!-- /families -->", README, re.DOTALL)
    assert shown == table()


COMMANDS = re.findall(r"^dass-exp *(.*?) *(?:#.*)?$", README, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes_and_validates(command: str) -> None:
    overrides = [override for override in command.split() if override != "-m" and not override.startswith("sweeps=")]
    axes = [
        [f"{key}={value}" for value in values.split(",")]
        for key, _, values in (override.partition("=") for override in overrides)
    ]
    for cell in itertools.product(*axes):
        settings_of(*(override for override in cell if not override.startswith("model.device=")))


def test_there_are_commands_to_try() -> None:
    assert len(COMMANDS) >= 8


def test_every_choice_of_every_group_is_named() -> None:
    missing = [path.stem for path in (ROOT / "conf").glob("*/*.yaml") if not re.search(rf"\b{path.stem}\b", README)]
    assert not missing
