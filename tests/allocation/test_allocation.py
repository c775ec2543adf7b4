"""Allocations by hand and against their formulas, and that the sum of what blocks lose is exact."""

from __future__ import annotations

import math

import pytest
import torch
from engine_support import block_of, view_of
from torch import Tensor

from dass_exp.allocation.alpha import Alpha, tail_exponent
from dass_exp.allocation.base import Allocation, BlockProfile
from dass_exp.allocation.owl import OWL
from dass_exp.allocation.uniform import Uniform
from dass_exp.errors import UserError
from dass_exp.masks import NM, Budget, TransposableNM, Unstructured
from dass_exp.models.families import DOWN, UP

MLP = (48 * 20, 48 * 20, 20 * 48)


def profile_of(values: list[float], sizes: tuple[int, ...] = MLP) -> list[BlockProfile]:
    return [BlockProfile(value, sizes) for value in values]


def sparsities(allocation: Allocation, values: list[float], asked: float) -> list[float]:
    return [pattern.sparsity for pattern in allocation.budget(profile_of(values), Unstructured(asked))]


# --- what is removed


@pytest.mark.parametrize("asked", [0.0, 0.3, 0.5, 0.7, 0.85, 0.995])
@pytest.mark.parametrize("allocation", [OWL(), OWL(spread=0.5), Alpha(), Alpha(spread=0.9)], ids=repr)
@pytest.mark.parametrize(
    ("sizes", "off"), [(MLP, 1), ((48 * 20, 20 * 48), 1), ((20 * 20, 20 * 20, 10 * 20, 10 * 20, *MLP), 3), ((997,), 1)]
)
def test_the_blocks_lose_together_what_was_asked_for(allocation, asked, sizes, off):
    profile = profile_of([1.0, 4.0, 2.5, 2.0, 9.0], sizes)
    patterns = allocation.budget(profile, Unstructured(asked))
    lost = sum(int(pattern.sparsity * size) for pattern in patterns for size in sizes)
    assert abs(lost - int(asked * sum(sizes) * len(profile))) <= off
    assert all(0 <= pattern.sparsity < 1 for pattern in patterns)


def test_blocks_of_different_sizes_count_by_their_weights():
    profile = [BlockProfile(1.0, (900,)), BlockProfile(2.0, (100,)), BlockProfile(1.5, (333, 77))]
    for allocation in (OWL(), Alpha()):
        patterns = allocation.budget(profile, Unstructured(0.6))
        lost = [
            sum(int(pattern.sparsity * size) for size in block.sizes)
            for pattern, block in zip(patterns, profile, strict=True)
        ]
        assert sum(lost) == int(0.6 * 1410)


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.5, 0.977])
def test_a_budget_removes_the_integer_part_of_the_matrix_and_spreads_it(sparsity, dim):
    scores = torch.randn(13, 29, generator=torch.Generator().manual_seed(0))
    pattern = Budget(sparsity)
    keep = pattern.keep(scores, dim)
    assert int((~keep).sum()) == int(sparsity * scores.numel())
    assert pattern.violations(keep, dim) == 0
    if dim is not None:
        lost = (~keep).sum(dim)
        assert int(lost.max() - lost.min()) <= 1
        for group, mask in zip(scores.movedim(dim, 1), keep.movedim(dim, 1), strict=True):
            assert not mask.any() or mask.all() or group[mask].min() > group[~mask].max()
    if sparsity:
        assert pattern.violations(torch.ones_like(keep), dim) > 0


@pytest.mark.parametrize("width", [1, 4, 7, 29, 40])
@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.5, 0.9])
def test_slabs_of_a_budget_lose_together_what_the_matrix_does(sparsity, width):
    """SparseGPT ranks a slab of columns at a time; other patterns round each of them, as its code does."""
    scores, pattern = torch.randn(13, 29, generator=torch.Generator().manual_seed(0)), Budget(sparsity)
    slabs = scores.split(width, dim=1)
    of_slabs = pattern.of_slabs((13, 29), width)
    kept = [of_slab.keep(slab, None) for of_slab, slab in zip(of_slabs, slabs, strict=True)]
    assert sum(int((~keep).sum()) for keep in kept) == int(sparsity * 13 * 29)
    assert all(abs(int((~keep).sum()) - sparsity * keep.numel()) <= 1 + 1e-9 for keep in kept)
    assert Unstructured(sparsity).of_slabs((13, 29), width) == [Unstructured(sparsity)] * len(slabs)


@pytest.mark.parametrize("dim", [0, 1])
def test_one_slab_loses_what_the_matrix_does_at_every_number_of_zeros(dim):
    """Where sparsity x rows x columns rounds to the other side of a whole number than sparsity x size."""
    rows, columns = 24, 36
    for zeros in range(1, rows * columns):
        for sparsity in (zeros / (rows * columns), math.nextafter(zeros / (rows * columns), 0)):
            pattern = Budget(sparsity)
            (of_slab,) = pattern.of_slabs((rows, columns), columns)
            keep = pattern.keep(torch.arange(rows * columns).view(rows, columns).float(), dim)
            assert of_slab.violations(keep, dim) == 0, sparsity
            assert int((~keep).sum()) == int(sparsity * keep.numel())


def test_uniform_changes_no_pattern_and_serves_every_pattern():
    for pattern in (NM(2, 4), TransposableNM(2, 4), Unstructured(0.5)):
        Uniform().check(pattern)
        assert Uniform().budget(profile_of([0.0, 0.0]), pattern) == [pattern, pattern]
    assert Uniform.stat is None


@pytest.mark.parametrize("allocation", [OWL(), Alpha()], ids=repr)
def test_nm_patterns_cannot_be_divided(allocation):
    with pytest.raises(
        UserError, match=r"allocation=(owl|alpha) with pattern 2:4: every group .* pattern=unstructured"
    ):
        allocation.check(NM(2, 4))
    with pytest.raises(UserError, match="allocation="):
        allocation.budget(profile_of([1.0]), NM(2, 4))


@pytest.mark.parametrize("allocation", [OWL(), Alpha()], ids=repr)
def test_equal_blocks_get_equal_sparsities(allocation):
    assert sparsities(allocation, [3.0, 3.0, 3.0], 0.7) == pytest.approx([0.7] * 3, abs=1 / sum(MLP))


# --- OWL


def test_owl_counts_weights_above_a_multiple_of_the_mean_of_the_block():
    """|W| norm(x): up 2 2 2 18 (norm 1 for the first column, 3 for the second), down 6 0; the mean is 5."""
    block = block_of({UP: [[2.0, -2 / 3], [2.0, 6.0]], DOWN: [[6.0, 0.0]]}, {"mlp": [1.0, 3.0]})
    assert OWL(m=3.0).measure(block.linears) == pytest.approx(100 / 6)
    assert OWL(m=1.1).measure(block.linears) == pytest.approx(200 / 6)
    assert OWL(m=4.0).measure(block.linears) == 0


def test_owl_gives_outliers_more_within_its_range():
    """Kept: 0.3 - mean(0, 0.16, 0.08) + 0, 0.16, 0.08."""
    found = sparsities(OWL(), [0.0, 8.0, 4.0], 0.7)
    assert found == pytest.approx([0.78, 0.62, 0.70], abs=1 / MLP[0])


# --- AlphaPruning


def test_the_tail_exponent_is_hills_estimate_over_the_upper_half():
    """Squared singular values 1 2 4 e^2*4: the tail is 4 and 4 e^2, whose logarithms sum to 2 above the first."""
    weight = torch.diag(torch.tensor([1.0, 2.0, 4.0, 4 * math.e**2]).sqrt())
    assert tail_exponent(weight) == pytest.approx(1 + 2 / 2)
    assert tail_exponent(torch.cat([weight, torch.zeros(4, 3)], 1).T) == pytest.approx(2)
    assert math.isfinite(tail_exponent(torch.eye(4)))
    assert math.isfinite(tail_exponent(torch.zeros(4, 4)))


def test_the_tail_exponent_agrees_with_singular_values(weight):
    values = torch.linalg.svdvals(weight.double()).square().sort().values
    start, total = len(values) // 2, 0.0
    for value in values[start:]:
        total += math.log(value) - math.log(values[start])
    assert tail_exponent(weight) == pytest.approx(1 + (len(values) - start) / total, rel=1e-9)


def test_alpha_removes_in_proportion_and_more_from_light_tails(weight: Tensor):
    """Ratios 0.7, 1.3, 1.0 of 0.6."""
    assert sparsities(Alpha(), [2.0, 6.0, 4.0], 0.6) == pytest.approx([0.42, 0.78, 0.6], abs=1 / MLP[0])
    # at 90 % the second would lose 1.17 of its weights: it loses 99 %, the others share the rest
    first, second, third = sparsities(Alpha(), [2.0, 6.0, 4.0], 0.9)
    assert second == pytest.approx(0.99, abs=1e-3)
    assert 0.7 < first < third < 0.99 + 1e-3
    assert first + second + third == pytest.approx(2.7, abs=1e-3)
    view = view_of(weight, weight[None])
    assert Alpha().measure([view, view]) == pytest.approx(tail_exponent(weight))
    assert Alpha.stat is None


@pytest.mark.parametrize(
    ("kind", "name", "value"), [(OWL, "m", -1), (OWL, "spread", 0.6), (Alpha, "spread", 1), (Alpha, "spread", "a")]
)
def test_impossible_settings_are_refused(kind, name, value):
    with pytest.raises(UserError, match=rf"allocation\.{name}="):
        kind(**{name: value})
