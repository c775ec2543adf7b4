"""The attention of a block, noted in its first pass and played back in the second: pruning the MLP behind or beside it does not change it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dass_exp.engine.activation_cache import ON_DEVICE, Cache, CachedTensor
from dass_exp.engine.capture import standing_in
from dass_exp.statistics import Statistic


class Attention:
    """What a block's attention gave, a batch at a time.

    It is played back only if it cannot have depended on what is pruned: it ran once for each batch, before any linear that is pruned had
    run, and nobody wrote into its output.

    Args:
        module: of the attention; None for a block without one apart from its MLP: nothing is noted then, and nothing played back.
        stats: of the linears that are to be pruned; they tell which of them have run.
        cache: where its outputs wait.
    """

    def __init__(self, module: nn.Module | None, stats: Mapping[str, Statistic], cache: Cache = ON_DEVICE) -> None:
        self._module = module
        self._stats = stats
        self._cache = cache
        self._outputs: deque[tuple[CachedTensor, int | None]] = (
            deque()
        )  # and how many entries stood behind it, None where it was no tuple
        self._batches = 0
        self._seen = 0
        self._usable = (
            module is not None and not module._forward_hooks
        )  # a hook of the user's would run a second time over what it made
        self._last: Tensor | None = None
        self._version = 0

    @contextmanager
    def noting(self) -> Iterator[None]:
        """While it is open, outputs are noted, [sequences, tokens, features] each."""
        if self._module is None:
            yield
            return
        hook = self._module.register_forward_hook(self._note)
        try:
            yield
        finally:
            hook.remove()

    def batch_done(self) -> None:
        """The block has run for one more batch."""
        self._batches += 1
        self._seen = self._tokens()
        changed = (
            self._last is not None and self._last._version != self._version
        )  # the block wrote into what its attention gave
        if len(self._outputs) != self._batches or changed:
            self._refuse()
        self._last = None

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """While it is open, the attention gives what it gave before, batch by batch, and computes nothing."""
        if self._module is None or not self._usable:
            yield
            return
        with standing_in(self._module, self._play):
            yield

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        if self._tokens() != self._seen:
            self._refuse()
        if not self._usable:
            return
        first = output[0] if isinstance(output, tuple) else output
        # what stands behind it, attention weights, grows with the square of the length and is read by no block
        self._outputs.append((self._cache.hold(first), len(output) - 1 if isinstance(output, tuple) else None))
        self._last, self._version = first, first._version

    def _play(self, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        held, behind = self._outputs.popleft()
        return held.get() if behind is None else (held.get(), *(None for _ in range(behind)))

    def _refuse(self) -> None:
        self._usable = False
        self._outputs.clear()

    def _tokens(self) -> int:
        return sum(stat.tokens for stat in self._stats.values())
