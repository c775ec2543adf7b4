"""One atomic result.json per run, found again by its key."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from dass_exp.paths import project_root
from dass_exp.storage.durable import settle
from dass_exp.storage.mask_file import MASKS, PackedMask, write_masks
from dass_exp.storage.record_schema import problem_of

_PACKAGES = ("dass_exp", "torch", "transformers", "datasets", "lm_eval", "tokenizers", "numpy")

Record = dict[str, Any]


class RecordStore:
    """The folder of records, ``<results>/runs/<key>/``.

    Args:
        results: the results folder.
    """

    def __init__(self, results: str | Path) -> None:
        self.runs = Path(results) / "runs"

    def path(self, key: str) -> Path:
        """The record of this key, whether it is there or not."""
        return self.runs / key / "result.json"

    def masks(self, key: str) -> Path:
        """The masks of this run, where they were asked for."""
        return self.runs / key / MASKS

    def find(self, key: str) -> Record | None:
        """The finished record of this key, or None. A file that is no record (a hand edit gone wrong) counts as none."""
        try:
            found = json.loads(self.path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found if problem_of(found, key) is None else None

    def records(self) -> list[Record]:
        """All finished records; what is no record is passed over (:mod:`dass_exp.report.load` names it)."""
        found = (self.find(path.parent.name) for path in sorted(self.runs.glob("*/result.json")))
        return [record for record in found if record is not None]

    @contextmanager
    def lock(self, key: str, wait: bool = True) -> Iterator[None]:
        """Hold the key against other processes; the kernel frees it if its owner dies.

        Args:
            key: of a run.
            wait: for whoever holds it.

        Raises:
            Timeout: another process holds it, and ``wait`` is False.
        """
        folder = self.runs / key
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=-1 if wait else 0):
            yield

    def write(self, record: Record, beside: Mapping[str, Any], masks: Mapping[str, PackedMask] | None = None) -> Path:
        """Write a finished record, last of all its files and atomically.

        Args:
            record: with its ``key``.
            beside: long content by file name, written as JSON beside the record.
            masks: by linear.

        Raises:
            TypeError: it is no record that could be found again.
        """
        if (problem := problem_of(record, record["key"])) is not None:
            raise TypeError(f"record {record['key']}: {problem}")
        folder = self.runs / record["key"]
        folder.mkdir(parents=True, exist_ok=True)
        if masks is not None:
            scratch = folder / f"{MASKS}.partial"
            try:
                write_masks(masks, scratch)
                settle(scratch, self.masks(record["key"]))
            finally:
                scratch.unlink(missing_ok=True)
        for name, content in beside.items():
            write_json(folder / name, content)
        write_json(self.path(record["key"]), record)
        (folder / "failed.json").unlink(missing_ok=True)
        return self.path(record["key"])

    @contextmanager
    def noting_failure(self, key: str, config: Mapping[str, Any]) -> Iterator[None]:
        """Leave a failed.json and re-raise if what runs inside fails; a record that was there stays."""
        try:
            yield
        except Exception as error:
            content = {
                "key": key,
                "created": now(),
                "config": config,
                "error": str(error),
                "type": type(error).__name__,
            }
            with suppress(OSError):  # a full disk must not hide what it did
                write_json(self.runs / key / "failed.json", {**content, "traceback": traceback.format_exc()})
            raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name, make it durable, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        settle(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment() -> dict[str, Any]:
    """Versions, processor, threads and commit; nothing that names a person or a secret."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        **{name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None
        if (changes := _git("status", "--porcelain", "--untracked-files=no")) is None
        else bool(changes),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that the code runs from; None where there is none."""
    if not (project_root() / "pyproject.toml").is_file():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(project_root()), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


class PeakMemory:
    """Peak resident memory from its creation on, and peak memory of the GPU where there is one."""

    def __init__(self) -> None:
        with suppress(OSError):  # 5 resets the kernel's high-water mark of this process
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> dict[str, int | None]:
        """``peak_rss_bytes`` and ``peak_gpu_bytes``."""
        gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        return {"peak_rss_bytes": _peak_rss(), "peak_gpu_bytes": gpu}


def _peak_rss() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
