"""The software and hardware of this process, and its peak memory."""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dass_exp.paths import project_root

_PACKAGES = ("dass_exp", "torch", "transformers", "datasets", "lm_eval", "tokenizers", "numpy")


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by torch's newer interface, backend by backend
        return str(torch.backends.cuda.matmul.fp32_precision)


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Return versions, processor, threads and commit; nothing that names a person or a secret.

    ``device`` is what was computed on: without it, or on a CPU, no GPU is named.
    """
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        **{name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else None,
        "gpu_index": _gpu_index(device),
        "float32_matmul_precision": _matmul_precision(),  # highest: no TF32
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
    }


def _gpu_index(device: torch.device | None) -> int | None:
    if device is None or device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


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
    """Return what git prints for the checkout that the code runs from; None without a checkout."""
    if not (project_root() / "pyproject.toml").is_file():
        return None
    command = ["git", "-C", str(project_root()), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class PeakMemory:
    """Peak resident memory since its creation, and peak memory of the GPU if ``device`` is one."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._gpu = device if device is not None and device.type == "cuda" else None
        with suppress(OSError):  # 5 resets the kernel's high-water mark of this process
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        if self._gpu is not None:
            torch.cuda.reset_peak_memory_stats(self._gpu)

    def read(self) -> dict[str, int | None]:
        """Return ``peak_rss_bytes`` and ``peak_gpu_bytes``."""
        gpu = None if self._gpu is None else torch.cuda.max_memory_allocated(self._gpu)
        return {"peak_rss_bytes": process_memory("VmHWM") or _peak_rss(), "peak_gpu_bytes": gpu}


def process_memory(field: str, process: int | str = "self") -> int | None:
    """Return a field of a process's memory in bytes, from /proc; None if there is no such process or no /proc."""
    with suppress(OSError, StopIteration):
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))
    return None


def _peak_rss() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
