"""What each expert of a mixture sees: transformers keeps experts in one tensor behind a fused kernel, where no module hook reaches a single one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dass_exp.engine.capture import standing_in
from dass_exp.errors import UserError
from dass_exp.models.families import Experts
from dass_exp.statistics import Statistic


@contextmanager
def observing_experts(
    module: nn.Module, table: Experts, stats: Mapping[int, tuple[Statistic, Statistic]], tokens: int
) -> Iterator[None]:
    """While it is open, the experts run one after the other, and each one's statistics gather over the tokens that are routed to it.

    Args:
        module: of the experts.
        table: what its tensors are called.
        stats: by expert, at the input of gate and up and at that of down.
        tokens: length of the sequences, which come to the experts joined.

    Raises:
        UserError: the experts are laid out as in no family of the table.
    """
    odd = [name for name, usual in _LAYOUT.items() if getattr(module, name, usual) is not usual]
    if odd or getattr(module, table.gate_up).ndim != 3:
        raise UserError(
            f"{type(module).__name__}: experts of this layout ({', '.join(odd) or 'not [expert, out, in]'}) are not supported"
        )
    with standing_in(module, _one_by_one(module, table, stats, tokens)):
        yield


_LAYOUT = {
    "has_bias": False,
    "has_gate": True,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}


def _one_by_one(
    module: nn.Module, table: Experts, stats: Mapping[int, tuple[Statistic, Statistic]], tokens: int
) -> Callable[..., Tensor]:
    gated: Callable[[Tensor], Tensor] = module._apply_gate  # type: ignore[assignment]

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert, (at_input, at_neurons) in stats.items():
            token, choice = torch.where(top_k_index == expert)
            lengths = torch.bincount(token // tokens, minlength=len(hidden_states) // tokens).tolist()
            inputs = hidden_states[token]
            neurons = gated(linear(inputs, getattr(module, table.gate_up)[expert]))
            for stat, seen in ((at_input, inputs), (at_neurons, neurons)):
                for sequence in seen.split(lengths):
                    stat.update(sequence)
            made = linear(neurons, getattr(module, table.down)[expert]) * top_k_weights[token, choice, None]
            output.index_add_(0, token, made.to(output.dtype))
        return output

    return forward
