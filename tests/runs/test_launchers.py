"""Launching a sweep: shares of a machine, the launchers, equal numbers wherever a cell runs, and kills."""

import importlib
import importlib.util
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from support import CONF, ROOT, SHORT, command, environment

from dass_exp import __main__ as entry
from dass_exp.config.settings import register
from dass_exp.errors import UserError
from dass_exp.report import cli
from dass_exp.report.load import load
from dass_exp.runs import workers

JOBLIB = {"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"}
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
SHARES = ("DASS_EXP_WORKERS", "DASS_EXP_WORKER_CORES", "DASS_EXP_WORKER_GPUS")


@pytest.fixture
def machine(monkeypatch):
    """A function that gives this process a machine with so many cores and GPUs, and no share of it yet."""

    def make(cores, gpus=0):
        chosen = []
        for name in (*SHARES, "DASS_EXP_LAUNCHER"):
            monkeypatch.setenv(name, "")  # restored afterwards, whatever the test sets
            monkeypatch.delenv(name)
        monkeypatch.setattr(workers, "cores", lambda: cores)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
        monkeypatch.setattr(workers, "_SLOT_LOCKS", [])
        torch.set_num_threads(8)  # more than any share; the fixture of all tests sets it back
        return chosen

    return make


@pytest.mark.parametrize(
    ("cores", "gpus", "expected"),
    [(1, 0, 1), (2, 0, 2), (4, 0, 2), (8, 0, 2), (16, 0, 4), (64, 0, 16), (2, 1, 1), (64, 8, 8)],
)
def test_a_machine_runs_as_many_workers_as_fit(machine, cores, gpus, expected):
    machine(cores, gpus)
    assert workers.worker_count() == expected


@pytest.mark.parametrize(
    ("gpus", "requested", "shares"), [(2, None, ["2", "8", "1"]), (0, None, ["4", "4", "0"]), (0, "3", ["3", "5", "0"])]
)
def test_the_launchers_read_what_fits_unless_the_user_says_otherwise(machine, monkeypatch, gpus, requested, shares):
    machine(16, gpus)
    if requested:
        monkeypatch.setenv("DASS_EXP_WORKERS", requested)
    workers.set_environment()
    assert [os.environ[name] for name in SHARES] == shares
    assert workers.worker_count() == int(shares[0])


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", ""])
def test_a_wrong_number_of_workers_is_named(machine, monkeypatch, value):
    machine(16)
    monkeypatch.setenv("DASS_EXP_WORKERS", value)
    with pytest.raises(UserError, match=f"DASS_EXP_WORKERS='{value}'"):
        workers.set_environment()


@pytest.mark.parametrize(
    ("cores", "launcher", "threads"),
    [
        (2, {**JOBLIB, "n_jobs": 2}, 1),
        (8, {**JOBLIB, "n_jobs": 2}, 4),
        (8, {**JOBLIB, "n_jobs": -1}, 1),
        (8, {**JOBLIB, "n_jobs": -5}, 2),
        (2, {**JOBLIB, "n_jobs": 4}, 1),
        (8, {**JOBLIB, "n_jobs": 1}, 8),
        (32, {**JOBLIB, "n_jobs": 2}, 8),  # a process keeps to fewer threads that it was given
        (8, {"_target_": "x.RayLauncher", "ray": {"remote": {"num_cpus": 3}}}, 3),
    ],
)
def test_workers_share_the_cores(machine, tmp_path, cores, launcher, threads):
    machine(cores)
    workers.acquire_slot(launcher, tmp_path)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("launcher", ["BasicLauncher", "SlurmLauncher", "RayLauncher"])
def test_other_launchers_hand_out_their_own_shares(machine, tmp_path, launcher):
    machine(2)
    workers.acquire_slot({"_target_": f"x.{launcher}"}, tmp_path)
    assert torch.get_num_threads() == 8
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_stays_is_not_taken_for_a_leak(machine, tmp_path):
    executor = importlib.import_module("joblib.externals.loky.process_executor")
    before = dict(vars(executor))
    name = "_MAX_MEMORY_LEAK_SIZE"  # an earlier test of this process may have raised it
    assert name in before
    before[name] = 1
    vars(executor).update(before)
    machine(2)
    try:
        workers.acquire_slot({**JOBLIB, "n_jobs": 2}, tmp_path)
        assert [value for name, value in vars(executor).items() if before[name] is not value] == [sys.maxsize]
    finally:
        vars(executor).update(before)


def test_each_worker_has_a_gpu_of_its_own_for_as_long_as_it_lives(machine, tmp_path):
    chosen = machine(16, gpus=4)
    with FileLock(tmp_path / ".slots" / "0.lock"), FileLock(tmp_path / ".slots" / "1.lock"):  # two other workers
        for _ in range(2):  # two cells of this one
            workers.acquire_slot({**JOBLIB, "n_jobs": 4}, tmp_path)
    assert chosen == [2]
    assert torch.get_num_threads() == 4


def test_a_single_gpu_is_left_chosen(machine, tmp_path):
    chosen = machine(16, gpus=1)
    workers.acquire_slot({**JOBLIB, "n_jobs": 2}, tmp_path)
    assert (chosen, torch.get_num_threads()) == ([], 8)


def test_submitits_local_executor_waits_for_a_share(machine, tmp_path):
    """It starts all cells at once: those that get no share wait until a process ends."""
    machine(2)
    waiting = threading.Thread(
        target=workers.acquire_slot, args=({"_target_": "x.LocalLauncher"}, tmp_path), daemon=True
    )
    with FileLock(tmp_path / ".slots" / "0.lock"), FileLock(tmp_path / ".slots" / "1.lock") as second:
        waiting.start()
        waiting.join(1)
        assert waiting.is_alive()
        second.release()
        waiting.join(10)
        assert not waiting.is_alive()


@pytest.mark.filterwarnings(r"ignore:\s*'hydra/launcher/")
def test_the_launcher_of_one_machine_reads_what_fits(monkeypatch):
    monkeypatch.setenv("DASS_EXP_ROOT", str(ROOT))
    monkeypatch.setenv("DASS_EXP_WORKERS", "7")
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        launcher = compose("config", ["hydra/launcher=joblib"], return_hydra_config=True).hydra.launcher
    assert (launcher._target_, launcher.n_jobs, launcher.batch_size) == (JOBLIB["_target_"], 7, "1")


def cells(tiny, *more):
    return [f"model.path={tiny}", "model.name=tiny", "tracker=none", "eval=ppl_mini", *SHORT, *more]


def metrics(folder):
    return {key: record["metrics"] for key, record in load(folder / "results").records.items()}


@pytest.fixture(name="serial", scope="module")
def serial_fixture(tiny, tmp_path_factory):
    """The scores of three cells and their dense one, from one process with two threads."""
    folder = tmp_path_factory.mktemp("serial")
    done = command("-m", *cells(tiny, "method=wanda,dass,sparsegpt"), folder=folder)
    assert done.returncode == 0, done.stderr
    return metrics(folder)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "launcher", ["joblib", *(pytest.param(name, marks=pytest.mark.slow) for name in ("submitit_local", "ray"))]
)
def test_a_real_sweep_gives_the_numbers_of_one_process(tiny, serial, tmp_path, launcher):
    if launcher == "ray":
        pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="make test-all installs the extra ray")
    more = [f"hydra/launcher={launcher}", *(["hydra.launcher.n_jobs=2"] if launcher == "joblib" else [])]
    done = command("-m", *cells(tiny, "method=wanda,dass,sparsegpt"), *more, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path) == serial
    assert len(serial) == 4
    records = load(tmp_path / "results").records.values()
    assert {record["environment"]["threads"] for record in records} == {max(1, workers.cores() // 2)}
    assert "│ wanda" in done.stdout


@pytest.mark.slow
def test_a_bad_cell_of_a_worker_is_named_at_the_end(tiny, tmp_path):
    done = command("-m", "method.alpha=0.5,-1", *cells(tiny), "hydra/launcher=joblib", folder=tmp_path)
    assert done.returncode == 1
    assert "failed: method.alpha=-1" in done.stderr
    assert len(metrics(tmp_path)) == 2


@pytest.mark.parametrize(
    ("launcher", "extra"),
    [("slurm", "slurm"), ("submitit_slurm", "slurm"), ("submitit_local", "slurm"), ("ray", "ray")],
)
def test_a_launcher_that_is_not_installed_names_its_extra(monkeypatch, launcher, extra):
    monkeypatch.setattr(sys, "argv", ["dass-exp", "-m", f"hydra/launcher={launcher}"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = f"hydra/launcher={launcher}: this launcher is an extra; pip install 'dass_exp[{extra}]'"
    assert entry._explain_override().startswith(message)


@pytest.mark.thorough
def test_slurm_is_asked_for_what_the_config_says(tiny, tmp_path):
    """Submitit's own submission file, taken from a stand-in for sbatch that refuses it: there is no cluster here."""
    refuse = f'cp "$1" {tmp_path}/submitted.sh; echo "sbatch: error: invalid partition" >&2; exit 1'
    for name, script in (("srun", "exit 1"), ("sbatch", refuse)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    more = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=90"]
    more += ["+hydra.launcher.additional_parameters.mail-type=END"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = command("-m", *cells(tiny, "method=wanda,dass"), *more, folder=tmp_path, PATH=path)
    assert done.returncode == 2
    assert "invalid partition" in done.stderr
    assert "Slurm refused the jobs" in done.stderr
    assert "again" not in done.stderr
    lines = (tmp_path / "submitted.sh").read_text().splitlines()
    expected = "array=0-1%2 cpus-per-task=8 gpus-per-node=1 mem=64GB partition=gpu time=90 requeue mail-type=END"
    requested = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert requested >= {*expected.split(), "job-name=dass_exp"}
    done = command("-m", *cells(tiny, "method=wanda,dass"), *more, "plan=true", folder=tmp_path)  # needs no launcher
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("would run") == 2


@pytest.mark.thorough
def test_a_launcher_without_a_sweep_is_refused(tiny, tmp_path):
    done = command(*cells(tiny), "hydra/launcher=joblib", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("hydra/launcher=joblib: a launcher runs the cells of a sweep")
    assert not (tmp_path / "results" / "runs").exists()


@pytest.mark.slow
def test_a_worker_that_dies_leaves_the_table_of_the_others(tiny, tmp_path):
    """As when the kernel kills the process that takes most memory."""
    (tmp_path / "deadly.py").write_text(_DEADLY)
    (tmp_path / "own" / "method").mkdir(parents=True)
    (tmp_path / "own" / "method" / "deadly.yaml").write_text("_target_: deadly.Deadly\n")
    sweep = ["--config-dir", "own", "-m", "plugins=[deadly]", *cells(tiny, "method=wanda,deadly")]
    sweep += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = command(*sweep, folder=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "│ wanda" in done.stdout
    assert "the launcher ended before the sweep did" in done.stderr
    assert "Traceback" not in done.stderr
    again = command(*sweep, folder=tmp_path, PYTHONPATH=str(tmp_path), SPARE="1")
    assert again.returncode == 0, again.stderr
    assert "│ deadly" in again.stdout


_DEADLY = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
from dass_exp.methods.wanda import Wanda

@dataclass
class Deadly(Wanda):
    def score(self, linear, block):
        while "SPARE" not in os.environ:
            if list(Path("results").glob("hydra/*/*/0/cell.json")):  # the cell of wanda is done
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.05)
        return super().score(linear, block)
"""
SWEEP = ["sweeps=alpha", "pattern=2of4,4of8", "method.alpha=0,0.25,0.5,0.75,1", "method=dass"]


def launch(arguments, folder, until, whole_group=False):
    """Start the command and kill it, with all that it started, once ``until()`` holds; return the time limit."""
    call, limit = [sys.executable, "-m", "dass_exp", *arguments], time.monotonic() + 120
    process = subprocess.Popen(call, cwd=folder, env=environment(), start_new_session=whole_group, **QUIET)
    try:
        while not until():
            assert time.monotonic() < limit
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if whole_group else process.kill()
        process.wait()
    return limit


def processes_in(folder):
    """Processes that run in this folder."""
    running = []
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            running += [cwd.parent.name] if cwd.readlink() == folder else []
    return running


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="there is no /proc here to look into")
def test_workers_end_with_the_process_that_launched_them(tiny, tmp_path):
    arguments = cells(tiny, *SWEEP, "hydra/launcher=joblib", "calibration.num_samples=512")
    limit = launch(arguments, tmp_path, lambda: list(tmp_path.glob("results/hydra/*/*/.slots/*.lock")))
    while processes_in(tmp_path):
        assert time.monotonic() < limit, processes_in(tmp_path)
        time.sleep(0.1)


def records_in(folder):
    paths = folder.glob("results/runs/*/result.json")
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=joblib"]])
def test_a_killed_sweep_continues_and_runs_nothing_twice(tiny, tmp_path, launcher, kills=(2, 5)):
    arguments, kept = cells(tiny, *SWEEP, *launcher), {}
    for count in kills:
        launch(arguments, tmp_path, lambda count=count: len(records_in(tmp_path)) >= count, whole_group=True)
        records = records_in(tmp_path)
        assert len(records) < 11
        assert kept.items() <= records.items()
        kept = records
    done = command(*arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    records = records_in(tmp_path)
    assert len(records) == 11  # ten cells and their dense record
    assert kept.items() <= records.items()
    assert done.stderr.count("pruning with dass") == 11 - len(kept)
    assert done.stderr.count("loading the model") <= (2 if launcher else 1)  # once a worker
    whole = tmp_path / "whole"
    whole.mkdir()
    assert command(*cells(tiny, *SWEEP), folder=whole).returncode == 0
    for folder in (tmp_path, whole):
        cli.main(["alpha", "--results", str(folder / "results")])
        assert load(folder / "results").problems == []
    for ending in ("md", "csv", "tex"):
        first, second = (folder / "results" / "tables" / f"alpha.{ending}" for folder in (tmp_path, whole))
        assert first.read_text() == second.read_text()
