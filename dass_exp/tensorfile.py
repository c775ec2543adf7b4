"""Tensors written to one safetensors file: durable, and a full disk raises what a full disk raises elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None, durable: bool = True) -> None:
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
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, dict(about or {}))
    path.chmod(0o644)  # safetensors makes files that only their owner can read
    if durable:
        sync(path)


@contextmanager
def as_os_error(path: Path) -> Iterator[None]:
    """What safetensors raises on a full disk is its own."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
