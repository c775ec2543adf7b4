"""Collect statistics at the inputs of a block's linears while tokens pass through it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dass_exp.engine.capture import replaced_forward
from dass_exp.errors import UserError
from dass_exp.models.decoder import Decoder
from dass_exp.models.families import DOWN, Experts, Role
from dass_exp.statistics import Statistic, needed_kinds, new_statistic

# The attributes by which transformers describes an experts module, with the only values that are supported here.
_EXPERTS_LAYOUT = {
    "has_bias": False,
    "has_gate": True,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
Kinds = Iterable[type[Statistic] | None]
# By expert: the statistics at the input of down (True), and at that of gate and up (False).
ExpertStatistics = Mapping[int, Mapping[bool, Statistic]]


@contextmanager
def observe_inputs(
    decoder: Decoder, index: int, scope: str, kinds: Callable[[Role], Kinds], tokens: int
) -> Iterator[dict[str, Statistic]]:
    """Collect statistics in block ``index``, one for each distinct input of the scope's linears.

    ``kinds`` gives the types that are needed at the input of a role's linear. Sequences have ``tokens`` tokens each.
    Yields the statistics by :attr:`dass_exp.models.decoder.LinearSite.source`; inputs of which none is needed are left
    out.
    """
    units = decoder.units(index, scope)
    wanted: dict[str, list[type[Statistic] | None]] = {}
    for site in decoder.sites(index, scope):
        wanted.setdefault(site.source, []).extend(kinds(site.role))
    stats: dict[str, Statistic] = {}
    of_experts: dict[int, dict[bool, Statistic]] = {}
    with ExitStack() as stack:
        for site in decoder.sites(index, scope):
            needed = needed_kinds(wanted[site.source])
            if not needed or site.source in stats:
                continue
            matrix = site.matrix
            stat = stats[site.source] = new_statistic(
                needed, matrix.in_features, matrix.parameter.device, units[site.unit]
            )
            if matrix.expert is None:
                hook = _update_hook(stat, tokens)
                stack.enter_context(matrix.module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                of_experts.setdefault(matrix.expert, {})[site.role == DOWN] = stat
        experts, table = decoder.experts(index), decoder.family.experts
        if of_experts and experts is not None and table is not None:
            stack.enter_context(observe_experts(experts, table, of_experts, tokens))
        yield stats


def _update_hook(stat: Statistic, tokens: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def update(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        inputs = args[0] if args else kwargs["input"]
        # OPT flattens its sequences before the MLP
        stat.update(inputs.unflatten(0, (-1, tokens)) if inputs.ndim == 2 else inputs)

    return update


@contextmanager
def observe_experts(module: nn.Module, table: Experts, stats: ExpertStatistics, tokens: int) -> Iterator[None]:
    """Run the experts one by one and collect each one's statistics over the tokens routed to it.

    transformers stores the experts in one tensor behind a fused kernel, out of reach of module hooks. Sequences, of
    ``tokens`` each, reach the experts flattened. A UserError is raised for an unsupported layout of the tensors.
    """
    unknown = [name for name, usual in _EXPERTS_LAYOUT.items() if getattr(module, name, usual) is not usual]
    if unknown or getattr(module, table.gate_up).ndim != 3:
        layout = ", ".join(unknown) or "not [expert, out, in]"
        raise UserError(f"{type(module).__name__}: experts of this layout ({layout}) are not supported")
    with replaced_forward(module, _observed_experts(module, table, stats, tokens)):
        yield


def _observed_experts(module: nn.Module, table: Experts, stats: ExpertStatistics, tokens: int) -> Callable[..., Tensor]:
    apply_gate: Callable[[Tensor], Tensor] = module._apply_gate  # type: ignore[assignment]

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        routes = routes_of(top_k_index, len(getattr(module, table.gate_up)), tokens)
        for expert, of_expert in stats.items():
            token, choice, lengths = routes[expert]
            inputs = hidden_states[token]
            neurons = apply_gate(linear(inputs, getattr(module, table.gate_up)[expert]))
            for stat, observed in ((of_expert[False], inputs), (of_expert[True], neurons)):
                for sequence in observed.split(lengths):
                    stat.update(sequence)
            weighted = linear(neurons, getattr(module, table.down)[expert]) * top_k_weights[token, choice, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        return output

    return forward


class Route(NamedTuple):
    """The tokens that reach one expert: which, by which of their choices, and how many of each sequence."""

    token: Tensor
    choice: Tensor
    lengths: list[int]


def routes_of(top_k_index: Tensor, experts: int, tokens: int) -> list[Route]:
    """Return for each expert the tokens routed to it, in their order; the host waits once for all experts.

    ``top_k_index`` is int64 [sequences * tokens, choices], the experts of each token.
    """
    choices, sequences = top_k_index.shape[1], len(top_k_index) // tokens
    chosen = top_k_index.flatten().long()
    order = chosen.sort(stable=True).indices
    sequence = torch.arange(len(chosen), device=chosen.device) // (choices * tokens)
    counts = torch.zeros(experts * sequences, dtype=torch.int64, device=chosen.device)
    counts.index_add_(0, chosen * sequences + sequence, torch.ones_like(chosen))
    lengths = counts.view(experts, sequences).tolist()
    parts = order.split([sum(each) for each in lengths])
    return [Route(part // choices, part % choices, each) for part, each in zip(parts, lengths, strict=True)]
