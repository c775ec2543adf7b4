"""An accelerator that is not there: tensors that say they lie on ``cuda:0`` and hold their numbers on the CPU.

Under :class:`PretendAccelerator` everything that names a CUDA device gives such tensors. They raise where CUDA would,
and they count what CUDA would do: kernels that are launched, and places where the host waits for the device (a number
that is read, a boolean index, a copy between host and device), by the source line of the package that asks for it.
Numbers are those of the CPU, so every result can be compared bit for bit.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

import dass_exp

FREE = 80 << 30  # bytes of memory of a pretended device
_PACKAGE = str(Path(dass_exp.__file__).parent)
aten = torch.ops.aten
# The host reads a number, or the size of the result depends on the numbers.
_WAITING = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.bincount}
_WAITING |= {aten._unique2, aten.unique_dim, aten.unique_consecutive, aten._linalg_eigh, aten.repeat_interleave}
_NO_LAUNCH = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view, aten.lift_fresh}
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
_COPIES = {aten.copy_, aten._to_copy}
# Taken apart by device or with a meta tensor inside, so they run whole.
_WHOLE = {torch.nn.functional.scaled_dot_product_attention, torch.where, torch.linalg.cholesky}


class PretendTensor(Tensor):
    """A tensor whose device is a pretended one, and whose numbers are those of ``host``.

    For torch itself it is a meta tensor: a build without CUDA has no guard for tensors that lie on one.
    """

    host: Tensor
    pretended: torch.device
    is_cuda, is_cpu, is_meta = True, False, False

    @staticmethod
    def __new__(cls, host: Tensor, device: torch.device) -> PretendTensor:
        shape, layout = host.shape, {"strides": host.stride(), "storage_offset": host.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, shape, **layout, dtype=host.dtype, device="meta")

    def __init__(self, host: Tensor, device: torch.device) -> None:
        self.host, self.pretended = host, device

    @property
    def device(self) -> torch.device:
        return self.pretended

    def __repr__(self) -> str:
        return f"PretendTensor({self.host!r}, device={self.device})"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        return PretendAccelerator.active().run(function, args, dict(kwargs or {}))


class PretendAccelerator(TorchFunctionMode):
    """While it is entered, CUDA devices are pretended; ``launches`` and ``waits`` count by ``file:line``."""

    _entered: ClassVar[list[PretendAccelerator]] = []
    current: ClassVar[int] = 0  # the index of a device that is named without one

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._page_locked = WeakTensorKeyDictionary()

    @classmethod
    def active(cls) -> PretendAccelerator:
        return cls._entered[-1]

    def __enter__(self) -> PretendAccelerator:
        self._entered.append(self)
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        self._entered.remove(self)
        super().__exit__(*details)

    def reset(self) -> None:
        self.launches.clear()
        self.waits.clear()

    # --- what names a device

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self._moved(function, *args, **kwargs)
        if function is Tensor.tolist and isinstance(args[0], PretendTensor):
            self.waits[_line()] += 1
            return args[0].host.tolist()
        if function is Tensor.numpy and isinstance(args[0], PretendTensor):
            raise TypeError("can't convert a tensor on cuda to numpy; copy it to the host first")
        if function in _WHOLE and any(isinstance(each, PretendTensor) for each in args):
            return self.run(function, args, kwargs)
        if function is Tensor.__setitem__ and isinstance(args[0], PretendTensor) and not isinstance(args[2], Tensor):
            tensor, index, value = args  # as it stands, the value would become a meta tensor, without its number
            if not any(isinstance(each, Tensor) for each in (index if isinstance(index, tuple) else (index,))):
                return tensor[index].fill_(value)
            args = (tensor, index, torch.tensor(value, dtype=tensor.dtype))
        if kwargs.pop("pin_memory", False):
            made = function(*args, **kwargs)
            self._page_locked[made] = True
            return made
        device = kwargs.get("device")
        if device is not None and is_pretended(torch.device(device)):
            if function is torch.empty:
                planned = function(*args, **{**kwargs, "device": torch.device("meta")})
                if planned.numel() * planned.element_size() > FREE:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
            made = function(*args, **{**kwargs, "device": torch.device("cpu")})
            self.launches[_line()] += 1
            if function in (torch.tensor, torch.as_tensor):  # numbers of the host, copied from ordinary memory
                self.waits[_line()] += 1
            return PretendTensor(made, with_index(torch.device(device)))
        return function(*args, **kwargs)

    def _moved(self, function: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if function is Tensor.cuda:
            device, args = torch.device("cuda", *args), ()
        elif function is Tensor.cpu:
            device, args = torch.device("cpu"), ()
        else:
            if args and isinstance(args[0], Tensor):
                args, kwargs = (), {"device": args[0].device, "dtype": args[0].dtype, **kwargs}
            copied = kwargs.pop("copy", False)
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
            if dtype is not None and dtype != tensor.dtype:
                tensor = function(tensor, dtype)
            kwargs = {"non_blocking": non_blocking, "copy": copied}
        if device is None or with_index(device) == tensor.device or tensor.is_meta:
            return tensor.clone() if kwargs.get("copy") else tensor
        if not kwargs.get("non_blocking") or device.type == "cpu":
            self.waits[_line()] += 1
        return on(host_of(tensor).clone(), with_index(device))

    # --- what runs on a device

    def run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function on the numbers; raise if CUDA would, count what it would do."""
        kind = getattr(function, "overloadpacket", function)
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        assert not any(tensor.is_meta for tensor in tensors), f"{function}: a number was lost in a meta tensor"
        device = self._device_of(kind, tensors, args)
        self._count(kind, function, tensors, args)
        outer = {id(tensor.host): tensor for tensor in tensors if isinstance(tensor, PretendTensor)}
        if (named := kwargs.get("device")) is not None and torch.device(named).type != "meta":
            device = with_index(torch.device(named))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        if kind is aten.histc:  # of integers on a GPU only: transformers counts the tokens of experts so
            return on(function(args[0].host.float(), *args[1:]).to(args[0].dtype), device)
        results = function(*tree_map(host_of, args), **tree_map(host_of, kwargs))

        def wrapped(result: Any) -> Any:
            if not isinstance(result, Tensor):
                return result
            if (same := outer.get(id(result))) is not None:
                assert same.shape == result.shape, f"{function} changes the shape in place, which is not pretended"
                return same
            return result if any(each is result for each in tensors) else on(result, device)

        return tree_map(wrapped, results)

    def _device_of(self, kind: Any, tensors: Sequence[Tensor], args: tuple[Any, ...]) -> torch.device:
        """Return the device of an operation.

        Raises:
            RuntimeError: its tensors lie on several, and CUDA would not take that.
        """
        devices = {tensor.device for tensor in tensors if is_pretended(tensor.device)}
        others = [tensor for tensor in tensors if not is_pretended(tensor.device)]
        if kind in _INDEXING:
            others = [args[0]] if not is_pretended(args[0].device) else []
        if len(devices) > 1 and kind not in _COPIES:
            raise RuntimeError(f"{kind}: tensors on {', '.join(sorted(map(str, devices)))}, expected one device")
        if kind not in _COPIES and any(tensor.ndim for tensor in others):
            raise RuntimeError(f"{kind}: tensors on {devices.pop()} and {others[0].device}, expected one device")
        return args[0].device if kind in _COPIES else next(iter(devices))

    def _count(self, kind: Any, function: Any, tensors: Sequence[Tensor], args: tuple[Any, ...]) -> None:
        line = _line()
        if kind not in _NO_LAUNCH and not _is_view(function):
            self.launches[line] += 1
        masks = kind in _INDEXING and any(
            each.dtype in (torch.bool, torch.uint8) for each in args[1] if each is not None
        )
        filled = kind is not aten.index and masks and args[2].numel() == 1  # becomes masked_fill
        copied = kind in _COPIES and len({tensor.device for tensor in tensors}) > 1
        copied &= not any(tensor in self._page_locked for tensor in tensors)
        if kind in _WAITING or (masks and not filled) or copied:
            self.waits[line] += 1


def is_pretended(device: torch.device) -> bool:
    return device.type == "cuda"


def with_index(device: torch.device) -> torch.device:
    index = PretendAccelerator.current if device.index is None else device.index
    return torch.device("cuda", index) if is_pretended(device) else device


def host_of(value: Any) -> Any:
    return value.host if isinstance(value, PretendTensor) else value


def on(host: Tensor, device: torch.device) -> Tensor:
    """Return these numbers on a device, which may be the CPU itself."""
    return PretendTensor(host, device) if is_pretended(device) else host


def _is_view(function: Any) -> bool:
    returns = getattr(getattr(function, "_schema", None), "returns", ())
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def _line() -> str:
    """Return the line of the package that is running, ``engine/prune.py:12``; ``elsewhere`` if there is none."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            return f"{Path(frame.f_code.co_filename).relative_to(_PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class CurrentDevice:
    """``torch.cuda.device``: a device that is the current one for a while."""

    def __init__(self, device: Any) -> None:
        self.index = device if isinstance(device, int) else with_index(torch.device(device)).index

    def __enter__(self) -> None:
        self.before, PretendAccelerator.current = PretendAccelerator.current, self.index

    def __exit__(self, *details: Any) -> None:
        PretendAccelerator.current = self.before


def make_current(device: Any) -> None:
    PretendAccelerator.current = CurrentDevice(device).index


def pretend(monkeypatch: pytest.MonkeyPatch, count: int = 2) -> None:
    """Let torch say that there are ``count`` accelerators, and answer what is asked of one."""
    monkeypatch.setattr(PretendAccelerator, "current", 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", make_current)
    for name, function in {
        "device": CurrentDevice,
        "set_device": make_current,
        "current_device": lambda: PretendAccelerator.current,
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    for name, answer in {
        "is_available": True,
        "device_count": count,
        "current_accelerator": torch.device("cuda"),
        "synchronize": None,
        "empty_host_cache": None,
        "current_stream": SimpleNamespace(is_capturing=lambda: False),
    }.items():
        monkeypatch.setattr(torch.accelerator, name, lambda *_, answer=answer, **__: answer)
    for name, answer in {
        "get_device_capability": (9, 0),
        "get_device_name": "Pretended GPU",
        "is_bf16_supported": True,
        "mem_get_info": (FREE, FREE),
        "memory_reserved": 0,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "set_sync_debug_mode": None,
        "synchronize": None,
        "current_stream": None,
        "Event": SimpleNamespace(record=lambda stream: None, synchronize=lambda: None),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
