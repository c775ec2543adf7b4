"""Neurons in order, their statistics with them: the outcome is that of a model that stood in that order before."""

from __future__ import annotations

import pytest
import torch
from engine_support import prune_blocks

from dass_exp.engine.stages import Stages
from dass_exp.methods.dass import Dass
from dass_exp.methods.sparsegpt import SparseGPT
from dass_exp.models.decoder import decoder_of
from dass_exp.models.families import READER_OF
from dass_exp.permute.neurons import Neurons
from dass_exp.repair.base import NoRepair, Regression
from dass_exp.repair.least_squares import LeastSquares, solve


@pytest.mark.parametrize("repair", [NoRepair(), LeastSquares(inputs="dense")], ids=["none", "least_squares"])
@pytest.mark.parametrize("method", [Dass(), SparseGPT()], ids=["dass", "sparsegpt"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_model_that_stood_in_that_order_before_is_pruned_the_same(family, method, repair, tiny_model):
    tokens = torch.randint(64, (8, 60), generator=torch.Generator().manual_seed(3))
    ordered, by_hand, orders, weights = tiny_model(family), tiny_model(family), [], []

    def note(report):
        if not orders:
            orders.append(next(iter(report.orders.values())).order)
        weights.append({linear.name: linear.weight.clone() for linear in report.linears})

    prune_blocks(ordered, tokens, method, on_report=note, stages=Stages(permute=Neurons(), repair=repair))
    first = weights[0]
    for site in decoder_of(by_hand).sites(0, "mlp"):
        (site.matrix.reorder_outputs if site.role in READER_OF else site.matrix.reorder_inputs)(orders[0])
    weights.clear()
    prune_blocks(by_hand, tokens, method, on_report=note, stages=Stages(repair=repair))
    for name, weight in weights[0].items():
        assert torch.equal(weight == 0, first[name] == 0), name
        assert torch.allclose(weight, first[name], rtol=1e-2, atol=1e-4), name


def test_the_ridge_pulls_to_the_dense_weights_and_not_to_zero():
    generator = torch.Generator().manual_seed(0)
    inputs, dense = torch.randn(50, 8, generator=generator), torch.randn(3, 8, generator=generator)
    keep = torch.tensor([True, False] * 4).expand(3, 8)
    problem, start = Regression.on_same_inputs(inputs.T @ inputs, dense), torch.zeros(3, 8)
    solved, _ = solve(problem, dense, start, start @ problem.gram, keep, 20, damping=1e6)
    assert torch.allclose(solved, dense * keep, atol=1e-4)
