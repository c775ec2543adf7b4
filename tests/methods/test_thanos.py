"""Thanos by hand, against the paper's update with explicit inverses in float64, and the traps of its authors' code."""

from __future__ import annotations

import pytest
import torch
from engine_support import output_error
from engine_support import prune_matrix as pruned
from support import IN, OUT
from torch import Tensor

from dass_exp.errors import UserError
from dass_exp.masks import NM, Pattern, TransposableNM, Unstructured
from dass_exp.methods.sparsegpt import SparseGPT
from dass_exp.methods.thanos import Thanos


def reference(weight: Tensor, inputs: Tensor, pattern: Pattern, size: int, damping: float) -> tuple[Tensor, Tensor]:
    """Row after row; the inverse of what remains of the Hessian is computed anew for each block."""
    rows, weight = inputs.double().flatten(0, 1), weight.double().clone()
    norm, hessian = rows.norm(dim=0), 2 / len(inputs) * rows.T @ rows
    hessian.diagonal()[norm == 0] = 1
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    keep = torch.ones(weight.shape, dtype=torch.bool)
    left = int(pattern.sparsity * weight.numel()) if isinstance(pattern, Unstructured) else 0
    for first in range(0, weight.shape[1], size):
        last = min(first + size, weight.shape[1])
        inverse, scores = torch.linalg.inv(hessian[first:, first:]), weight[:, first:].abs() * norm[first:]
        if isinstance(pattern, NM):
            keep[:, first:last] = pattern.keep(scores[:, : last - first], 1)
        else:
            chosen = torch.ones(scores.numel(), dtype=torch.bool)
            chosen[scores.flatten().sort(stable=True).indices[:left]] = False
            keep[:, first:last] = chosen.view(scores.shape)[:, : last - first]
            left -= int((~keep[:, first:last]).sum())
        for row in range(len(weight)):
            removed = (~keep[row, first:last]).nonzero()[:, 0]
            if len(removed):
                solved = torch.linalg.solve(inverse[removed][:, removed], weight[row, first + removed])
                weight[row, first:] -= solved @ inverse[removed]
                weight[row, first + removed] = 0
    return weight, keep


@pytest.mark.parametrize("blocksize", [8, 16, 256])
@pytest.mark.parametrize(
    "pattern", [NM(2, 4), NM(4, 8), NM(1, 4), TransposableNM(2, 4), Unstructured(0.5), Unstructured(0.7)], ids=repr
)
def test_agrees_with_explicit_inverses(pattern, blocksize, weight, inputs):
    """1:4 keeps one, no row is left dense, and unstructured blocks take their part of all remaining columns."""
    expected, mask = reference(weight, inputs, pattern, blocksize, 0.01)
    after, result, layer = pruned(Thanos(blocksize), weight, inputs, pattern)
    assert torch.equal(result.keep, mask)
    torch.testing.assert_close(after.double(), expected, rtol=1e-3, atol=1e-3)
    assert (layer.excess, layer.damping_retries) == (0, 0)
    assert bool((~result.keep).any(1).all())


def test_two_removed_weights_of_a_row_by_hand():
    """X^T X is the identity but for the last two of four inputs, [[5, 3], [3, 5]] / 5 as SparseGPT's example.

    Row 1 removes the two independent ones: nothing moves. Row 2 removes the first and the last, and the third takes
    3/5 of the last.
    """
    inputs = torch.tensor([[[5**0.5, 0, 0, 0], [0, 5**0.5, 0, 0], [0, 0, 2, 2], [0, 0, 1, -1]]])
    weight = torch.tensor([[1.0, 1.0, 4.0, 4.0], [1.0, 5.0, 4.0, 2.0]])
    after, result, _ = pruned(Thanos(damping=0.0), weight, inputs, NM(2, 4))
    assert result.keep.int().tolist() == [[0, 0, 1, 1], [0, 1, 1, 0]]
    torch.testing.assert_close(after, torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 5.0, 5.2, 0.0]]))


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5)], ids=repr)
def test_the_output_error_is_below_that_of_the_mask_alone_and_of_sparsegpt(pattern, weight, inputs):
    after, result, _ = pruned(Thanos(), weight, inputs, pattern)
    assert output_error(after, weight, inputs) < 0.8 * output_error(weight * result.keep, weight, inputs)
    of_sparsegpt = pruned(SparseGPT(), weight, inputs, pattern)[0]
    assert output_error(after, weight, inputs) < output_error(of_sparsegpt, weight, inputs)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5), Unstructured(0.95)], ids=repr)
def test_dead_inputs_lose_their_weights_first_and_keep_the_sparsity_exact(pattern, weight, inputs):
    inputs[:, :, [0, 1, 9]] = 0
    after, result, layer = pruned(Thanos(blocksize=8), weight, inputs, pattern)
    assert not result.keep[:, [0, 1, 9]].any()
    assert layer.zeros == int(getattr(pattern, "sparsity", 0.5) * (OUT * IN))
    assert layer.excess == 0
    assert bool(after.isfinite().all())


def test_the_result_does_not_depend_on_the_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(96, 320, generator=generator), torch.randn(4, 160, 320, generator=generator)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(pruned(Thanos(blocksize=64), weight, inputs, Unstructured(0.5))[0])
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("settings", [{"blocksize": 0}, {"blocksize": 12.5}, {"damping": -0.01}, {"damping": "1"}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=rf"method\.{next(iter(settings))}="):
        Thanos(**settings)
