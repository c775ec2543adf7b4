"""Masks on both axes by hand, and against a slow loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from dass_exp import masks
from dass_exp.errors import UserError
from dass_exp.masks import NM, Pattern, TransposableNM, Unstructured


def mask(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def slow_keep(pattern: Pattern, scores: Tensor, dim: int | None) -> Tensor:
    """One group after the other, in plain Python: the highest stay; ties go to the lower index."""
    if dim is None and isinstance(pattern, Unstructured):
        return slow_keep(pattern, scores.reshape(1, -1), 1).view(scores.shape)
    rows = scores.T if dim == 0 else scores
    kept = torch.zeros(rows.shape, dtype=torch.bool)
    width = pattern.m if isinstance(pattern, NM) else rows.shape[1]
    room = pattern.n if isinstance(pattern, NM) else width - int(pattern.sparsity * width)
    for row in range(rows.shape[0]):
        for start in range(0, rows.shape[1], width):
            ranked = sorted(range(start, start + width), key=lambda column: (-rows[row, column].item(), column))
            kept[row, ranked[:room]] = True
    return kept.T if dim == 0 else kept


# --- N:M


# The limits (scores, group size) that lead to each way of ranking on small matrices.
WAYS = {"_compare_at_once": (1 << 13, 16), "_compare_pairs": (0, 99), "_sort": (0, 0)}


def only(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make N:M masks in one way."""
    for limit, value in zip(("_FEW_SCORES", "_PAIRWISE_LIMIT"), WAYS[way], strict=True):
        monkeypatch.setattr(masks, limit, value)


def test_the_two_axes_of_one_matrix_differ():
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 0.0, 0.0], [0.0, 9.0, 1.0, 7.0]])
    assert torch.equal(NM(2, 4).keep(scores, 1), mask([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]]))
    assert torch.equal(NM(2, 4).keep(scores, 0), mask([[1, 1, 1, 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 1]]))


TIES = [
    ([5, 5, 5, 5], [1, 1, 0, 0]),
    ([3, 1, 3, 3], [1, 0, 1, 0]),
    ([1, 3, 3, 3], [0, 1, 1, 0]),
    ([0, 2, 0, 0], [1, 1, 0, 0]),
    ([0, 0, 2, 2], [0, 0, 1, 1]),
]


@pytest.mark.parametrize(("row", "kept"), TIES)
@pytest.mark.parametrize("way", [*WAYS, None])
def test_of_equal_scores_the_lower_index_stays(row, kept, way, monkeypatch):
    scores, pattern = torch.tensor([row], dtype=torch.float32), NM(2, 4) if way else Unstructured(0.5)
    if way:
        only(way, monkeypatch)
    assert torch.equal(pattern.keep(scores, 1), mask([kept]))
    assert torch.equal(pattern.keep(scores.T, 0), mask([kept]).T)
    assert torch.equal(Unstructured(0.5).keep(scores.view(2, 2), None), mask([kept]).view(2, 2))


@pytest.mark.parametrize(("rows", "m", "way"), [(2, 16, 0), (3, 16, 1), (3, 32, 2)])
def test_few_scores_are_compared_at_once_small_groups_in_pairs_and_large_ones_sorted(rows, m, way, monkeypatch):
    taken: list[str] = []

    def spy(name: str, inner: Callable[[NM, Tensor], Tensor]) -> Callable[[NM, Tensor], Tensor]:
        return lambda pattern, groups: taken.append(name) or inner(pattern, groups)

    for name in WAYS:
        monkeypatch.setattr(NM, name, spy(name, getattr(NM, name)))
    NM(8, m).keep(torch.rand(rows, 4096), 1)
    assert taken == [list(WAYS)[way]]


@pytest.mark.parametrize(("dim", "side", "size"), [(1, "input", 6), (None, "input", 6), (0, "output", 10)])
def test_an_axis_that_m_does_not_divide_is_refused(dim, side, size):
    message = rf"pattern 2:4: m=4 does not divide the {side} axis of a \[10, 6\].* divides {size}"
    with pytest.raises(UserError, match=message):
        NM(2, 4).keep(torch.rand(10, 6), dim)
    with pytest.raises(UserError, match=message):
        NM(2, 4).check((10, 6), dim)


# --- unstructured


@pytest.mark.parametrize(
    ("dim", "kept"),
    [(1, [[1, 0, 1, 0], [1, 1, 0, 0]]), (0, [[1, 1, 1, 1], [0, 0, 0, 0]]), (None, [[1, 1, 1, 0], [1, 0, 0, 0]])],
)
def test_unstructured_by_hand(dim, kept):
    scores = torch.tensor([[9.0, 5.0, 8.0, 2.0], [7.0, 3.0, 1.0, 0.5]])
    assert torch.equal(Unstructured(0.5).keep(scores, dim), mask(kept))


@pytest.mark.parametrize(
    ("sparsity", "size", "zeros"),
    [(0.5, 5, 2), (0.5, 1, 0), (0.1, 7, 0), (0.3, 10, 3), (0.99, 8, 7), (0.29, 100, 28), (0.0, 6, 0)],
)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_unstructured_removes_the_integer_part(sparsity, size, zeros, dim):
    pattern = Unstructured(sparsity)
    scores = torch.arange(float(size)).view((1, size) if dim != 0 else (size, 1))
    kept = pattern.keep(scores, dim)
    assert kept.flatten().tolist() == [False] * zeros + [True] * (size - zeros)
    assert pattern.violations(kept, dim) == 0


# --- both


@st.composite
def cases(draw: st.DrawFn) -> tuple[Pattern, Tensor, int | None]:
    """A pattern, a matrix that can hold it with many ties, an axis."""
    dim = draw(st.sampled_from([0, 1, None]))
    m = draw(st.sampled_from([1, 2, 3, 4, 8, 16, 17, 20]))
    if draw(st.booleans()):
        pattern: Pattern = NM(draw(st.integers(1, m)), m)
        along, across = m * draw(st.integers(1, 3)), draw(st.integers(1, 4))
    else:
        pattern = Unstructured(draw(st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.95])))
        along, across = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    rows, columns = (along, across) if dim == 0 else (across, along)
    values = draw(st.lists(st.integers(0, 3), min_size=rows * columns, max_size=rows * columns))
    return pattern, torch.tensor(values, dtype=torch.float32).view(rows, columns), dim


@pytest.mark.thorough
@pytest.mark.parametrize("way", WAYS)
@given(case=cases())
def test_masks_agree_with_a_slow_loop(way, case):
    pattern, scores, dim = case
    before = scores.clone()
    with pytest.MonkeyPatch.context() as patched:
        only(way, patched)
        kept = pattern.keep(scores, dim)
    assert kept.dtype == torch.bool
    assert torch.equal(kept, slow_keep(pattern, scores, dim))
    assert pattern.violations(kept, dim) == 0
    assert torch.equal(scores, before)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(10, 20), Unstructured(0.5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_scores_in_half_precision_are_ranked_alike(pattern, dtype, dim):
    scores = torch.randint(0, 9, (20, 20), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(pattern.keep(scores.to(dtype), dim), pattern.keep(scores, dim))


# --- counting


def test_violations_counts_the_groups_with_another_number_of_weights():
    keep = mask([[1, 1, 0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0]])
    assert NM(2, 4).violations(keep, 1) == 3
    assert NM(2, 4).violations(keep, None) == 3
    assert NM(2, 4).violations(keep.T, 0) == 3
    assert NM(1, 2).violations(keep, 0) == 4
    assert Unstructured(0.5).violations(keep, 1) == 2
    assert Unstructured(0.5).violations(keep, 0) == 4
    assert Unstructured(0.5).violations(keep, None) == 1
    assert Unstructured(0.625).violations(keep, None) == 0


def test_overfull_and_underfull_count_nonzeros():
    weight = torch.tensor([[1.0, -2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 5.0], [1.0, 1.0, 0.0, 0.0, -1.0, -1.0, -1.0, -1.0]])
    assert (NM(2, 4).overfull(weight, 1), NM(2, 4).underfull(weight, 1)) == (2, 1)
    assert (NM(2, 4).overfull(weight.T, 0), NM(2, 4).underfull(weight.T, 0)) == (2, 1)
    assert (NM(2, 4).overfull(weight, None), NM(2, 4).underfull(weight, None)) == (2, 1)
    assert (NM(1, 2).overfull(weight, 0), NM(1, 2).underfull(weight, 0)) == (3, 1)


# --- settings


def test_names():
    names = [pattern.name for pattern in (NM(2, 4), NM(4, 8), Unstructured(0.5), Unstructured(0.625))]
    assert names == ["2:4", "4:8", "50%", "62.5%"]


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 4), (2.0, 4), (2, 0), (True, 4), ("2", 4), (2, None)])
def test_impossible_nm_is_refused(n, m):
    with pytest.raises(UserError, match=r"pattern\.[nm]="):
        NM(n, m)


@pytest.mark.parametrize("sparsity", [1, 1.0, -0.1, float("nan"), float("inf"), "0.5", True, None])
def test_impossible_sparsity_is_refused(sparsity):
    with pytest.raises(UserError, match=r"pattern\.sparsity="):
        Unstructured(sparsity)


# --- transposable


def best_total(scores: Tensor, n: int) -> float:
    """The highest total score of n kept in each row and column, by linear programming."""
    m = len(scores)
    sums = torch.cat([torch.eye(m).repeat_interleave(m, 1), torch.eye(m).repeat(1, m)])
    bounds = {"A_eq": sums.numpy(), "b_eq": [n] * (2 * m), "bounds": (0, 1)}
    return -float(linprog(-scores.double().flatten().numpy(), **bounds, method="highs-ds").fun)


def test_a_transposable_mask_keeps_the_best_of_all_tiles():
    """The three nines of the first row cannot all stay, nor those of the first column."""
    scores = torch.tensor([[9.0, 9.0, 9.0, 1.0], [9.0, 0.0, 0.0, 3.0], [9.0, 0.0, 1.0, 0.0], [0.0, 4.0, 2.0, 0.0]])
    assert torch.equal(
        TransposableNM(2, 4).keep(scores, 1), mask([[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]])
    )
    assert len(masks._feasible_tiles(2, 4)) == 90


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (4, 4), (3, 5), (4, 8), (2, 8), (8, 16)])
def test_a_transposable_mask_is_optimal_and_holds_along_both_axes(n, m):
    """The gap to the optimum is nil, whether the tiles are compared or solved."""
    pattern, scores = TransposableNM(n, m), torch.randn(2 * m, 3 * m, generator=torch.Generator().manual_seed(m)).abs()
    keep = pattern.keep(scores, 1)
    assert torch.equal(keep, pattern.keep(scores, 0))
    for dim in (0, 1):
        assert NM(n, m).violations(keep, dim) == pattern.violations(keep, dim) == 0
    for tile, kept in zip(scores.unfold(0, m, m).unfold(1, m, m).flatten(0, 1),
                          keep.unfold(0, m, m).unfold(1, m, m).flatten(0, 1), strict=True):  # fmt: skip
        assert float(tile[kept].double().sum()) == pytest.approx(best_total(tile, n), rel=1e-6)
    assert torch.equal(pattern.keep(scores.T, 1), keep.T)


@pytest.mark.parametrize("m", [4, 8])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, 1e30])
def test_a_transposable_mask_of_equal_scores_is_exact(m, value):
    pattern = TransposableNM(m // 2, m)
    assert pattern.violations(pattern.keep(torch.full((16, 16), value), 1), 1) == 0


def test_a_transposable_pattern_must_divide_both_axes_and_counts_along_both():
    pattern = TransposableNM(2, 4)
    for shape, side in (((6, 8), "output"), ((8, 6), "input")):
        with pytest.raises(UserError, match=f"does not divide the {side} axis"):
            pattern.check(shape, 1)
    rows = NM(2, 4).keep(torch.ones(4, 4), 1)  # two whole columns
    assert (pattern.violations(rows, 1), pattern.overfull(rows, 0), pattern.underfull(rows, 1)) == (4, 2, 2)
    assert [NM(2, 4).kernel_ready(dim) for dim in (0, 1)] == [False, True]
    assert [pattern.kernel_ready(dim) for dim in (0, 1)] == [True, True]
    assert not TransposableNM(4, 8).kernel_ready(1)
    assert not Unstructured(0.5).kernel_ready(1)
    assert pattern.settings() == {"name": "2:4 transposable", "n": 2, "m": 4}
