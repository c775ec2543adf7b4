"""Record a block's attention in its first pass and replay it in the second: pruning the MLP does not change it."""

from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from dass_exp.engine.activation_cache import ON_DEVICE, ActivationCache, CachedTensor
from dass_exp.engine.capture import replaced_forward
from dass_exp.statistics import Statistic


class AttentionReplay:
    """The outputs of a block's attention, batch by batch.

    They are replayed only if they cannot depend on what is pruned: the attention ran once per batch, before any of the
    linears to be pruned, and nothing wrote into its output. A module with the user's own forward hooks is never
    replayed, since they would run a second time on their own output.

    Args:
        module: the attention; None for a block without a separate one: nothing is recorded or replayed.
        stats: of the linears to be pruned; their token counts show whether one of them has run.
        cache: where outputs are stored.
    """

    def __init__(
        self, module: nn.Module | None, stats: Mapping[str, Statistic], cache: ActivationCache = ON_DEVICE
    ) -> None:
        self._module, self._stats, self._cache = module, stats, cache
        # each with the number of further entries of the output tuple; None if the output is a tensor
        self._outputs: deque[tuple[CachedTensor, int | None]] = deque()
        self._batches = 0
        self._observed_tokens = 0
        self._usable = module is not None and not module._forward_hooks
        self._last: Tensor | None = None
        self._version = 0

    def recording(self) -> AbstractContextManager[Any]:
        """Record the outputs, [sequences, tokens, features] each."""
        return nullcontext() if self._module is None else self._module.register_forward_hook(self._record)

    def batch_done(self) -> None:
        """Note that the block has run on one more batch."""
        self._batches += 1
        self._observed_tokens = self._count_tokens()
        modified = self._last is not None and self._last._version != self._version  # the block wrote into the output
        if len(self._outputs) != self._batches or modified:
            self._give_up()
        self._last = None

    def replaying(self, again: bool = False) -> AbstractContextManager[None]:
        """Make the attention return its recorded outputs, batch by batch, without computing anything.

        They are released one by one unless all batches are to be replayed ``again`` afterwards.
        """
        if self._module is None or not self._usable:
            return nullcontext()
        return replaced_forward(self._module, self._replay_and_keep if again else self._replay)

    def _record(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        if self._count_tokens() != self._observed_tokens:
            self._give_up()
        if not self._usable:
            return
        first = output[0] if isinstance(output, tuple) else output
        # the other entries are attention weights: quadratic in the length, and no block reads them
        self._outputs.append((self._cache.store(first), len(output) - 1 if isinstance(output, tuple) else None))
        self._last, self._version = first, first._version

    def _replay(self, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        cached, others = self._outputs.popleft()
        return cached.load() if others is None else (cached.load(), *(None for _ in range(others)))

    def _replay_and_keep(self, *args: Any, **kwargs: Any) -> Any:
        self._outputs.append(self._outputs[0])
        return self._replay(*args, **kwargs)

    def _give_up(self) -> None:
        self._usable = False
        self._outputs.clear()

    def _count_tokens(self) -> int:
        return sum(stat.tokens for stat in self._stats.values())
