"""Weights of a checkpoint folder, some at a time. No file stays open: an open mapping keeps every page that was touched in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dass_exp.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Shards:
    """The tensors of a folder of safetensors, one file or several with an index.

    Args:
        folder: of the checkpoint.

    Raises:
        UserError: it holds no such file, or one that its index names is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _files(folder)
        self._shapes: dict[str, list[int]] = {}
        self._small = False
        for file in sorted(set(self._files.values())):
            self._shapes |= self._look_into(file)
        if missing := sorted(set(self._files) - set(self._shapes)):
            raise UserError(
                f"model.path={folder}: {self._files[missing[0]]} does not hold {missing[0]}, which the index says; fetch it again"
            )

    @property
    def quantised(self) -> bool:
        """Whether floating numbers of one byte are among them, which mean nothing without their scales."""
        return self._small

    @property
    def names(self) -> list[str]:
        """Of all tensors, as they are stored."""
        return list(self._files)

    def shape(self, name: str) -> list[int]:
        """Of a tensor."""
        return self._shapes[name]

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers; neither is read into memory of its own.

        Raises:
            UserError: as :meth:`read`.
        """
        files = [self._files[name] for name in (one, other)]
        try:
            with (
                safe_open(self.folder / files[0], framework="pt") as first,
                safe_open(self.folder / files[1], framework="pt") as second,
            ):
                return torch.equal(first.get_tensor(one), second.get_tensor(other))
        except (OSError, SafetensorError) as error:
            raise _unreadable(self.folder, files[0], error) from error

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Some tensors in memory of their own, floating ones as ``dtype``.

        Raises:
            UserError: a file is missing or damaged; the message names it.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            try:
                with safe_open(self.folder / file, framework="pt") as shard:
                    for name in wanted:
                        tensor = shard.get_tensor(name)
                        kind = dtype if tensor.is_floating_point() else tensor.dtype
                        found[name] = tensor.to(kind, copy=True)  # not the mapping's own memory
            except (OSError, SafetensorError) as error:
                raise _unreadable(self.folder, file, error) from error
        return found

    def _look_into(self, file: str) -> dict[str, list[int]]:
        try:
            with safe_open(self.folder / file, framework="pt") as shard:
                slices = {name: shard.get_slice(name) for name in shard.keys()}
                self._small |= any(part.get_dtype().startswith("F8") for part in slices.values())
                return {name: part.get_shape() for name, part in slices.items()}
        except (OSError, SafetensorError) as error:
            raise _unreadable(self.folder, file, error) from error


def _files(folder: Path) -> dict[str, str]:
    """The file of each tensor."""
    try:
        if (folder / INDEX).is_file() and not (
            folder / SINGLE
        ).is_file():  # transformers, too, takes the single file first
            found = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {str(name): str(file) for name, file in found.items()}
        with safe_open(folder / SINGLE, framework="pt") as single:
            return dict.fromkeys(single.keys(), SINGLE)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"model.path={folder}: its {INDEX} cannot be read ({error}); fetch it again") from error
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, SINGLE, error) from error


def _unreadable(folder: Path, file: str, error: Exception) -> UserError:
    if not (folder / file).exists():
        return UserError(f"model.path={folder}: {file} is missing; fetch it again")
    return UserError(f"model.path={folder}: {file} is damaged ({' '.join(str(error).split())}); fetch it again")
