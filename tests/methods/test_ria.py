"""RIA by hand and against its formula in float64, and the traps of its authors' code."""

from __future__ import annotations

import pytest
import torch
from engine_support import block_of, kept

from dass_exp.errors import UserError
from dass_exp.masks import NM, Unstructured
from dass_exp.methods.ria import RIA
from dass_exp.models.families import Q

WEIGHT = [[1.0, -1.0, 2.0, 0.0], [3.0, 1.0, -2.0, 4.0]]  # sums of rows 4 and 10, of columns 4, 2, 4, 4
NORMS = {"attention": [4.0, 1.0, 1.0, 0.0625]}  # roots 2, 1, 1, 0.25


def test_a_weight_counts_by_its_share_of_its_column_and_row_and_by_its_input():
    block = block_of({Q: WEIGHT}, NORMS)
    expected = torch.tensor([[1.0, 0.75, 1.0, 0.0], [2.1, 0.6, 0.7, 0.35]])
    torch.testing.assert_close(RIA().score(block.linears[0], block), expected)
    shares = torch.tensor([[0.5, 0.75, 1.0, 0.0], [1.05, 0.6, 0.7, 1.4]])
    torch.testing.assert_close(RIA(alpha=0).score(block.linears[0], block), shares)


@pytest.mark.parametrize(
    ("method", "pattern", "mask"),
    [
        (RIA(), Unstructured(0.5), [[1, 1, 1, 0], [1, 0, 0, 0]]),
        (RIA(granularity="output"), Unstructured(0.5), [[1, 0, 1, 0], [1, 0, 1, 0]]),
        (RIA(), NM(2, 4), [[1, 0, 1, 0], [1, 0, 1, 0]]),
        (RIA(), NM(1, 4), [[1, 0, 0, 0], [1, 0, 0, 0]]),  # n is kept, not removed
    ],
)
def test_ria_ranks_over_the_matrix_the_rows_or_the_groups(method, pattern, mask):
    assert kept(method, block_of({Q: WEIGHT}, NORMS), Q, pattern) == mask


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.3])
def test_agrees_with_the_formula_in_float64(alpha):
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    norms = torch.rand(20, generator=torch.Generator().manual_seed(1)).tolist()
    block = block_of({Q: weight}, {"attention": norms})
    scores = RIA(alpha).score(block.linears[0], block)
    exact = weight.double().abs()
    for i in range(12):
        for j in range(20):
            share = exact[i, j] / exact[:, j].sum() + exact[i, j] / exact[i].sum()
            assert scores[i, j].item() == pytest.approx(float(share) * norms[j] ** alpha, rel=1e-5)


def test_half_precision_weights_are_scored_in_float32():
    """Shares of a large matrix are near half's subnormals: there, weights that differ would tie."""
    weight = (1 + torch.arange(256 * 512).view(256, 512) % 977 / 977).half()
    halves, singles = (block_of({Q: rows}, {}) for rows in (weight, weight.float()))
    scores = RIA().score(halves.linears[0], halves)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, RIA().score(singles.linears[0], singles))


@pytest.mark.parametrize("shape", [(64, 1030), (1030, 64), (700, 1537)])
def test_scores_do_not_depend_on_the_number_of_threads(shape):
    block = block_of({Q: torch.randn(shape, generator=torch.Generator().manual_seed(0))}, {})
    before, scores = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        scores.append(RIA().score(block.linears[0], block))
    torch.set_num_threads(before)
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


@pytest.mark.parametrize("settings", [{"alpha": -0.1}, {"alpha": "a"}, {"granularity": "input"}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=rf"method\.{next(iter(settings))}="):
        RIA(**settings)
