"""Store activations between two blocks: on their device, in CPU memory or on disk."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from dass_exp.config.choices import check_choice
from dass_exp.storage.tensor_file import read_tensors, write_tensors


@dataclass(frozen=True)
class CachedTensor:
    """A stored tensor.

    Args:
        read: returns the tensor where it is stored; one on disk is memory-mapped, and a DamagedFileError is raised
            if its file does not hold what was written.
        device: where it is needed.
        written: what has happened once the stored numbers are complete; None if they already are.
    """

    read: Callable[[], Tensor]
    device: torch.device
    written: torch.cuda.Event | None = None

    def stored(self) -> Tensor:
        """Return the tensor where it is stored, complete."""
        if self.written is not None:
            self.written.synchronize()
        return self.read()

    def load(self) -> Tensor:
        """Return the tensor on its device."""
        # the device works in order: it has written the numbers before it reads them, and the host need not wait
        return self.read().to(self.device, non_blocking=self.written is not None)


class ActivationCache:
    """Stores tensors on their ``device``, in ``cpu`` memory, or on ``disk`` in a folder that is created on demand."""

    def __init__(self, kind: str = "device", folder: Path | None = None) -> None:
        check_choice("calibration.cache", kind)
        if kind == "disk" and folder is None:
            raise ValueError("an activation cache on disk needs a folder")
        self._kind, self._folder, self._numbers = kind, folder, count()

    def store(self, tensor: Tensor) -> CachedTensor:
        """Store a tensor until the last reference to the returned object is gone.

        Raises:
            OSError: the disk is full.
        """
        if self._kind == "disk" and self._folder is not None:
            return self._write(tensor, self._folder)
        if self._kind == "cpu" and tensor.device.type == "cuda" and (host := _page_locked(tensor)) is not None:
            host.copy_(tensor, non_blocking=True)
            written = torch.cuda.Event()
            written.record(torch.cuda.current_stream(tensor.device))
            return CachedTensor(lambda: host, tensor.device, written)
        stored = tensor.cpu() if self._kind == "cpu" else tensor
        return CachedTensor(lambda: stored, tensor.device)

    def _write(self, tensor: Tensor, folder: Path) -> CachedTensor:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{next(self._numbers):08d}.safetensors"
        write_tensors({"activation": tensor}, path, durable=False)

        cached = CachedTensor(lambda: read_tensors(path)[0]["activation"], tensor.device)
        weakref.finalize(cached, path.unlink, missing_ok=True)
        return cached


def _page_locked(tensor: Tensor) -> Tensor | None:
    """Return host memory for a tensor that a GPU can copy to while the host goes on; None if there is no more."""
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    except RuntimeError:  # limited by the system, below the memory that is free
        return None


ON_DEVICE = ActivationCache()
