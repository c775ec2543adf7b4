"""What a model hands to its decoder blocks, captured without running them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dass_exp.engine.activation_cache import ON_DEVICE, Cache
from dass_exp.errors import UserError


@dataclass
class Call:
    """The arguments that the model hands to one block beside the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class Batch:
    """A batch of sequences on its way through the model.

    Args:
        hidden: [sequences, tokens, features], the input of the block that is next.
        calls: the other arguments, one entry per block: masks and rotary tables can differ from block to block.
        returns_tuple: whether blocks give a tuple, as older ones do.
        cache: where the hidden states wait.
    """

    def __init__(
        self, hidden: Tensor, calls: list[Call], returns_tuple: bool = False, cache: Cache = ON_DEVICE
    ) -> None:
        self.calls, self.returns_tuple, self.cache = calls, returns_tuple, cache
        self.held = cache.hold(hidden)
        self.sequences, self.tokens = hidden.shape[:2]

    @property
    def hidden(self) -> Tensor:
        """The input of the block that is next, on its device."""
        return self.held.get()

    @hidden.setter
    def hidden(self, hidden: Tensor) -> None:
        self.held = self.cache.hold(hidden)

    def again(self) -> Batch:
        """The same batch, to go another way from here."""
        return copy(self)

    def through(self, block: nn.Module, index: int) -> Tensor:
        """The output of block ``index`` for this batch, called as the model calls it; [sequences, tokens, features]."""
        call = self.calls[index]
        output = block(self.hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off while it is open; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def capture(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    tokens: Tensor,
    batch_size: int,
    returns_tuple: bool | None = None,
    cache: Cache = ON_DEVICE,
) -> list[Batch]:
    """The first block's inputs and every block's arguments, one entry per batch.

    Runs the embedding and whatever else the model does before and between its blocks; the blocks themselves hand their input on.

    Args:
        model: a transformers causal language model.
        blocks: its decoder blocks.
        tokens: int64 [sequences, tokens].
        batch_size: sequences per batch.
        returns_tuple: whether blocks give a tuple; None finds out by one real call of the first block, which must be in memory then.
        cache: where hidden states wait.

    Raises:
        UserError: the model does not call each of its blocks once.
    """
    device = next(model.parameters()).device
    trunk = getattr(model, "base_model", model)
    batches: list[Batch] = []
    with _recording(blocks, returns_tuple) as recorder:
        for part in tokens.split(batch_size):
            recorder.hidden, recorder.calls = [], []
            # a live cache among the arguments would grow at each replay and corrupt the next batch
            trunk(input_ids=part.to(device), use_cache=False)
            if len(recorder.calls) != len(blocks):
                raise UserError(
                    f"the model made {len(recorder.calls)} block calls for its {len(blocks)} blocks; this family is not supported"
                )
            calls = recorder.calls
            if batches:
                calls = [_share_call(call, before) for call, before in zip(calls, batches[-1].calls, strict=True)]
            batches.append(Batch(recorder.hidden[0], calls, bool(recorder.returns_tuple), cache))
    return batches


def put(batches: Sequence[Batch], parts: Sequence[Tensor]) -> None:
    """Give batches their hidden states out of ``parts``, [sequences, tokens, features] each, cut as an earlier run cut its batches."""
    left = deque(parts)
    for batch in batches:
        taken, missing = [], batch.sequences
        while missing:
            part = left.popleft()
            taken.append(part[:missing])
            if len(part) > missing:
                left.appendleft(part[missing:])
            missing -= len(taken[-1])
        batch.hidden = torch.cat(taken).to(batch.held.device)


def behind(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch, ids: Tensor, whole: bool = False) -> Tensor:
    """The model's last hidden states where its last block gave ``batch.hidden``: whatever the model does behind its blocks, none of which is computed.

    Args:
        model: a transformers causal language model.
        blocks: its decoder blocks.
        batch: behind the last of them.
        ids: int64 [sequences, tokens], of the batch.
        whole: give the model's logits, [sequences, tokens, words], instead.
    """
    hidden = batch.hidden

    def given(*args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return (hidden,) if batch.returns_tuple else hidden

    trunk = model if whole else getattr(model, "base_model", model)
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(standing_in(block, given))
        made = trunk(input_ids=ids.to(hidden.device), use_cache=False)
    found: Tensor = made.logits if whole else made.last_hidden_state
    return found


class _Recorder:
    """Notes each block call and hands the input on, in the type that the model's blocks return."""

    def __init__(self, returns_tuple: bool | None) -> None:
        self.hidden: list[Tensor] = []
        self.calls: list[Call] = []
        self.returns_tuple = returns_tuple

    def stand_in(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that records in the place of ``forward``."""

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if self.returns_tuple is None:  # one real call tells: older blocks return a tuple, newer ones a tensor
                self.returns_tuple = isinstance(forward(hidden, *rest, **kwargs), tuple)
            self.hidden.append(hidden)
            self.calls.append(Call(rest, dict(kwargs)))
            return (hidden,) if self.returns_tuple else hidden

        return record


@contextmanager
def _recording(blocks: Sequence[nn.Module], returns_tuple: bool | None) -> Iterator[_Recorder]:
    """While it is open, the blocks compute nothing; afterwards each has its own forward back, one set by a hook library included."""
    recorder = _Recorder(returns_tuple)
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(standing_in(block, recorder.stand_in(block.forward)))
        yield recorder


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While it is open, ``forward`` runs in the place of the module's own; afterwards that is back, one set by a hook library included."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward")
        if own is not None:
            module.__dict__["forward"] = own


def _share_call(call: Call, before: Call) -> Call:
    """``call`` with each tensor that equals its counterpart in ``before`` replaced by it: masks and rotary tables are held once."""
    kwargs = {key: _share(value, before.kwargs.get(key)) for key, value in call.kwargs.items()}
    return Call(_share(call.args, before.args), kwargs)


def _share(new: Any, old: Any) -> Any:
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        same = new is old or (new.shape == old.shape and new.dtype == old.dtype and torch.equal(new, old))
        return old if same else new
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        return tuple(_share(one, other) for one, other in zip(new, old, strict=True))
    return new
