"""Record what a model passes to its decoder blocks, without running the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dass_exp.engine.activation_cache import ON_DEVICE, ActivationCache
from dass_exp.errors import UserError


@dataclass
class Call:
    """The arguments of one block call, hidden states excluded."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Batch:
    """A batch of sequences on its way through the decoder blocks.

    Args:
        hidden: [sequences, tokens, features], the input of the next block; stored in ``cache``.
        calls: the other arguments, one entry per block: masks and rotary tables can differ between blocks.
        returns_tuple: whether blocks return a tuple, as in older models.
    """

    def __init__(
        self, hidden: Tensor, calls: list[Call], returns_tuple: bool = False, cache: ActivationCache = ON_DEVICE
    ) -> None:
        self.calls, self.returns_tuple, self.cache = calls, returns_tuple, cache
        self.cached = cache.store(hidden)
        self.sequences, self.tokens = hidden.shape[:2]

    @property
    def hidden(self) -> Tensor:
        """The input of the next block, on its device."""
        return self.cached.load()

    @hidden.setter
    def hidden(self, hidden: Tensor) -> None:
        self.cached = self.cache.store(hidden)

    def copy(self) -> Batch:
        """Return the same batch, to be passed on independently from here."""
        return copy(self)

    def run_block(self, block: nn.Module, index: int) -> Tensor:
        """Call block ``index`` as the model does and return its output, [sequences, tokens, features]."""
        call = self.calls[index]
        output = block(self.hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off; on exit restore the mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices in float32: TF32 has 10 bits, too few for Gram matrices and their factors."""
    backends: Any = torch.backends
    places = (backends.cuda.matmul, backends.mkldnn.matmul)
    own = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, precision in zip(places, own, strict=True):
            place.fp32_precision = precision


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Run ``forward`` instead of the module's own; on exit restore that, including one set by a hook library."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward")
        if own is not None:
            module.__dict__["forward"] = own


def capture(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    tokens: Tensor,
    batch_size: int,
    returns_tuple: bool | None = None,
    cache: ActivationCache = ON_DEVICE,
) -> list[Batch]:
    """Return the first block's inputs and every block's other arguments, batch by batch.

    Runs the embedding and whatever else the model computes outside its blocks; the blocks only pass their input on.
    ``tokens`` is int64 [sequences, tokens]. Where ``returns_tuple``, whether blocks return a tuple, is None, the first
    block is run once to see; it must be in memory then.

    Raises:
        UserError: the model does not call each of its blocks once.
    """
    device = next(model.parameters()).device
    trunk = getattr(model, "base_model", model)
    batches: list[Batch] = []
    recorder = _Recorder(returns_tuple)
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block, recorder.replacement(block.forward)))
        for part in tokens.split(batch_size):
            recorder.hidden, recorder.calls = [], []
            # a live KV cache among the arguments would grow at each replay and corrupt the next batch
            trunk(input_ids=part.to(device), use_cache=False)
            calls = recorder.calls
            if len(calls) != len(blocks):
                counts = f"{len(calls)} block calls for its {len(blocks)} blocks"
                raise UserError(f"the model made {counts}; this family is not supported")
            if batches:
                calls = _share_calls(calls, batches[-1].calls)
            batches.append(Batch(recorder.hidden[0], calls, bool(recorder.returns_tuple), cache))
    return batches


def restore_hidden(batches: Sequence[Batch], parts: Sequence[Tensor]) -> None:
    """Set the hidden states from those of an earlier run with any batch size, [sequences, tokens, features] each."""
    sequences = (sequence for part in parts for sequence in part)
    for batch in batches:
        hidden = torch.stack([next(sequences) for _ in range(batch.sequences)])
        batch.hidden = hidden.to(batch.cached.device)


def finish_forward(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Batch, ids: Tensor, logits: bool = False
) -> Tensor:
    """Run what the model computes after its last block, whose output ``batch.hidden`` is; no block runs.

    ``ids`` is int64 [sequences, tokens]. With ``logits`` return these, [sequences, tokens, vocabulary], otherwise the
    last hidden states.
    """
    hidden = batch.hidden

    def block_forward(*args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return (hidden,) if batch.returns_tuple else hidden

    trunk = model if logits else getattr(model, "base_model", model)
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(replaced_forward(block, block_forward))
        output = trunk(input_ids=ids.to(hidden.device), use_cache=False)
    result: Tensor = output.logits if logits else output.last_hidden_state
    return result


@dataclass
class _Recorder:
    """Records each block call and passes the input on, in the type that the model's blocks return."""

    returns_tuple: bool | None
    hidden: list[Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def replacement(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward that records instead of running ``forward``."""

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if self.returns_tuple is None:  # only a real call shows it: older blocks return a tuple
                self.returns_tuple = isinstance(forward(hidden, *rest, **kwargs), tuple)
            self.hidden.append(hidden)
            self.calls.append(Call(rest, dict(kwargs)))
            return (hidden,) if self.returns_tuple else hidden

        return record


def _share_calls(calls: Sequence[Call], before: Sequence[Call]) -> list[Call]:
    """Reuse the tensors of ``before`` where they are equal: masks and rotary tables are then stored once."""
    known: dict[tuple[int, int], Tensor] = {}  # blocks share them too: each pair is compared once
    return [
        Call(_share(call.args, other.args, known), _share(call.kwargs, other.kwargs, known))
        for call, other in zip(calls, before, strict=True)
    ]


def _share(new: Any, old: Any, known: dict[tuple[int, int], Tensor]) -> Any:
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        if (pair := (id(new), id(old))) not in known:
            same = new is old or (new.shape == old.shape and new.dtype == old.dtype and torch.equal(new, old))
            known[pair] = old if same else new
        return known[pair]
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: _share(value, old.get(key), known) for key, value in new.items()}
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        return tuple(_share(one, other, known) for one, other in zip(new, old, strict=True))
    return new
