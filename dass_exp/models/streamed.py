"""Load a model's blocks for the engine: they are in memory already, or are read from the checkpoint one by one."""

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


class BlockLoader(Protocol):
    """Provides the weights of a block between ``load`` and ``release``."""

    def load(self, index: int) -> None:
        """Load the weights of block ``index`` unless they are in memory."""

    def release(self, index: int) -> None:
        """Free the weights of block ``index`` if they can be loaded again."""


class BlocksInMemory:
    """All blocks are in memory: there is nothing to load or to release."""

    def load(self, index: int) -> None: ...

    def release(self, index: int) -> None: ...


class StreamedBlocks:
    """The blocks of a model on the meta device, read from its checkpoint; the next one is prefetched.

    Args:
        model: as returned by :func:`empty_model`.
        names: the names of its weights in the checkpoint.
        device: where blocks are computed.
        roles: path of each role's linear, for a family that the table does not know.
    """

    def __init__(
        self, model: nn.Module, names: WeightNames, device: torch.device, roles: Mapping[str, str] | None = None
    ) -> None:
        self._model, self.names, self._device = model, names, device
        decoder = decoder_of(model, roles)
        self._blocks = decoder.blocks
        self._tensors = [
            [f"{prefix}.{name}" for name in block.state_dict()]
            for prefix, block in zip(decoder.names, self._blocks, strict=True)
        ]
        self._loaded: set[int] = set()
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._prefetched: dict[int, Future[dict[str, Tensor]]] = {}

    def load(self, index: int) -> None:
        """Load the weights of block ``index``, and start to read those of the next block.

        Raises:
            UserError: its file is missing or damaged.
        """
        if index in self._loaded:
            return
        reading = self._prefetched.pop(index, None) or self._read(index)
        for name, tensor in reading.result().items():
            _place(self._model, name, self._device, tensor)
        self._loaded.add(index)
        if index + 1 < len(self._blocks):
            self._prefetched[index + 1] = self._read(index + 1)

    def release(self, index: int) -> None:
        """Free the weights of block ``index``."""
        self._blocks[index].to("meta")
        self._loaded.discard(index)
        _trim()

    def stop(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(cancel_futures=True)

    def _read(self, index: int) -> Future[dict[str, Tensor]]:
        return self._reader.submit(self.names.read, self._tensors[index])


def _place(model: nn.Module, name: str, device: torch.device, tensor: Tensor) -> None:
    """Make a tensor a weight of the model, without emptying the allocator's cache once per weight."""
    set_module_tensor_to_device(model, name, device, tensor, dtype=tensor.dtype, clear_cache=False)


def _trim() -> None:
    """Return freed memory to the system: the pieces that glibc keeps would grow with each block."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def empty_model(
    build: Callable[[], Any],
    shards: Shards,
    device: torch.device,
    dtype: torch.dtype,
    roles: Mapping[str, str] | None = None,
) -> tuple[Any, WeightNames]:
    """Build a model whose blocks are on the meta device; embedding, norm and head are loaded onto ``device``.

    ``build`` creates it from its config; ``roles`` as in :class:`StreamedBlocks`.

    Raises:
        UserError: the checkpoint does not hold all of the model's tensors, or is quantised.
    """
    with init_empty_weights(include_buffers=False):
        model = build().eval()
    decoder, names = decoder_of(model, roles), WeightNames(model, shards, dtype)
    blocks = tuple(f"{name}." for name in decoder.names)
    for name, tensor in names.read([name for name in names.names if not name.startswith(blocks)]).items():
        _place(model, name, device, tensor)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set)
    return model, names
