"""Masks on disk, one bit per weight, read one linear at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dass_exp.errors import DamagedFileError, UserError
from dass_exp.storage.durable import read_tensors, write_tensors

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
        DamagedFileError: the file does not hold what was written into it.
        UserError: it is missing, or holds no packed masks.
    """
    return {name: mask.unpack() for name, mask in read_packed(path).items()}


def mask_names(path: str | Path) -> list[str]:
    """Return the names of the linears whose masks a file holds, sorted; raises as :func:`load_masks`."""
    return sorted(read_packed(path))


def iter_masks(path: str | Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the named masks in this order, one unpacked at a time; raises as :func:`load_masks`."""
    masks = read_packed(path)
    return ((name, masks[name].unpack()) for name in names)


def read_packed(path: str | Path) -> dict[str, PackedMask]:
    """Map all masks of a file without copying them; raises as :func:`load_masks`.

    The file may be removed or replaced afterwards, but not overwritten in place.
    """
    advice = "run again with save_masks=true rerun=true"
    try:
        tensors, metadata = read_tensors(Path(path), required=False)  # files of earlier versions have no checksum
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}; {advice}") from error
    except OSError as error:
        raise UserError(f"{path}: the masks cannot be read ({error}); {advice}") from error
    if metadata.pop("format", None) != _FORMAT:
        raise UserError(f"{path}: it holds no packed masks; {advice}")
    if metadata.keys() != tensors.keys() or not all(_fits(bits, metadata[name]) for name, bits in tensors.items()):
        raise DamagedFileError(f"{path}: it is damaged: its masks and their numbers of columns do not fit; {advice}")
    return {name: PackedMask(bits, int(metadata[name])) for name, bits in tensors.items()}


def _fits(bits: Tensor, columns: str) -> bool:
    packed = bits.dtype == torch.uint8 and bits.ndim == 2
    return packed and columns.isdecimal() and bits.shape[1] == -(-int(columns) // 8)
