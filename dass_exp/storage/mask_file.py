"""Masks on disk, one bit per weight, read one linear at a time."""

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
    """A mask as it is stored."""

    bits: Tensor  # uint8 [out_features, ceil(in_features / 8)], on the CPU
    columns: int  # in_features

    @classmethod
    def pack(cls, keep: Tensor) -> PackedMask:
        """Pack a bool [out_features, in_features], True where the weight stays."""
        return cls(torch.from_numpy(np.packbits(keep.cpu().numpy(), axis=1, bitorder="little")), keep.shape[1])

    def unpack(self) -> Tensor:
        """Return the mask: bool [out_features, in_features], True where the weight stays."""
        keep = np.unpackbits(self.bits.numpy(), axis=1, count=self.columns, bitorder="little")
        return torch.from_numpy(keep.astype(bool))


def write_masks(masks: Mapping[str, PackedMask], path: Path) -> None:
    """Write masks, by the name of their linear, in place; raises as :func:`write_tensors`."""
    columns = {name: str(mask.columns) for name, mask in masks.items()}
    write_tensors({name: mask.bits for name, mask in masks.items()}, path, {"format": _FORMAT, **columns})


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """Load a ``masks.safetensors``: bool [out_features, in_features] by linear, True where the weight stays.

    Raises:
        UserError: the file is missing, damaged, or holds no packed masks.
    """
    return dict(iter_masks(path, mask_names(path)))


def mask_names(path: str | Path) -> list[str]:
    """Return the names of the linears whose masks a file holds, sorted; raises as :func:`load_masks`."""
    with _opened(path) as (file, _):
        return sorted(file.keys())


def iter_masks(path: str | Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the named masks in this order, one in memory at a time; raises as :func:`load_masks`."""
    with _opened(path) as (file, columns):
        for name in names:
            yield name, PackedMask(file.get_tensor(name), int(columns[name])).unpack()


def read_packed(path: str | Path) -> dict[str, PackedMask]:
    """Map all masks of a file without copying them; raises as :func:`load_masks`.

    The file may be removed afterwards, but not overwritten.
    """
    with _opened(path) as (file, columns):
        names = file.keys()
        return {name: PackedMask(file.get_tensor(name), int(columns[name])) for name in names}


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, dict[str, str]]]:
    advice = "run again with save_masks=true rerun=true"
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UserError(f"{path}: it holds no packed masks; {advice}")
            yield file, metadata
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: the masks cannot be read ({error}); {advice}") from error
