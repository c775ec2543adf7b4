"""Where the engine gets a model's blocks from: memory, or a checkpoint that is read block by block."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from dass_exp.models.decoder import decoder_of
from dass_exp.models.shards import Shards
from dass_exp.models.weight_names import WeightNames


class Source(Protocol):
    """Blocks that are in memory between ``open`` and ``close``."""

    def open(self, index: int) -> None:
        """See that the weights of block ``index`` are in memory; they may be already."""

    def close(self, index: int) -> None:
        """Block ``index`` is not needed any more."""


class BlocksInMemory:
    """All blocks are in memory."""

    def open(self, index: int) -> None:
        """Nothing to do."""

    def close(self, index: int) -> None:
        """Nothing to do."""


def _forget(index: int, weights: Mapping[str, Tensor]) -> None:
    del index, weights


class StreamedBlocks:
    """The blocks of a model that was built empty, read from its checkpoint one after the other, the next one while this one computes.

    Args:
        model: as :func:`empty_model` gives it.
        layout: of its checkpoint.
        device: where a block computes.
        roles: the roles of a family that the table does not know.
        keep: (an attribute too) handed the weights of each block, by full name, when it is closed, before they go.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: WeightNames,
        device: torch.device,
        keep: Callable[[int, Mapping[str, Tensor]], None] = _forget,
        roles: Mapping[str, str] | None = None,
    ) -> None:
        self._model, self.layout, self._device = model, layout, device
        self.keep = keep
        decoder = decoder_of(model, roles)
        self._blocks, self._names = decoder.blocks, decoder.names
        self._wanted = [
            [f"{name}.{own}" for own in block.state_dict()]
            for name, block in zip(self._names, self._blocks, strict=True)
        ]
        self._open: set[int] = set()
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._ahead: dict[int, Future[dict[str, Tensor]]] = {}

    def open(self, index: int) -> None:
        """Put the weights of block ``index`` in their places, and start to read the next block's.

        Raises:
            UserError: its file is missing or damaged.
        """
        if index in self._open:
            return
        found = self._ahead.pop(index, None) or self._read(index)
        for name, tensor in found.result().items():
            set_module_tensor_to_device(self._model, name, self._device, tensor, dtype=tensor.dtype)
        self._open.add(index)
        if index + 1 < len(self._blocks):
            self._ahead[index + 1] = self._read(index + 1)

    def close(self, index: int) -> None:
        """Hand the weights of block ``index`` on and let them go."""
        block = self._blocks[index]
        self.keep(index, {f"{self._names[index]}.{name}": tensor for name, tensor in block.state_dict().items()})
        block.to("meta")
        self._open.discard(index)
        _trim()

    def stop(self) -> None:
        """Read no further."""
        self._reader.shutdown(cancel_futures=True)

    def _read(self, index: int) -> Future[dict[str, Tensor]]:
        return self._reader.submit(self.layout.read, self._wanted[index])


def _trim() -> None:
    """Give freed memory back: what glibc keeps in pieces between one block and the next would grow with each block. Other C libraries keep nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def empty_model(
    build: Callable[[], Any],
    shards: Shards,
    device: torch.device,
    dtype: torch.dtype,
    roles: Mapping[str, str] | None = None,
) -> tuple[Any, WeightNames]:
    """A model with everything but its blocks in memory: embedding, norm and head are read, the blocks have shapes only.

    Args:
        build: makes the model from its config.
        shards: of its checkpoint.
        device: where it computes.
        dtype: in which it computes.
        roles: the roles of a family that the table does not know.

    Returns:
        the model, and how the checkpoint holds it.

    Raises:
        UserError: the checkpoint does not hold all of the model's tensors, or is quantised.
    """
    with init_empty_weights(include_buffers=False):
        model = build().eval()
    decoder, layout = decoder_of(model, roles), WeightNames(model, shards, dtype)
    inside = tuple(f"{name}." for name in decoder.names)
    for name, tensor in layout.read([name for name in layout.names if not name.startswith(inside)]).items():
        set_module_tensor_to_device(model, name, device, tensor, dtype=tensor.dtype)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set)
    return model, layout
