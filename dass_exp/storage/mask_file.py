"""Masks on disk, one bit per weight, read one linear at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dass_exp.errors import DamagedFileError, UserError
from dass_exp.paths import MASKS
from dass_exp.storage.tensor_file import read_tensors, write_tensors

_ORDER = {0: "/order of rows", 1: "/order of columns"}  # endings of the names of orders, by axis
_FORMAT = "dass_exp masks, packed along the input axis, first weight in the lowest bit"


@dataclass(frozen=True)
class PackedMask:
    """A mask as it is stored.

    Args:
        bits: uint8 [out_features, ceil(in_features / 8)], on the CPU.
        columns: in_features.
        order: the order of the model's neurons along ``axis``, int32: index i was index ``order[i]`` of the dense
            model; None if they stand as they did.
        axis: 0 for rows, 1 for columns.
    """

    bits: Tensor
    columns: int
    order: Tensor | None = None
    axis: int = 0

    @classmethod
    def pack(cls, keep: Tensor, order: Tensor | None = None, axis: int = 0) -> PackedMask:
        """Pack a bool [out_features, in_features], True where the weight stays."""
        bits = torch.from_numpy(np.packbits(keep.cpu().numpy(), axis=1, bitorder="little"))
        return cls(bits, keep.shape[1], None if order is None else order.cpu().int(), axis)

    def unpack(self, in_dense_order: bool = False) -> Tensor:
        """Return the mask: bool [out_features, in_features], True where the weight stays.

        Args:
            in_dense_order: put the neurons back where they stand in the dense model, to compare it with other masks.
        """
        unpacked = np.unpackbits(self.bits.numpy(), axis=1, count=self.columns, bitorder="little")
        keep = torch.from_numpy(unpacked.astype(bool))
        if self.order is None or not in_dense_order:
            return keep
        return torch.empty_like(keep).index_copy_(self.axis, self.order.long(), keep)


def write_masks(masks: Mapping[str, PackedMask], path: Path) -> None:
    """Write masks, by the name of their linear, in place; raises as :func:`write_tensors`."""
    columns = {name: str(mask.columns) for name, mask in masks.items()}
    orders = {f"{name}{_ORDER[mask.axis]}": mask.order for name, mask in masks.items() if mask.order is not None}
    bits = {name: mask.bits for name, mask in masks.items()}
    write_tensors(bits | orders, path, {"format": _FORMAT, **columns})


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """Load a ``masks.safetensors``, or that of a folder: bool [out_features, in_features] by linear, True: it stays.

    They fit the pruned model: if its neurons were put in another order, so are those of the masks.

    Raises:
        DamagedFileError: the file does not hold what was written into it.
        UserError: it is missing, or holds no packed masks.
    """
    file = Path(path) / MASKS if Path(path).is_dir() else path
    return {name: mask.unpack() for name, mask in read_packed(file).items()}


def mask_names(path: str | Path) -> list[str]:
    """Return the names of the linears whose masks a file holds, sorted; raises as :func:`load_masks`."""
    return sorted(read_packed(path))


def iter_masks(path: str | Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the named masks, one unpacked at a time, with their neurons as they stand in the dense model.

    Raises as :func:`load_masks`.
    """
    masks = read_packed(path)
    return ((name, masks[name].unpack(in_dense_order=True)) for name in names)


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
    orders = {name: tensors.pop(name) for name in list(tensors) if name.endswith(tuple(_ORDER.values()))}
    if metadata.keys() != tensors.keys() or not all(_fits(bits, metadata[name]) for name, bits in tensors.items()):
        raise DamagedFileError(f"{path}: it is damaged: its masks and their numbers of columns do not fit; {advice}")
    masks = {name: PackedMask(bits, int(metadata[name])) for name, bits in tensors.items()}
    for axis, ending in _ORDER.items():
        of_axis = {name.removesuffix(ending): order for name, order in orders.items() if name.endswith(ending)}
        masks |= {name: replace(masks[name], order=order, axis=axis) for name, order in of_axis.items()}
    return masks


def _fits(bits: Tensor, columns: str) -> bool:
    packed = bits.dtype == torch.uint8 and bits.ndim == 2
    return packed and columns.isdecimal() and bits.shape[1] == -(-int(columns) // 8)
