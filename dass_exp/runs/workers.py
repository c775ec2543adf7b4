"""The share of a machine that a cell gets where a launcher runs several at once: a slot, its threads, its GPU."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from dass_exp.errors import UserError

# conf/hydra/launcher/joblib.yaml and ray.yaml are checked against the plugins' own schemas of these names, as they should be: Hydra warns of it.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/", category=UserWarning)

_LOKY, _LEAK = "joblib.externals.loky.process_executor", "_MAX_MEMORY_LEAK_SIZE"
_HELD: list[FileLock] = []  # for the life of this process; the kernel frees the slot of one that dies


def announce() -> None:
    """Tell the launchers' configs, which read the environment, what fits this machine; what the user has set there stays.

    Raises:
        UserError: DASS_EXP_WORKERS is no number of workers.
    """
    os.environ["DASS_EXP_LAUNCHER"] = str(
        os.getpid()
    )  # whom workers follow: one that is still starting when its parent is killed cannot tell it any more
    fitting = workers()
    known = {
        "DASS_EXP_WORKERS": fitting,
        "DASS_EXP_WORKER_CORES": max(1, cores() // fitting),
        "DASS_EXP_WORKER_GPUS": int(_gpus() > 0),
    }
    for name, value in known.items():
        os.environ.setdefault(name, str(value))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers() -> int:
    """How many cells this machine runs at once: DASS_EXP_WORKERS, or one per GPU, or without one a quarter of the cores and at least two.

    Raises:
        UserError: DASS_EXP_WORKERS is no number of workers.
    """
    if (asked := os.environ.get("DASS_EXP_WORKERS")) is not None:
        if not asked.isdecimal() or int(asked) < 1:
            raise UserError(f"DASS_EXP_WORKERS={asked!r}: expected a whole number of at least 1")
        return int(asked)
    return _gpus() or min(cores(), max(2, cores() // 4))


def join(launcher: Mapping[str, Any], folder: Path) -> None:
    """Take a share of this machine, if the launcher is one that runs several cells on it; wait until there is one.

    Called by every cell of a sweep: the first call of a process counts, and its share lasts as long as the process, since so does its model.

    Args:
        launcher: the config of Hydra's launcher.
        folder: of the sweep, the same for all its cells.
    """
    if (remote := (launcher.get("ray") or {}).get("remote")) and remote.get("num_cpus"):
        _at_most(int(remote["num_cpus"]))  # Ray leaves an OMP_NUM_THREADS of the user's as it is
    slots = _slots(launcher)
    if slots is None or _HELD:
        return
    if multiprocessing.current_process().name.startswith("Loky"):
        threading.Thread(
            target=_follow, args=(int(os.environ.get("DASS_EXP_LAUNCHER", os.getppid())),), daemon=True
        ).start()
    slot = _take(folder / ".slots", slots)
    _at_most(cores() // slots)
    if (loky := sys.modules.get(_LOKY)) is not None and hasattr(loky, _LEAK):
        setattr(
            loky, _LEAK, sys.maxsize
        )  # it takes the model, which stays for the next cell, for a leak, and would end this worker
    if (gpus := _gpus()) > 1:  # not run here: this project is developed without a GPU
        torch.accelerator.set_device_index(slot % gpus)


def _slots(launcher: Mapping[str, Any]) -> int | None:
    """How many cells run at once on one machine; None where the launcher runs one, or hands out cores and GPUs itself (Slurm, Ray)."""
    kind = str(launcher.get("_target_", "")).rsplit(".", 1)[-1]
    if kind == "JoblibLauncher":
        asked = int(launcher["n_jobs"])
        return max(1, asked if asked > 0 else cores() + 1 + asked)  # as joblib counts: -1 is all cores
    return workers() if kind == "LocalLauncher" else None  # submitit's local executor starts all cells at once


def _at_most(threads: int) -> None:
    torch.set_num_threads(max(1, min(torch.get_num_threads(), threads)))


def _take(folder: Path, slots: int) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for slot in range(slots):
            lock = FileLock(folder / f"{slot}.lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            _HELD.append(lock)
            return slot
        time.sleep(0.2)


def _follow(parent: int) -> None:
    """End this worker with the sweep: joblib's live on for ever, with their model, when the process that launched them is killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _gpus() -> int:
    return torch.accelerator.device_count()
