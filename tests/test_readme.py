"""The docs show what the code does: examples run, tables match, commands compose, every setting is described."""

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import get_args, get_type_hints

import pytest
import yaml
from support import CONF, ROOT, settings_of

from dass_exp.config.arguments import completed
from dass_exp.config.settings import RunConfig
from dass_exp.models.families import markdown_table

README, SETTINGS, MODELS = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/settings.md", "docs/models.md")
)
COMMANDS = re.findall(r"^dass-exp(?! +--) *(.*?) *(?:#.*)?$", README + SETTINGS, re.MULTILINE)


@pytest.mark.thorough
def test_the_python_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    call = [sys.executable, "-c", example]
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    dense, pruned, rest = done.stdout.splitlines()
    assert 1 < float(dense.split()[1]) < float(pruned.split()[1])
    assert rest == "0.5 torch.Size([1536, 576])"


def test_the_demo_table_is_the_committed_one() -> None:
    (shown,) = re.findall(r"<!-- demo -->\n(.*?)<!-- /demo -->", README, re.DOTALL)
    committed = (ROOT / "results" / "demo" / "comparison.md").read_text(encoding="utf-8")
    rows = [line for line in committed.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 6
    assert [line for line in shown.splitlines() if line.startswith("|")] == rows


def test_the_family_table_is_that_of_the_code() -> None:
    (shown,) = re.findall(r"<!-- families -->\n(.*?)<!-- /families -->", MODELS, re.DOTALL)
    assert shown == markdown_table()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes_and_validates(command: str) -> None:
    overrides = [part for part in command.split() if not part.startswith(("-m", "sweeps=", "model.device="))]
    axes = [(key, values.split(",")) for key, _, values in (override.partition("=") for override in overrides)]
    for cell in itertools.product(*([f"{key}={value}" for value in values] for key, values in axes)):
        settings_of(*completed(cell))


def test_there_are_commands_to_try() -> None:
    assert len(COMMANDS) >= 8


def test_every_choice_of_every_group_but_the_methods_is_named() -> None:
    choices = [path.stem for path in CONF.glob("*/*.yaml") if path.parent.name != "method"]
    assert [name for name in choices if not re.search(rf"\b{name}\b", SETTINGS + MODELS)] == []


def settings_in(schema: type, path: str = "") -> Iterator[str]:
    types = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kinds = (types[field.name], *get_args(types[field.name]))
        nested = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        yield from settings_in(nested[0], f"{path}{field.name}.") if nested else [path + field.name]


def test_every_setting_is_described() -> None:
    assert [name for name in settings_in(RunConfig) if not re.search(rf"`{re.escape(name)}[`=]", SETTINGS)] == []


def test_the_config_file_states_the_defaults_of_the_schema() -> None:
    stated, defaults = (
        yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8")),
        dataclasses.asdict(RunConfig()),
    )
    plain = {name: value for name, value in stated.items() if name in defaults and name != "protocol"}
    assert len(plain) > 10
    assert plain == {name: defaults[name] for name in plain}


def test_the_site_has_a_page_for_every_method_and_every_page_is_in_its_menu() -> None:
    listed = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted({*pages, "repository/results/leaderboard/leaderboard.md"})  # docs/site_hooks.py
    for path in (CONF / "method").glob("*.yaml"):
        if path.stem != "dense":
            page = (ROOT / "docs" / "methods" / f"{path.stem}.md").read_text(encoding="utf-8")
            content = path.read_text(encoding="utf-8")
            target = yaml.safe_load(content)["_target_"]
            assert f"::: {target}" in page
            settings = [line for line in content.splitlines() if not line.startswith(("_target_", "#"))]
            assert "\n".join(settings).strip() in page


def test_links_between_pages_lead_somewhere() -> None:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path}: {target}"
