"""Secrets, which stand nowhere, and names, which are text wherever they are printed."""

from __future__ import annotations

import pytest
from harness import Case

SECRET = "hf_Qw7xZ2pLmN8vRtYb3KcDfGhJ"
TOKEN = "${oc.env:CAMPAIGN_TOKEN}"
WAYS = {
    "interpolated name": ([f"model.name={TOKEN}"], [2]),
    "interpolated folder": ([f"save={TOKEN}"], [2]),
    "interpolated results": ([f"results_dir={TOKEN}"], [2]),
    "interpolated method": ([f"++method.name={TOKEN}"], [2]),
    "with a default": (["model.name=${oc.env:CAMPAIGN_TOKEN,x}"], [2]),
    "in a string": (["model.name='a${oc.env:CAMPAIGN_TOKEN}b'"], [2]),
    "in a mapping": (["model.roles={gate:'" + TOKEN + "'}"], [2]),
    "in hydra": ([f"hydra.job.name={TOKEN}"], [2]),
    "in a folder of hydra": ([f"hydra.run.dir=results/{TOKEN}"], [2]),
    "in the environment of a job": ([f"+hydra.job.env_set.X={TOKEN}"], [0, 2]),
    "copied": (["hydra.job.env_copy=[CAMPAIGN_TOKEN]"], [0, 2]),
    "unused": ([], [0]),
    "typed project": (["tracker=wandb", f"tracker.project={SECRET}"], [0, 2]),
    "typed key": ([f"++tracker.api_key={SECRET}"], [0, 1, 2]),
    "typed token": ([f"++model.token={SECRET}"], [0, 1, 2]),
    "typed password": ([f"++method.password={SECRET}"], [0, 1, 2]),
    "typed name": ([f"model.name={SECRET}"], [0, 2]),
    "a bad cell": ([f"model.name={SECRET}", "seed=-1"], [1, 2]),
}
VARIABLES = ["HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "CAMPAIGN_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MY_PASSWORD"]


@pytest.mark.parametrize("grid", [False, True])
def test_secrets_stand_nowhere(campaign, hold, grid):
    cases = []
    for name, (more, codes) in WAYS.items():
        argv = [*campaign.base(), *more]
        argv = ["-m", "repeat=0,1", *argv] if grid else argv
        job = {"env": dict.fromkeys(VARIABLES, SECRET), "prelude": "import sys; sys.modules['wandb'] = None"}
        promise = {"codes": [*codes, 1] if grid else codes, "lines": 6 if grid else 1, "changes": True}
        cases.append(Case(name, argv, job=job, secret=SECRET, **promise))
    hold("secrets", cases)


NAMES = [
    "[/x]",
    "[bold]x",
    "[link=https://x]y",
    "a[b",
    "a]b",
    "[red]x[/red]",
    ":smile:",
    "[]",
    "[/]",
    "%s",
    "{x}",
    "a\tb",
]
NAMES += [
    "<script>alert(1)</script>",
    "a|b",
    "*a*",
    "x" * 200,
    "é",
    "\u202eabc",
    "\x1b[31mred",
    "a\udcffb",
    "\u2603",
    "-",
]


def test_names_are_text(campaign, hold):
    """A name is printed as it is, and does not disturb a later run that shares its dense record."""
    cases = []
    for name in NAMES:
        argv, other = campaign.base(f'model.name="{name}"'), campaign.base("method=magnitude")

        def shown(box, result, name=name):
            plain = name.isascii() and name.isprintable() and len(name) < 30
            return [] if not plain or result.code or name in result.stdout else ["the name is not printed as it is"]

        def other_name(box, result, name=name):
            return ["it shows the name of another run"] if name in result.stdout and len(name) > 2 else []

        cases.append(Case(f"name-{name!r}", argv, codes=[0, 2], after=shown))
        cases.append(Case(f"later-{name!r}", other, before=[(argv, {})], codes=[0], after=other_name))
        report = {"module": "dass_exp.report.cli"}
        first = [(["-m", "sweeps=alpha", "method.alpha=0.5", "pattern=2of4", *argv], {})]
        cases.append(Case(f"report-{name!r}", [], job=report, before=first, codes=[0, 2]))
    hold("names", cases)


FOLDERS = [
    "[/x]",
    "[bold]",
    "a[b",
    "a:b",
    "a b",
    "$HOME",
    "é",
    "a=b",
    "a,b",
    "(a)",
    "a#b",
    "%d",
    "{a}",
    "~a",
    "*",
    "?",
    "a;b",
]


@pytest.mark.parametrize("setting", ["model.path", "results_dir", "save", "cwd"])
def test_folders_with_names_that_mean_something_elsewhere(campaign, hold, setting):
    cases = []
    for name in FOLDERS:
        place = f"@/named/{name}"

        def prepare(box, name=name):
            target = box.folder / "named" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if setting == "model.path":
                box.model.rename(target)
            elif setting == "cwd":
                target.mkdir()

        argv = campaign.base() if setting == "cwd" else campaign.base(f'{setting}="{place}"')
        job = {"cwd": place} if setting == "cwd" else {}
        cases.append(Case(f"{setting}-{name}", argv, prepare, job, codes=[0], changes=True))
    hold("names", cases)
