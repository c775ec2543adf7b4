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
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from dass_exp.decoder import decoder_of
from dass_exp.errors import UserError
from dass_exp.shards import Shards


class Source(Protocol):
    """Blocks that are in memory between ``open`` and ``close``."""

    def open(self, index: int) -> None:
        """See that the weights of block ``index`` are in memory; they may be already."""

    def close(self, index: int) -> None:
        """Block ``index`` is not needed any more."""


class Resident:
    """All blocks are in memory."""

    def open(self, index: int) -> None:
        """Nothing to do."""

    def close(self, index: int) -> None:
        """Nothing to do."""


def _forget(index: int, weights: Mapping[str, Tensor]) -> None:
    del index, weights


class Streamed:
    """The blocks of a model that was built empty, read from its checkpoint one after the other, the next one while this one computes.

    Args:
        model: as :func:`empty_model` gives it.
        shards: of its checkpoint.
        device: where a block computes.
        dtype: in which it computes.
        roles: the roles of a family that the table does not know.
        keep: (an attribute too) handed the weights of each block, by full name, when it is closed, before they go.
    """

    def __init__(
        self,
        model: nn.Module,
        shards: Shards,
        device: torch.device,
        dtype: torch.dtype,
        keep: Callable[[int, Mapping[str, Tensor]], None] = _forget,
        roles: Mapping[str, str] | None = None,
    ) -> None:
        self._model, self._shards, self._device, self._dtype = model, shards, device, dtype
        self.keep = keep
        decoder = decoder_of(model, roles)
        self._blocks, self._names = decoder.blocks, decoder.names
        self.stored = stored_names(model, shards)
        self._wanted = [{name: other for name, other in self.stored.items() if name.startswith(f"{block}.")} for block in self._names]
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
            set_module_tensor_to_device(self._model, name, self._device, tensor)
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
        wanted = self._wanted[index]

        def read() -> dict[str, Tensor]:
            found = self._shards.read(wanted.values(), self._dtype)
            return {name: found[stored] for name, stored in wanted.items()}

        return self._reader.submit(read)


def _trim() -> None:
    """Give freed memory back: what glibc keeps in pieces between one block and the next would grow with each block. Other C libraries keep nothing."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def empty_model(build: Callable[[], Any], shards: Shards, device: torch.device, dtype: torch.dtype, roles: Mapping[str, str] | None = None) -> Any:
    """A model with everything but its blocks in memory: embedding, norm and head are read, the blocks have shapes only.

    Args:
        build: makes the model from its config.
        shards: of its checkpoint.
        device: where it computes.
        dtype: in which it computes.
        roles: the roles of a family that the table does not know.

    Raises:
        UserError: the checkpoint does not hold the model's tensors under the names that the model has for them (mixtures of experts, whose experts
            transformers joins while it loads them, are such).
    """
    with init_empty_weights(include_buffers=False):
        model = build().eval()
    decoder = decoder_of(model, roles)
    inside = tuple(f"{name}." for name in decoder.names)
    outside = {name: stored for name, stored in stored_names(model, shards).items() if not name.startswith(inside)}
    found = shards.read(outside.values(), dtype)
    for name, stored in outside.items():
        set_module_tensor_to_device(model, name, device, found[stored])
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set)
    return model


def stored_names(model: Any, shards: Shards) -> dict[str, str]:
    """The stored name of each tensor of a model by the model's own name for it, as transformers itself translates them.

    Raises:
        UserError: a tensor is not there, or is stored in pieces.
    """
    transforms, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    found: dict[str, str] = {}
    for stored in shards.names:
        name, pieces = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        if pieces is None and name in state:
            found[name] = stored
    tied = getattr(model, "all_tied_weights_keys", {})
    told = "set model.placement=resident"
    if getattr(model.config, "quantization_config", None) is not None or shards.quantised:
        raise UserError(f"model.placement=stream: the checkpoint {shards.folder} is quantised, which only transformers itself can undo; {told}")
    if double := [name for name in tied if name in found]:
        raise UserError(f"model.placement=stream: the checkpoint {shards.folder} stores {double[0]} beside the tensor that it is tied to; {told}")
    if missing := [name for name in state if name not in found and name not in tied]:
        raise UserError(
            f"model.placement=stream: the checkpoint {shards.folder} has no tensor {missing[0]} as the model has it (experts are stored one by one); {told}"
        )
    return found
