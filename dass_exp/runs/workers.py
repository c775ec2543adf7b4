"""Divide a machine among the cells that a launcher runs at once: each gets a slot, with its threads and its GPU."""

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

# Hydra warns that joblib.yaml and ray.yaml are checked against the plugins' schemas of these names, as they should be.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/", category=UserWarning)

_LOKY, _LEAK = "joblib.externals.loky.process_executor", "_MAX_MEMORY_LEAK_SIZE"
_SLOT_LOCKS: list[FileLock] = []  # held for the life of this process; the kernel frees the slot of a process that dies


def set_environment() -> None:
    """Set the environment variables of the launchers' configs to fit this machine; the user's own values are kept."""
    # a worker cannot find out the id of a parent that was killed while the worker started
    os.environ["DASS_EXP_LAUNCHER"] = str(os.getpid())
    count = worker_count()
    os.environ.setdefault("DASS_EXP_WORKERS", str(count))
    os.environ.setdefault("DASS_EXP_WORKER_CORES", str(max(1, cores() // count)))
    os.environ.setdefault("DASS_EXP_WORKER_GPUS", str(int(_gpus() > 0)))


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count() -> int:
    """Return how many cells this machine runs at once.

    DASS_EXP_WORKERS, or one per GPU, or without a GPU a quarter of the cores but at least two.

    Raises:
        UserError: DASS_EXP_WORKERS is no number of workers.
    """
    if (value := os.environ.get("DASS_EXP_WORKERS")) is not None:
        if not value.isdecimal() or int(value) < 1:
            raise UserError(f"DASS_EXP_WORKERS={value!r}: expected a whole number of at least 1")
        return int(value)
    return _gpus() or min(cores(), max(2, cores() // 4))


def acquire_slot(launcher: Mapping[str, Any], folder: Path) -> None:
    """Wait for a share of this machine and take it, if the launcher runs several cells on one machine.

    Called by every cell of a sweep with the config of Hydra's launcher and the folder of the sweep. A process keeps the
    slot of its first call until it ends, as it keeps its model.
    """
    if (remote := (launcher.get("ray") or {}).get("remote")) and remote.get("num_cpus"):
        _limit_threads(int(remote["num_cpus"]))  # Ray respects the user's OMP_NUM_THREADS
    slots = _slots(launcher)
    if slots is None or _SLOT_LOCKS:
        return
    if multiprocessing.current_process().name.startswith("Loky"):
        launcher_pid = int(os.environ.get("DASS_EXP_LAUNCHER", os.getppid()))
        threading.Thread(target=_exit_with, args=(launcher_pid,), daemon=True).start()
    slot = _lock_slot(folder / ".slots", slots)
    _limit_threads(cores() // slots)
    if (loky := sys.modules.get(_LOKY)) is not None and hasattr(loky, _LEAK):
        # loky takes the model, which is kept for the next cell, for a memory leak, and would end this worker
        setattr(loky, _LEAK, sys.maxsize)
    if (gpus := _gpus()) > 1:  # untested: this project is developed without several GPUs
        torch.accelerator.set_device_index(slot % gpus)


def _slots(launcher: Mapping[str, Any]) -> int | None:
    """Return how many cells run at once on one machine; None for one, or if the launcher assigns cores (Slurm, Ray)."""
    kind = str(launcher.get("_target_", "")).rsplit(".", 1)[-1]
    if kind == "JoblibLauncher":
        jobs = int(launcher["n_jobs"])
        return max(1, jobs if jobs > 0 else cores() + 1 + jobs)  # as joblib counts: -1 is all cores
    return worker_count() if kind == "LocalLauncher" else None  # submitit's local executor starts all cells at once


def _limit_threads(threads: int) -> None:
    torch.set_num_threads(max(1, min(torch.get_num_threads(), threads)))


def _lock_slot(folder: Path, slots: int) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for slot in range(slots):
            lock = FileLock(folder / f"{slot}.lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            _SLOT_LOCKS.append(lock)
            return slot
        time.sleep(0.2)


def _exit_with(parent: int) -> None:
    """Exit when the launching process is gone: joblib's workers would live on for ever, with their model."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _gpus() -> int:
    return torch.accelerator.device_count()
