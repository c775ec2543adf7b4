"""Where activations wait between one block and the next: on their device, in the memory of the processor, or on the disk."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dass_exp.errors import one_of
from dass_exp.storage.durable import write_tensors

CACHES = ("device", "cpu", "disk")


@dataclass(frozen=True)
class CachedTensor:
    """A tensor that waits.

    Args:
        at_rest: gives it where it waits: a tensor of a file is mapped, not read.
        device: where it is wanted.
    """

    at_rest: Callable[[], Tensor]
    device: torch.device

    def get(self) -> Tensor:
        """The tensor on its device."""
        return self.at_rest().to(self.device)


class Cache:
    """Where tensors wait.

    Args:
        kind: ``device``, ``cpu`` or ``disk``.
        folder: of the files; it is made when the first is written.

    Raises:
        UserError: the kind is none of these.
        ValueError: files are to have no folder.
    """

    def __init__(self, kind: str = "device", folder: Path | None = None) -> None:
        one_of("calibration.cache", kind, CACHES)
        if kind == "disk" and folder is None:
            raise ValueError("tensors that wait on the disk need a folder")
        self._kind, self._folder, self._numbers = kind, folder, count()

    def hold(self, tensor: Tensor) -> CachedTensor:
        """Put a tensor away; it goes with the last reference to what this returns.

        Raises:
            OSError: the disk is full.
        """
        if self._kind == "disk" and self._folder is not None:
            return self._filed(tensor, self._folder)
        here = tensor.cpu() if self._kind == "cpu" else tensor
        return CachedTensor(lambda: here, tensor.device)

    def _filed(self, tensor: Tensor, folder: Path) -> CachedTensor:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{next(self._numbers):08d}.safetensors"
        write_tensors({"waiting": tensor}, path, durable=False)

        def mapped() -> Tensor:
            with safe_open(path, framework="pt") as file:
                found: Tensor = file.get_tensor("waiting")
                return found

        held = CachedTensor(mapped, tensor.device)
        weakref.finalize(held, path.unlink, missing_ok=True)
        return held


ON_DEVICE = Cache()
