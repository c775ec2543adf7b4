"""The command in a process of its own: exit codes, one line for a user's mistake, sweeps that go on, and where it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import command, files_under, tiny_overrides


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that the command runs in."""
    made = tmp_path / "work"
    made.mkdir()
    return made


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method=foo", ["method/foo", "dass", "dense", "magnitude", "sparsegpt", "wanda"]),
        ("method.beta=1", ["method.beta", "beta"]),
        ("calibration.num_samples=many", ["calibration.num_samples", "many"]),
        ("pattern=2_4", ["pattern=2_4", "number"]),
    ],
)
def test_a_setting_that_hydra_refuses_ends_with_2_and_no_traceback(folder, override, words):
    done = command(override, folder=folder)
    assert done.returncode == 2
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("method.alpha=-1", "method.alpha=-1: expected a number of at least 0 (the paper: 0.5)"),
        ("model.path=/no/such/folder", "model.path=/no/such/folder: there is no such folder"),
        ("method._target_=os.system", "method._target_=os.system: a _target_ is code that runs"),
    ],
)
def test_a_mistake_of_the_user_ends_with_2_and_one_line(folder, override, line):
    done = command(override, folder=folder)
    assert done.returncode == 2
    told = [told for told in done.stderr.splitlines() if not told.endswith(" ...")]  # what the run was doing
    assert len(told) == 1, done.stderr
    assert told[0].startswith(line)
    assert done.stdout == ""
    assert {path.split("/")[0] for path in files_under(folder)} <= {"results"}
    assert not (folder / "results" / "runs").exists()


def test_a_sweep_goes_on_past_a_bad_cell_and_ends_with_1(folder, tiny):
    shared = tiny_overrides(tiny, Path("results"))
    swept = command("-m", "method.alpha=-1,0.5", *shared, folder=folder)
    assert swept.returncode == 1, swept.stderr
    assert "Traceback" not in swept.stderr
    assert "failed: method.alpha=-1" in swept.stderr
    assert "method.alpha=-1: expected a number of at least 0" in swept.stderr

    cells = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("results/hydra/*/*/*/cell.json")}
    assert {number: cell["status"] for number, cell in cells.items()} == {"0": "failed", "1": "done"}
    records = {
        json.loads(path.read_text())["config"]["method"]["name"]: path
        for path in folder.glob("results/runs/*/result.json")
    }
    assert set(records) == {"dass", "dense"}
    assert Path(cells["1"]["record"]) == records["dass"].resolve()

    key = records["dass"].parent.name
    assert key[:8] in swept.stdout
    (table,) = folder.glob("results/hydra/*/*/comparison.md")
    assert key[:8] in table.read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["results"]  # neither outputs nor multirun

    again = command(*shared, folder=folder)
    assert again.returncode == 0, again.stderr
    assert f"found results/runs/{key}/result.json" in again.stdout
    assert "dense" in again.stdout
    assert "perplexity wikipedia_mini" in again.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["results"]


THEIR_SWEEP = """
# @package _global_
plugins: [someones_plugin]
method: {{_target_: someones_plugin.Method}}
hydra:
  mode: {mode}
  {way}
"""
WAYS = {  # by which a file could pass for the user
    "an axis": ("MULTIRUN", "sweeper: {params: {plugins: '[someones_plugin]', seed: '0,1'}}"),
    "an override": ("RUN", "overrides: {task: ['plugins=[someones_plugin]']}"),
    "the environment": ("RUN", "job: {env_set: {DASS_EXP_PLUGINS: someones_plugin}}"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_config_file_cannot_admit_the_code_that_it_names(tmp_path, folder, way):
    mode, setting = WAYS[way]
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "theirs.yaml").write_text(THEIR_SWEEP.format(mode=mode, way=setting))
    (tmp_path / "someones_plugin.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Method: pass\n")
    done = command("sweeps=theirs", folder=folder, DASS_EXP_ROOT=str(tmp_path), PYTHONPATH=str(tmp_path))
    assert done.returncode == {"MULTIRUN": 1, "RUN": 2}[mode], done.stderr
    assert not (tmp_path / "ran").exists()
    assert "not admitted" in done.stderr


@pytest.mark.parametrize(
    ("mistake", "word"),
    [("foo=1", "foo"), ("tracker=nosuch", "tracker/nosuch"), ("calibration=nosuch", "calibration/nosuch")],
)
def test_a_mistake_beside_the_axes_of_a_sweep_is_told_in_one_line(folder, mistake, word):
    done = command("sweeps=alpha", "method.alpha=0,1", mistake, folder=folder)
    assert done.returncode == 2
    assert word in done.stderr
    assert "Ambiguous" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_plan_that_cannot_be_leaves_no_failure_behind(folder, tiny):
    from dass_exp.report.load import cells_of

    shared = tiny_overrides(tiny, Path("results"))
    done = command(
        "sweeps=alpha", "pattern=2of4", "method.alpha=0,1", *shared, "plan=true", "scope=wrong", folder=folder
    )
    assert done.returncode == 1
    assert "scope='wrong'" in done.stderr
    assert cells_of(folder / "results", "alpha") == []
