"""Launching a sweep: shares of a machine, the ready launchers, the same numbers wherever a cell ran, and what a kill leaves behind."""

import importlib
import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from support import CONF, ROOT, command, environment

from dass_exp import __main__ as entry
from dass_exp.config.settings import register
from dass_exp.errors import UserError
from dass_exp.report import cli
from dass_exp.report.load import load
from dass_exp.runs import workers

LAUNCHERS = sorted(path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml"))
JOBLIB = {"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"}


@pytest.fixture
def machine(monkeypatch):
    """A function that gives this process a machine of so many cores and GPUs, and no share of it."""

    def make(cores, gpus=0):
        chosen = []
        for name in ("DASS_EXP_WORKERS", "DASS_EXP_WORKER_CORES", "DASS_EXP_WORKER_GPUS", "DASS_EXP_LAUNCHER"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(workers, "cores", lambda: cores)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
        monkeypatch.setattr(workers, "_HELD", [])
        torch.set_num_threads(8)  # more than any share: the fixture of all tests sets it back
        return chosen

    return make


@pytest.mark.parametrize(
    ("cores", "gpus", "expected"),
    [(1, 0, 1), (2, 0, 2), (4, 0, 2), (8, 0, 2), (16, 0, 4), (64, 0, 16), (2, 1, 1), (64, 8, 8)],
)
def test_a_machine_runs_as_many_workers_as_fit(machine, cores, gpus, expected):
    machine(cores, gpus)
    assert workers.workers() == expected


def test_the_launchers_are_told_what_fits(machine):
    machine(16, 2)
    workers.set_environment()
    told = [os.environ.pop(name) for name in ("DASS_EXP_WORKERS", "DASS_EXP_WORKER_CORES", "DASS_EXP_WORKER_GPUS")]
    assert told == ["2", "8", "1"]


def test_the_user_has_the_last_word(machine, monkeypatch):
    machine(16)
    monkeypatch.setenv("DASS_EXP_WORKERS", "3")
    workers.set_environment()
    assert workers.workers() == 3
    assert os.environ.pop("DASS_EXP_WORKER_CORES") == "5"
    assert os.environ.pop("DASS_EXP_WORKER_GPUS") == "0"


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", ""])
def test_a_number_of_workers_that_is_none_is_told(machine, monkeypatch, value):
    machine(16)
    monkeypatch.setenv("DASS_EXP_WORKERS", value)
    with pytest.raises(UserError, match=f"DASS_EXP_WORKERS='{value}'"):
        workers.set_environment()


@pytest.mark.parametrize(
    ("cores", "jobs", "threads"), [(2, 2, 1), (8, 2, 4), (8, -1, 1), (8, -5, 2), (2, 4, 1), (8, 1, 8)]
)
def test_workers_share_the_cores(machine, tmp_path, cores, jobs, threads):
    machine(cores)
    workers.acquire_slot({**JOBLIB, "n_jobs": jobs}, tmp_path)
    assert torch.get_num_threads() == threads


def test_a_model_that_stays_is_not_taken_for_a_leak(machine, tmp_path, monkeypatch):
    loky = importlib.import_module(workers._LOKY)
    monkeypatch.setattr(loky, "_MAX_MEMORY_LEAK_SIZE", loky._MAX_MEMORY_LEAK_SIZE)
    machine(2)
    workers.acquire_slot({**JOBLIB, "n_jobs": 2}, tmp_path)
    assert sys.maxsize == loky._MAX_MEMORY_LEAK_SIZE


def test_a_process_that_was_given_fewer_threads_keeps_to_them(machine, tmp_path):
    machine(16)
    torch.set_num_threads(2)
    workers.acquire_slot({**JOBLIB, "n_jobs": 2}, tmp_path)
    assert torch.get_num_threads() == 2


def test_each_worker_has_a_gpu_of_its_own_for_as_long_as_it_lives(machine, tmp_path):
    chosen = machine(16, gpus=4)
    with FileLock(tmp_path / ".slots" / "0.lock"), FileLock(tmp_path / ".slots" / "1.lock"):  # two other workers
        for _ in range(2):  # two cells of this one
            workers.acquire_slot({**JOBLIB, "n_jobs": 4}, tmp_path)
    assert chosen == [2]
    assert torch.get_num_threads() == 4


def test_a_machine_with_one_gpu_leaves_it_chosen(machine, tmp_path):
    assert machine(16, gpus=1) == []
    workers.acquire_slot({**JOBLIB, "n_jobs": 2}, tmp_path)
    assert torch.get_num_threads() == 8


@pytest.mark.parametrize(
    "launcher", ["hydra._internal.core_plugins.basic_launcher.BasicLauncher", "x.SlurmLauncher", "x.RayLauncher"]
)
def test_other_launchers_hand_out_their_own_shares(machine, tmp_path, launcher):
    machine(2)
    workers.acquire_slot({"_target_": launcher}, tmp_path)
    assert torch.get_num_threads() == 8
    assert list(tmp_path.iterdir()) == []


def test_a_ray_task_keeps_to_the_cores_that_it_was_given(machine, tmp_path):
    machine(8)
    workers.acquire_slot({"_target_": "x.RayLauncher", "ray": {"remote": {"num_cpus": 3}}}, tmp_path)
    assert torch.get_num_threads() == 3


def test_submitits_local_executor_waits_for_a_share(machine, tmp_path):
    """It starts all cells at once: those that find no share wait until a process ends."""
    machine(2)
    held = [FileLock(tmp_path / ".slots" / f"{slot}.lock") for slot in range(2)]
    (tmp_path / ".slots").mkdir()
    for lock in held:
        lock.acquire()
    waiting = subprocess.Popen(
        [sys.executable, "-c", _WAIT, str(tmp_path)],
        env=environment(DASS_EXP_WORKERS="2"),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert waiting.stdout.readline() == "waiting\n"
        time.sleep(1)
        assert waiting.poll() is None
        held[1].release()
        assert waiting.communicate(timeout=60)[0] == "has 1\n"
    finally:
        waiting.kill()
        held[0].release()


_WAIT = """
import sys
from pathlib import Path
from dass_exp import __main__ as entry
from dass_exp.runs import workers
print("waiting", flush=True)
workers.acquire_slot({"_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher"}, Path(sys.argv[1]))
print("has", Path(workers._HELD[0].lock_file).stem)
"""


def test_the_ready_launchers_are_these():
    assert LAUNCHERS == ["joblib", "ray", "slurm"]


@pytest.mark.filterwarnings(r"ignore:\s*'hydra/launcher/")
@pytest.mark.parametrize(
    "name", [name for name in LAUNCHERS if name != "ray"]
)  # its plugin is no part of what the tests install
def test_a_ready_launcher_composes(name, monkeypatch):
    monkeypatch.setenv("DASS_EXP_ROOT", str(ROOT))
    monkeypatch.setenv("DASS_EXP_WORKERS", "7")
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        launcher = hydra_compose("config", [f"hydra/launcher={name}"], return_hydra_config=True).hydra.launcher
    assert launcher._target_.startswith("hydra_plugins.")
    if name == "joblib":
        assert (launcher.n_jobs, launcher.batch_size) == (7, "1")
    else:
        assert launcher.submitit_folder.endswith("/.submitit/%j")


def cells(tiny, *more):
    few = [
        "eval=ppl_mini",
        "eval.perplexity.context=32",
        "eval.perplexity.max_windows=4",
        "calibration.num_samples=4",
        "calibration.seq_len=32",
    ]
    return [f"model.path={tiny}", "model.name=tiny", "tracker=none", *few, *more]


@pytest.fixture(name="serial", scope="module")
def serial_fixture(tiny, tmp_path_factory):
    """The records of three cells and their dense one, made in one process with two threads."""
    folder = tmp_path_factory.mktemp("serial")
    done = command("-m", *cells(tiny, "method=wanda,dass,sparsegpt"), folder=folder)
    assert done.returncode == 0, done.stderr
    return load(folder / "results").records


def same_numbers(records, others):
    return {key: record["metrics"] for key, record in records.items()} == {
        key: record["metrics"] for key, record in others.items()
    }


@pytest.mark.parametrize(
    "launcher",
    [["joblib", "hydra.launcher.n_jobs=2"], ["submitit_local"], pytest.param(["ray"], marks=pytest.mark.slow)],
    ids=lambda launcher: launcher[0],
)
def test_a_real_sweep_gives_the_numbers_of_one_process(tiny, serial, tmp_path, launcher):
    name, *more = launcher
    if name == "ray":
        pytest.importorskip(
            "hydra_plugins.hydra_ray_launcher", reason="the extra ray is not installed: make test-all installs it"
        )
    done = command("-m", *cells(tiny, "method=wanda,dass,sparsegpt"), f"hydra/launcher={name}", *more, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    records = load(tmp_path / "results").records
    assert len(records) == 4
    assert same_numbers(records, serial)
    assert {record["environment"]["threads"] for record in records.values()} == {max(1, workers.cores() // 2)}
    assert "│ wanda" in done.stdout


def test_a_bad_cell_of_a_worker_is_told_at_the_end(tiny, tmp_path):
    done = command("-m", "method.alpha=0.5,-1", *cells(tiny), "hydra/launcher=joblib", folder=tmp_path)
    assert done.returncode == 1
    assert "failed: method.alpha=-1" in done.stderr
    assert len(load(tmp_path / "results").records) == 2


@pytest.mark.parametrize(
    ("launcher", "extra"),
    [("slurm", "slurm"), ("submitit_slurm", "slurm"), ("submitit_local", "slurm"), ("ray", "ray")],
)
def test_a_launcher_that_is_not_installed_names_its_extra(monkeypatch, launcher, extra):
    monkeypatch.setattr(sys, "argv", ["dass-exp", "-m", f"hydra/launcher={launcher}"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert entry._mistyped().startswith(
        f"hydra/launcher={launcher}: this launcher is an extra; pip install 'dass_exp[{extra}]'"
    )


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed here")
def test_the_command_names_the_extra_of_a_launcher_that_is_missing(tmp_path):
    done = command("-m", "method=wanda", "hydra/launcher=ray", folder=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "pip install 'dass_exp[ray]'" in done.stderr


def test_slurm_is_asked_for_what_the_config_says(tiny, tmp_path):
    """Submitit's own submission file, taken from a stand-in for sbatch that refuses it: there is no cluster here."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in (
        ("srun", "exit 1"),
        ("sbatch", f'cp "$1" {tmp_path}/submitted.sh; echo "sbatch: error: invalid partition" >&2; exit 1'),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(stat.S_IRWXU)
    more = [
        "hydra.launcher.partition=gpu",
        "hydra.launcher.timeout_min=90",
        "+hydra.launcher.additional_parameters.mail-type=END",
    ]
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    done = command("-m", *cells(tiny, "method=wanda,dass"), "hydra/launcher=slurm", *more, folder=tmp_path, PATH=path)
    assert done.returncode == 2
    assert "invalid partition" in done.stderr
    assert "Slurm refused the jobs" in done.stderr
    assert "again" not in done.stderr
    asked = {
        line.removeprefix("#SBATCH --")
        for line in (tmp_path / "submitted.sh").read_text().splitlines()
        if line.startswith("#SBATCH")
    }
    assert asked >= {
        "array=0-1%2",
        "cpus-per-task=8",
        "gpus-per-node=1",
        "mem=64GB",
        "partition=gpu",
        "time=90",
        "requeue",
        "mail-type=END",
        "job-name=dass_exp",
    }


def test_a_launcher_without_a_sweep_is_told(tiny, tmp_path):
    done = command(*cells(tiny), "hydra/launcher=joblib", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("hydra/launcher=joblib: a launcher runs the cells of a sweep")
    assert not (tmp_path / "results" / "runs").exists()


def test_a_plan_needs_no_launcher(tiny, tmp_path):
    done = command(
        "-m",
        *cells(tiny, "method=wanda,dass"),
        "hydra/launcher=slurm",
        "hydra.launcher.partition=gpu",
        "plan=true",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("would run") == 2


def test_a_worker_that_dies_leaves_the_table_of_the_others(tiny, tmp_path):
    """As when the kernel kills the process that takes most memory."""
    (tmp_path / "deadly.py").write_text(_DEADLY)
    (tmp_path / "own" / "method").mkdir(parents=True)
    (tmp_path / "own" / "method" / "deadly.yaml").write_text("_target_: deadly.Deadly\n")
    first = command("-m", *cells(tiny, "method=wanda"), folder=tmp_path)
    assert first.returncode == 0, first.stderr
    own = [
        "--config-dir",
        "own",
        "-m",
        "plugins=[deadly]",
        *cells(tiny, "method=wanda,deadly"),
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
    ]
    done = command(*own, folder=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "│ wanda" in done.stdout
    assert "the launcher ended before the sweep did" in done.stderr
    assert "Traceback" not in done.stderr
    again = command(*own, folder=tmp_path, PYTHONPATH=str(tmp_path), SPARE="1")
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
            if len(list(Path("results").glob("hydra/*/*/0/cell.json"))) == 2:  # the other cell of this sweep has left word, after that of the first
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.05)
        return super().score(linear, block)
"""


KILLED = ["sweeps=alpha", "pattern=2of4,4of8", "method.alpha=0,0.25,0.5,0.75,1", "method=dass"]


def launch_and_kill(arguments, folder, records):
    """Kill the command and all that it started, without a warning, once it has written so many records."""
    call = [sys.executable, "-m", "dass_exp", *arguments]
    process = subprocess.Popen(
        call,
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    limit = time.monotonic() + 120
    try:
        while len(list(folder.glob("results/runs/*/result.json"))) < records:
            assert time.monotonic() < limit
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def alive(folder):
    """Processes that run in this folder."""
    found = []
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            found += [cwd.parent.name] if cwd.readlink() == folder else []
    return found


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="there is no /proc here to look into")
def test_workers_end_with_the_process_that_launched_them(tiny, tmp_path):
    call = [
        sys.executable,
        "-m",
        "dass_exp",
        *cells(tiny, *KILLED, "hydra/launcher=joblib", "calibration.num_samples=512"),
    ]
    process = subprocess.Popen(
        call, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    limit = time.monotonic() + 120
    while not list(tmp_path.glob("results/hydra/*/*/.slots/*.lock")):
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    while alive(tmp_path):
        assert time.monotonic() < limit, alive(tmp_path)
        time.sleep(0.1)


@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=joblib"]], ids=["one process", "joblib"])
def test_a_killed_sweep_goes_on_and_runs_nothing_twice(tiny, tmp_path, launcher):
    arguments = cells(tiny, *KILLED, *launcher)
    kept = {}
    for records in (2, 5):
        launch_and_kill(arguments, tmp_path, records)
        found = {
            path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("results/runs/*/result.json")
        }
        assert len(found) < 11
        assert kept.items() <= found.items()
        kept = found
    done = command(*arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    finished = {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("results/runs/*/result.json")
    }
    assert len(finished) == 11  # ten cells and their dense record
    assert kept.items() <= finished.items()
    assert done.stderr.count("pruning with dass") == 11 - len(kept)
    assert done.stderr.count("loading the model") <= (2 if launcher else 1)  # once a worker
    cli.main(["alpha", "--results", str(tmp_path / "results")])
    whole = tmp_path / "whole"
    whole.mkdir()
    assert command(*cells(tiny, *KILLED), folder=whole).returncode == 0
    cli.main(["alpha", "--results", str(whole / "results")])
    for ending in ("md", "csv", "tex"):
        first, second = (
            (folder / "results" / "tables" / f"alpha.{ending}").read_text() for folder in (tmp_path, whole)
        )
        assert first == second
    assert json.dumps(load(tmp_path / "results").problems) == "[]"
