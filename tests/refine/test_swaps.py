"""Swaps by hand, against the definition of the error in float64, and that no swap raises it."""

from __future__ import annotations

import pytest
import torch
from engine_support import output_error, view_of
from torch import Tensor

from dass_exp.errors import UserError
from dass_exp.masks import NM, Pattern, TransposableNM, Unstructured
from dass_exp.methods.base import MaskResult
from dass_exp.refine.none import NoRefinement
from dass_exp.refine.swaps import Swaps


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(20, 40, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 32, 40, generator=generator) @ (
        torch.eye(40) + 0.4 * torch.randn(40, 40, generator=generator)
    )


def refined(weight: Tensor, inputs: Tensor, pattern: Pattern, keep: Tensor, dim: int | None, **more: int) -> Tensor:
    sweeps = {"sweeps": more.pop("sweeps")} if "sweeps" in more else {}
    return Swaps(**sweeps).refine(view_of(weight, inputs), weight, MaskResult(keep, dim, 0.0, 1.0, **more), pattern)


CASES = [
    (NM(2, 4), 1, {}), (NM(4, 8), 1, {}), (NM(1, 4), 1, {}), (NM(8, 20), 1, {}), (NM(2, 4), 0, {}), (NM(5, 10), 0, {}),
    (Unstructured(0.5), 1, {}), (Unstructured(0.6), 0, {}), (Unstructured(0.7), None, {}),
    (Unstructured(0.5), None, {"slab_width": 16}),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "dim", "slab"), CASES, ids=str)
def test_every_sweep_lowers_the_error_and_each_group_keeps_its_number(pattern, dim, slab, weight, inputs):
    slabs = weight.abs().split(slab.get("slab_width", 40), 1)
    keep = torch.cat([pattern.keep(part, dim) for part in slabs], 1)
    errors = [output_error(weight * keep, weight, inputs)]
    for sweeps in (1, 2, 3, 10):
        after = refined(weight, inputs, pattern, keep, dim, sweeps=sweeps, **slab)
        parts = after.split(slab.get("slab_width", 40), 1)
        assert sum(pattern.violations(part, dim) for part in parts) == 0
        errors.append(output_error(weight * after, weight, inputs))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]
    again = refined(weight, inputs, pattern, after, dim, **slab)
    assert output_error(weight * again, weight, inputs) <= errors[-1]


def change(weight: Tensor, inputs: Tensor, keep: Tensor, swap: list[tuple[int, int]]) -> float:
    """The change of the squared error, by its definition, when these entries of the mask are inverted."""
    other = keep.clone()
    for entry in swap:
        other[entry] ^= True
    before, after = (output_error(weight * mask, weight, inputs) ** 2 for mask in (keep, other))
    return (after - before) / before


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 5)], ids=repr)
@pytest.mark.parametrize("dim", [0, 1])
def test_no_swap_is_left_that_lowers_the_error(pattern, dim, weight, inputs):
    keep = refined(weight, inputs, pattern, pattern.keep(weight.abs(), dim), dim, sweeps=100)
    for row in range(20):
        for column in range(40):
            if not keep[row, column]:
                continue
            first = (row, column)[dim] // pattern.m * pattern.m
            members = [(row, first + k) if dim else (first + k, column) for k in range(pattern.m)]
            changes = [change(weight, inputs, keep, [(row, column), other]) for other in members if not keep[other]]
            assert min(changes) > -1e-5


def test_two_rows_by_hand():
    """Inputs 1 and 2 always equal: with weights 3 and -3 they cancel, so to remove both costs nothing.

    The other two have norm 1 and weights 2 and 1; the best mask keeps them, by magnitude it keeps the pair.
    """
    weight = torch.tensor([[3.0, -3.0, 2.0, 1.0], [3.0, 3.0, 2.0, 1.0]])
    inputs = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    keep = NM(2, 4).keep(weight.abs(), 1)
    assert keep.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    # row 1: any single swap leaves 3 or -3 alone, which costs 9: a swap cannot leave this minimum
    assert refined(weight, inputs, NM(2, 4), keep, 1).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    keep = torch.tensor([[True, False, True, False], [False, True, False, True]])  # costs 9 + 1, and 9 + 4
    # row 1: removing 3 for 1 frees the error of the pair; row 2: 3 for 1 does
    assert refined(weight, inputs, NM(2, 4), keep, 1).int().tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert refined(weight, inputs, Unstructured(0.5), keep, 1).int().tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]


def test_a_column_gets_its_best_mask_by_hand():
    """Without correlations a removal costs w^2 times the square of the norm: swaps find the largest of each column."""
    weight = torch.tensor([[1.0, 4.0], [2.0, 3.0], [3.0, 2.0], [4.0, 1.0]])
    keep = torch.tensor([[True, False], [True, False], [False, True], [False, True]])
    after = refined(weight, torch.eye(2)[None], NM(2, 4), keep, 0)
    assert after.int().tolist() == [[0, 1], [0, 1], [1, 0], [1, 0]]


def test_inputs_that_never_fire_change_nothing(weight):
    for pattern, dim in ((NM(2, 4), 1), (NM(2, 4), 0), (Unstructured(0.5), None)):
        keep = pattern.keep(weight.abs(), dim)
        assert torch.equal(refined(weight, torch.zeros(1, 4, 40), pattern, keep, dim), keep)


def test_what_cannot_be_refined_is_refused():
    with pytest.raises(UserError, match=r"refine=swaps with pattern 2:4 transposable: .* choose a pattern"):
        Swaps().check(TransposableNM(2, 4))
    with pytest.raises(UserError, match=r"refine\.sweeps=0"):
        Swaps(sweeps=0)


def test_none_returns_the_mask_itself(weight, inputs):
    result = MaskResult(weight > 0, 1, 0.0, 1.0)
    assert NoRefinement().refine(view_of(weight, inputs), weight, result, NM(2, 4)) is result.keep
    assert NoRefinement.stat is None
