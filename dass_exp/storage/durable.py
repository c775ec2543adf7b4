"""Tensors written to one safetensors file: durable, and a full disk raises what a full disk raises elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None, durable: bool = True
) -> None:
    """Write tensors of any device to ``path``, in place.

    Args:
        tensors: by name.
        path: of the file; one that is there is written over.
        about: the file's metadata.
        durable: wait until they are on the disk.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    with as_os_error(path):
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, dict(about or {})
        )
    path.chmod(0o644)  # safetensors makes files that only their owner can read
    if durable:
        sync(path)


@contextmanager
def as_os_error(path: Path) -> Iterator[None]:
    """What safetensors and tokenizers raise on a full disk is their own."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    except Exception as error:
        if type(error) is Exception:  # tokenizers have no kind of their own
            raise OSError(f"{path}: {error}") from error
        raise


def sync(path: Path) -> None:
    """Wait until a file is on the disk, or the names in a folder."""
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def settle(scratch: Path, path: Path) -> None:
    """Give a file that was written under another name its own, durably."""
    sync(scratch)
    os.replace(scratch, path)
    with suppress(OSError):  # not every file system lets a folder be synced
        sync(path.parent)


def remove_strays(folder: Path) -> None:
    """Remove what writers that were killed left below a folder, under the names that safetensors and this project write to first."""
    for path in folder.rglob("*") if folder.is_dir() else ():
        if path.is_file() and (path.name.startswith(".tmp") or path.suffix == ".partial"):
            path.unlink(missing_ok=True)


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
