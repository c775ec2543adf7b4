"""ADMM by hand and against the paper's algorithm in float64, and the traps of its authors' code."""

from __future__ import annotations

import pytest
import torch
from engine_support import output_error
from engine_support import prune_matrix as pruned
from support import IN, OUT
from torch import Tensor

from dass_exp.errors import UserError
from dass_exp.masks import NM, Pattern, Unstructured
from dass_exp.methods.admm import ADMM
from dass_exp.methods.wanda import Wanda


def best(scores: Tensor, count: int) -> Tensor:
    """The ``count`` highest of all scores, True."""
    order = scores.flatten().sort(descending=True, stable=True).indices[:count]
    return torch.zeros(scores.numel(), dtype=torch.bool).scatter(0, order, True).view(scores.shape)


def reference(weight: Tensor, inputs: Tensor, pattern: Pattern, method: ADMM) -> tuple[Tensor, Tensor]:
    """The paper's algorithm, transposed as there: B is [in, out]."""
    rows = inputs.double().flatten(0, 1)
    gram = rows.T @ rows
    norm = gram.diagonal().sqrt() + 1e-8
    gram = gram / torch.outer(norm, norm) + method.damping * torch.eye(len(gram), dtype=torch.float64)
    b = (weight.double() * norm).T
    y, inverse, u = gram @ b, torch.linalg.inv(gram + torch.eye(len(gram), dtype=torch.float64)), torch.zeros_like(b)
    for t in range(method.iterations):
        if t < method.mask_steps:
            share = 1 - (1 - (t + 1) / method.mask_steps) ** 3
            scores = (b + u).abs().T
            if isinstance(pattern, NM):
                groups = scores.reshape(-1, pattern.m)
                safe = torch.stack([best(group, pattern.n) for group in groups]).view(scores.shape)
            else:
                safe = best(scores, scores.numel() - int(pattern.sparsity * scores.numel()))
            left = scores.numel() - int(share * int((~safe).sum()))
            keep = best(scores.masked_fill(safe, torch.inf), left).T
        z = (b + u) * keep
        u = u + b - z
        b = inverse @ (y + z - u)
    return (((b + u) * keep).T / norm), keep.T


@pytest.mark.parametrize(
    "pattern", [NM(2, 4), NM(4, 8), NM(1, 4), NM(3, 5), Unstructured(0.5), Unstructured(0.7)], ids=repr
)
@pytest.mark.parametrize("method", [ADMM(), ADMM(iterations=6, mask_steps=6, damping=0.0)], ids=repr)
def test_agrees_with_the_paper_in_float64(pattern, method, weight, inputs):
    """4:8 and 1:4 are what they say, and the mask follows the schedule; in the authors' code neither holds."""
    expected, mask = reference(weight, inputs, pattern, method)
    after, result, _ = pruned(method, weight, inputs, pattern)
    assert torch.equal(result.keep, mask)
    torch.testing.assert_close(after.double(), expected, rtol=1e-3, atol=1e-3)


def test_two_rows_by_hand():
    """Inputs without correlation: each weight stays as it is, and the largest |w| * norm of each row of four stay."""
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0], [8.0, 1.0, -1.0, 0.5]])
    inputs = torch.diag(torch.tensor([8.0, 1.0, 1.0, 3.0]))[None]  # scores 8 4 3 6 and 64 1 1 1.5
    after, result, _ = pruned(ADMM(), weight, inputs, NM(2, 4))
    assert result.keep.int().tolist() == [[1, 0, 0, 1], [1, 0, 0, 1]]
    torch.testing.assert_close(after, weight * result.keep, rtol=1e-5, atol=0)
    _, result, _ = pruned(ADMM(), weight, inputs, Unstructured(0.5))
    assert result.keep.int().tolist() == [[1, 1, 0, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5)], ids=repr)
def test_the_output_error_is_below_that_of_a_mask_alone(pattern, weight, inputs):
    after, result, _ = pruned(ADMM(), weight, inputs, pattern)
    of_wanda = pruned(Wanda(), weight, inputs, pattern)[0]
    assert output_error(after, weight, inputs) < 0.8 * output_error(weight * result.keep, weight, inputs)
    assert output_error(after, weight, inputs) < 0.8 * output_error(of_wanda, weight, inputs)


def test_dead_inputs_lose_their_weights_first_and_keep_the_sparsity_exact(weight, inputs):
    inputs[:, :, :8] = 0
    after, result, layer = pruned(ADMM(), weight, inputs, Unstructured(0.5))
    assert not result.keep[:, :8].any()
    assert layer.zeros == OUT * IN // 2
    assert bool(after.isfinite().all())


@pytest.mark.parametrize(
    "settings", [{"mask_steps": 21}, {"iterations": 0, "mask_steps": 1}, {"damping": -1.0}, {"damping": "a"}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=rf"method\.{next(iter(settings))}="):
        ADMM(**settings)
