"""Read a checkpoint folder tensor by tensor. No file stays open: an open mapping keeps its touched pages in memory."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dass_exp.errors import UserError, one_line
from dass_exp.storage.checksum import require_regular

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Shards:
    """The tensors of a folder of safetensors: one file, or several with an index.

    Raises:
        UserError: a file is missing or damaged, when the folder is opened or a tensor is read; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _files(folder)
        self._shapes: dict[str, list[int]] = {}
        self._dtypes: dict[str, str] = {}
        for file in sorted(set(self._files.values())):
            with _opened(folder, file) as shard:
                names = shard.keys()
                slices = {name: shard.get_slice(name) for name in names}
                self._dtypes |= {name: part.get_dtype() for name, part in slices.items()}
                self._shapes |= {name: part.get_shape() for name, part in slices.items()}
        if missing := sorted(set(self._files) - set(self._shapes)):
            name, file = missing[0], self._files[missing[0]]
            raise UserError(f"model.path={folder}: {file} does not hold {name}, which the index says; fetch it again")

    @property
    def files(self) -> set[str]:
        """The files of all tensors, relative to the folder and inside it."""
        return set(self._files.values())

    @property
    def names(self) -> list[str]:
        """The stored names of all tensors."""
        return list(self._files)

    def shape(self, name: str) -> list[int]:
        """Return the shape of a tensor without reading it."""
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor as safetensors names it: F32, BF16, I8."""
        return self._dtypes[name]

    def equal(self, one: str, other: str) -> bool:
        """Compare two tensors without copying either into memory."""
        with _opened(self.folder, self._files[one]) as first, _opened(self.folder, self._files[other]) as second:
            return torch.equal(first.get_tensor(one), second.get_tensor(other))

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Read tensors into memory of their own, floating-point ones as ``dtype``."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            with _opened(self.folder, file) as shard:
                for name in wanted:
                    tensor = shard.get_tensor(name)
                    tensors[name] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        return tensors


def _files(folder: Path) -> dict[str, str]:
    """Map each tensor to its file. Like transformers, prefer the single file."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        with _opened(folder, SINGLE) as single:
            return dict.fromkeys(single.keys(), SINGLE)
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"model.path={folder}: its {INDEX} cannot be read ({error}); fetch it again") from error
    for file in files.values():
        if PurePath(file).is_absolute() or ".." in PurePath(file).parts:
            raise UserError(f"model.path={folder}: its {INDEX} names {file}, which lies outside of the folder")
    return files


@contextmanager
def _opened(folder: Path, file: str) -> Iterator[Any]:
    try:
        require_regular(folder / file)
        with safe_open(folder / file, framework="pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        reason = f"is damaged ({one_line(error)})" if (folder / file).exists() else "is missing"
        raise UserError(f"model.path={folder}: {file} {reason}; fetch it again") from error
    except (RuntimeError, MemoryError) as error:  # such as a limit of the memory
        raise UserError(f"model.path={folder}: {file} cannot be read ({one_line(error)})") from error
