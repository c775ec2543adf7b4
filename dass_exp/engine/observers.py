"""Gather statistics at the inputs of a block's linears while tokens pass through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from dass_exp.engine.experts import observing_experts
from dass_exp.models.decoder import Decoder
from dass_exp.models.families import DOWN
from dass_exp.statistics import Statistic


@contextmanager
def observing(
    decoder: Decoder, index: int, scope: str, kind: type[Statistic] | None, tokens: int
) -> Iterator[dict[str, Statistic]]:
    """While it is open, statistics of ``kind`` gather at the inputs of the linears in the scope, one per distinct input.

    Args:
        decoder: of the model.
        index: of the block.
        scope: which of its linears.
        kind: of the statistics; None for none.
        tokens: length of the sequences.

    Yields:
        the statistics by the source of the linears (:class:`dass_exp.models.decoder.Site`).
    """
    stats: dict[str, Statistic] = {}
    experts: dict[int, dict[bool, Statistic]] = {}
    with ExitStack() as stack:
        for site in decoder.sites(index, scope):
            if kind is None or site.source in stats:
                continue
            stat = stats[site.source] = kind(site.matrix.in_features, site.matrix.parameter.device)
            if site.matrix.expert is None:
                stack.callback(
                    site.matrix.module.register_forward_pre_hook(_observer(stat, tokens), with_kwargs=True).remove
                )
            else:
                experts.setdefault(site.matrix.expert, {})[site.role == DOWN] = stat
        if experts:
            pairs = {expert: (of[False], of[True]) for expert, of in experts.items()}
            stack.enter_context(observing_experts(decoder.experts(index), decoder.family.experts, pairs, tokens))  # type: ignore[arg-type]
        yield stats


def _observer(stat: Statistic, tokens: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        inputs = args[0] if args else kwargs["input"]
        stat.update(
            inputs.unflatten(0, (-1, tokens)) if inputs.ndim == 2 else inputs
        )  # OPT joins its sequences before the MLP

    return observe
