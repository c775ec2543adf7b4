"""Write tensors and JSON so that they survive a crash, and raise an OSError on a full disk."""

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
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None, durable: bool = True
) -> None:
    """Write tensors of any device to a safetensors file, in place; if ``durable``, wait until it is on the disk.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with as_os_error(path):
        save_file(on_cpu, path, dict(metadata or {}))
    path.chmod(0o644)  # safetensors makes files that only their owner can read
    if durable:
        fsync(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON like :func:`write_text`."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, content: str) -> Path:
    """Write a text file atomically and durably, creating missing parent folders; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        scratch.write_text(content, encoding="utf-8")
        replace_durably(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def now() -> str:
    """Return the current time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def as_os_error(path: Path) -> Iterator[None]:
    """Turn what safetensors and tokenizers raise on a full disk into an OSError."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    except Exception as error:
        if type(error) is Exception:  # tokenizers have no exception class of their own
            raise OSError(f"{path}: {error}") from error
        raise


def fsync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(scratch: Path, path: Path) -> None:
    """Rename ``scratch`` to ``path`` atomically; both the content and the new name survive a crash."""
    fsync(scratch)
    os.replace(scratch, path)
    with suppress(OSError):  # not every file system can sync a folder
        fsync(path.parent)


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files that killed writers, ours and safetensors', left below a folder."""
    for path in folder.rglob("*") if folder.is_dir() else ():
        if path.is_file() and (path.name.startswith(".tmp") or path.suffix == ".partial"):
            path.unlink(missing_ok=True)
