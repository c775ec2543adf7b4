"""Masks on disk, one bit a weight: eight times smaller than bools, and read one linear at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dass_exp.errors import UserError
from dass_exp.storage.durable import write_tensors

MASKS = "masks.safetensors"

_FORMAT = "dass_exp masks, packed along the input axis, first weight in the lowest bit"


@dataclass(frozen=True)
class PackedMask:
    """A mask as it lies in the file.

    Args:
        bits: uint8 [out_features, ceil(in_features / 8)], on the CPU.
        columns: in_features.
    """

    bits: Tensor
    columns: int

    @classmethod
    def of(cls, keep: Tensor) -> PackedMask:
        """Pack a bool [out_features, in_features], True where the weight stays."""
        return cls(torch.from_numpy(np.packbits(keep.cpu().numpy(), axis=1, bitorder="little")), keep.shape[1])

    def keep(self) -> Tensor:
        """The mask again: bool [out_features, in_features]."""
        return torch.from_numpy(
            np.unpackbits(self.bits.numpy(), axis=1, count=self.columns, bitorder="little").astype(bool)
        )


def write_masks(masks: Mapping[str, PackedMask], path: Path) -> None:
    """Write masks by the name of their linear, in place.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    columns = {name: str(mask.columns) for name, mask in masks.items()}
    write_tensors({name: mask.bits for name, mask in masks.items()}, path, {"format": _FORMAT, **columns})


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """All masks of a ``masks.safetensors``: bool [out_features, in_features] by linear, True where the weight stays.

    Raises:
        UserError: the file is missing, damaged, or holds no packed masks.
    """
    return dict(each_mask(path, mask_names(path)))


def mask_names(path: str | Path) -> list[str]:
    """The linears that a file holds masks of, sorted.

    Raises:
        UserError: as above.
    """
    with _opened(path) as (file, _):
        return sorted(file.keys())


def each_mask(path: str | Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Some masks of a file with their names, in the order that is asked for, one in memory at a time.

    Raises:
        UserError: as above.
    """
    with _opened(path) as (file, columns):
        for name in names:
            yield name, PackedMask(file.get_tensor(name), int(columns[name])).keep()


def read_packed(path: str | Path) -> dict[str, PackedMask]:
    """All masks of a file as they lie in it: mapped, so that they take no memory of their own. The file may be removed, and must not be written over.

    Raises:
        UserError: as above.
    """
    with _opened(path) as (file, columns):
        return {name: PackedMask(file.get_tensor(name), int(columns[name])) for name in file.keys()}


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, dict[str, str]]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            columns = file.metadata() or {}
            if columns.get("format") != _FORMAT:
                raise UserError(f"{path}: it holds no packed masks; run again with save_masks=true rerun=true")
            yield file, columns
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: the masks cannot be read ({error}); run again with save_masks=true rerun=true"
        ) from error
