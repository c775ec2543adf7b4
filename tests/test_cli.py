"""The command in a process of its own: exit codes, one line for a mistake, sweeps that go on, and where it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fork_server import forked_command as command
from support import files_under, tiny_overrides

from dass_exp.report.load import cells_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that the command runs in."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


SWEEP = ["sweeps=alpha", "method.alpha=0,1"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # refused by Hydra
        (["method=foo"], ["method/foo", "dass", "dense", "magnitude", "sparsegpt", "wanda"]),
        (["method.beta=1"], ["method.beta", "beta"]),
        (["calibration.num_samples=many"], ["calibration.num_samples", "many"]),
        (["pattern=2_4"], ["pattern=2_4", "number"]),
        (["retrain.steps=9"], ["retrain.steps: the chosen retrain has no such setting", "retrain=full, lora, norms"]),
        (["pattern.sparsity=0.5"], ["pattern.sparsity: the chosen pattern has no", "pattern=unstructured"]),
        (["method.gamma=1"], ["method.gamma: the chosen method has no such setting; no choice of method has it"]),
        ([*SWEEP, "foo=1"], ["foo"]),
        ([*SWEEP, "tracker=nosuch"], ["tracker/nosuch"]),
        ([*SWEEP, "calibration=nosuch"], ["calibration/nosuch"]),
        # refused by us
        (["method.alpha=-1"], ["method.alpha=-1: expected a number of at least 0 (the paper: 0.5)"]),
        (["model.path=/no/such/folder"], ["model.path=/no/such/folder: there is no such folder"]),
        (["method._target_=os.system"], ["method._target_=os.system: a _target_ is code that runs"]),
    ],
    ids=lambda value: value[-1],
)
def test_a_mistake_of_the_user_ends_with_2_and_one_line(folder, overrides, words):
    done = command(*overrides, folder=folder)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    phases = [line for line in lines if line.endswith(" ...")]  # what the run was doing
    assert phases == ["finding /no/such/folder ..."] * ("model.path" in words[0])
    (message,) = [line for line in lines if line not in phases]
    assert all(word in message for word in words)
    assert ":" not in words[0] or message.startswith(words[0])
    assert "Ambiguous" not in message
    assert done.stdout == ""
    assert {path.split("/")[0] for path in files_under(folder)} <= {"results"}
    assert not (folder / "results" / "runs").exists()


@pytest.mark.thorough
def test_several_processes_of_one_command_are_refused(folder):
    done = command(folder=folder, WORLD_SIZE="2", TORCHELASTIC_RUN_ID="none")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("torchrun with 2 processes: dass-exp runs in one; start it without torchrun")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.thorough
def test_a_sweep_goes_on_past_bad_cells_and_ends_with_1(folder, tiny):
    shared = tiny_overrides(tiny, Path("results"))
    swept = command("-m", "method.alpha=-1,0.5", "calibration.batch_size=1000000000000,4", *shared, folder=folder)
    assert swept.returncode == 1, swept.stderr
    assert "Traceback" not in swept.stderr
    assert "failed: method.alpha=-1" in swept.stderr
    assert "method.alpha=-1: expected a number of at least 0" in swept.stderr

    cells = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("results/hydra/*/*/*/cell.json")}
    assert [cells[number]["status"] for number in "0123"] == ["failed", "failed", "failed", "done"]
    paths = list(folder.glob("results/runs/*/result.json"))
    records = {json.loads(path.read_text())["config"]["method"]["name"]: path for path in paths}
    assert set(records) == {"dass", "dense"}
    assert Path(cells["3"]["record"]) == records["dass"].resolve()

    key = records["dass"].parent.name
    assert "this run needs" in cells["2"]["error"]  # a batch that no memory can hold
    assert [cells[number]["key"] for number in "0123"] == [None, None, key, key]
    assert key[:8] in swept.stdout
    assert [key[:8] in table.read_text() for table in folder.glob("results/hydra/*/*/comparison.md")] == [True]

    again = command(*shared, folder=folder)
    assert again.returncode == 0, again.stderr
    words = [f"found results/runs/{key}/result.json", "dense", "perplexity wikipedia_mini"]
    assert [word for word in words if word not in again.stdout] == []
    assert sorted(path.name for path in folder.iterdir()) == ["results"]  # neither outputs nor multirun


THEIR_SWEEP = """
# @package _global_
plugins: [someones_plugin]
method: {{_target_: someones_plugin.Method}}
hydra:
  mode: {mode}
  {way}
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("mode", "way", "code"),
    [
        ("MULTIRUN", "sweeper: {params: {plugins: '[someones_plugin]', seed: '0,1'}}", 1),
        ("RUN", "overrides: {task: ['plugins=[someones_plugin]']}", 2),
        ("RUN", "job: {env_set: {DASS_EXP_PLUGINS: someones_plugin}}", 2),
    ],
    ids=["an axis", "an override", "the environment"],
)
def test_a_config_file_cannot_admit_the_code_that_it_names(tmp_path, folder, mode, way, code):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "theirs.yaml").write_text(THEIR_SWEEP.format(mode=mode, way=way))
    (tmp_path / "someones_plugin.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Method: pass\n")
    done = command("sweeps=theirs", folder=folder, DASS_EXP_ROOT=str(tmp_path), PYTHONPATH=str(tmp_path))
    assert done.returncode == code, done.stderr
    assert not (tmp_path / "ran").exists()
    assert "not admitted" in done.stderr


@pytest.mark.thorough
def test_a_plan_that_cannot_be_leaves_no_failure_behind(folder, tiny):
    shared = tiny_overrides(tiny, Path("results"))
    done = command(*SWEEP, "pattern=2of4", *shared, "plan=true", "scope=wrong", folder=folder)
    assert done.returncode == 1
    assert "scope='wrong'" in done.stderr
    assert cells_of(folder / "results", "alpha") == []
