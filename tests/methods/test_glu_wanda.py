"""glu_wanda against derivatives by autograd, and DaSS with the norm of the input too."""

from __future__ import annotations

import copy

import pytest
import torch
from engine_support import block_of, prune_blocks
from transformers.activations import ACT2FN

from dass_exp.errors import UserError
from dass_exp.methods.dass import Dass
from dass_exp.methods.glu_wanda import GluWanda
from dass_exp.models.decoder import decoder_of
from dass_exp.models.families import DOWN, FC1, GATE, UP

WRITERS = (GATE, UP, FC1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "opt", "gpt2", "mixtral"])
def test_glu_wanda_weighs_each_weight_by_what_it_moves(family, tiny_model, tokens):
    """Against derivatives by autograd of the intermediate activation, token by token."""
    model, scores = tiny_model(family), {}

    class Watched(GluWanda):
        def score(self, linear, block):
            scores.setdefault(linear.name, super().score(linear, block))
            return scores[linear.name]

    dense = copy.deepcopy(model)
    inputs = []
    decoder = decoder_of(dense)
    sites = {site.role: site for site in decoder.sites(0, "mlp") if site.unit == next(decoder.sites(0, "mlp")).unit}
    first = sites[GATE if GATE in sites else FC1]
    module = first.matrix.module
    if first.matrix.expert is None:
        handle = module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
    else:

        def routed(module, args):
            hidden, index, _ = args
            inputs.append(hidden[(index == 0).any(1)])

        handle = module.register_forward_pre_hook(routed)
    dense(tokens)
    handle.remove()
    prune_blocks(model, tokens, Watched(), min_tokens=1)
    act = ACT2FN[
        getattr(dense.config, "hidden_activation", None)
        or getattr(dense.config, "hidden_act", None)
        or dense.config.activation_function
    ]
    (x,) = inputs
    for role in WRITERS:
        if role not in sites:
            continue
        weight = sites[role].matrix.weight.clone().double().requires_grad_()
        total = torch.zeros_like(weight)
        for token in x.double():
            outputs = {
                other: (weight if other is role else sites[other].matrix.weight.double()) @ token
                + (0 if sites[other].matrix.bias is None else sites[other].matrix.bias.double())
                for other in WRITERS
                if other in sites
            }
            z = act(outputs[FC1]) if FC1 in sites else act(outputs[GATE]) * outputs[UP]
            (gradient,) = torch.autograd.grad(z.sum(), weight)  # neuron i depends on row i only
            total += gradient.square()
        expected = weight.detach().abs() * total.sqrt()
        assert torch.allclose(scores[sites[role].name].double(), expected, rtol=1e-3, atol=1e-6), role


def test_dass_with_the_norm_of_the_input_too():
    weights = {GATE: [[1.0, 2.0], [3.0, 4.0]], UP: [[1.0, 1.0], [1.0, 1.0]], DOWN: [[1.0, 1.0], [1.0, 1.0]]}
    block = block_of(weights, {"mlp": [10.0, 1.0], "intermediate": [4.0, 9.0]})
    scores = Dass(alpha=0.5, input_norm=True).score(block.linears[0], block)
    assert torch.allclose(scores, torch.tensor([[20.0, 4.0], [90.0, 12.0]]))
    assert Dass().settings() == {"alpha": 0.5, "granularity": "input"}
    assert Dass(input_norm=True).settings() == {"alpha": 0.5, "granularity": "input", "input_norm": True}
    with pytest.raises(UserError, match="input_norm=1"):
        Dass(input_norm=1)
