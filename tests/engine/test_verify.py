"""Verification: each way in which a method can go wrong raises, and what is merely sparser than required is counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dass_exp.engine.callbacks import BlockReport
from dass_exp.engine.verify import Layer, VerificationError, verify
from dass_exp.errors import NumericalError
from dass_exp.masks import NM, Pattern, Unstructured
from dass_exp.methods.base import LinearView, MaskResult
from dass_exp.models.decoder import Matrix
from dass_exp.models.families import DOWN, GATE, Q, Role

WEIGHT = [[1.0, 2.0, 0.0, 0.0, 3.0, 0.0, 4.0, 0.0], [0.0, 5.0, 6.0, 0.0, 0.0, 0.0, 7.0, 8.0]]


def view_of(weight: Tensor, name: str = "block.down", role: Role = DOWN) -> LinearView:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight
    return LinearView(name, role, Matrix.of(module), None)


def verified(weight: Tensor, keep: Tensor, pattern: Pattern, dim: int | None = 1, width: int | None = None) -> Layer:
    """The verified entry of a single linear."""
    result = MaskResult(keep, dim, 0.5, 8.0, slab_width=width, damping_retries=2, seconds=0.25)
    (layer,) = verify(
        BlockReport(0, "block", torch.nn.Identity(), [view_of(weight)], {"block.down": result}, 0.125), pattern
    )
    return layer


@pytest.fixture
def weight() -> Tensor:
    """2:4 along the input axis, without excess."""
    return torch.tensor(WEIGHT)


@pytest.fixture
def keep(weight) -> Tensor:
    return weight != 0


def test_a_correct_layer_by_hand(weight, keep):
    assert verified(weight, keep, NM(2, 4)) == Layer(
        name="block.down",
        role="down",
        zeros=8,
        size=16,
        axis="input",
        kernel_ready=True,
        excess=0,
        underfull=0,
        score_low=0.5,
        score_high=8.0,
        block_error=0.125,
        seconds=0.25,
        damping_retries=2,
        tokens=None,
    )


@pytest.mark.parametrize(("pattern", "underfull"), [(NM(2, 4), 2), (Unstructured(0.5), 0)])
def test_zeros_beyond_the_mask_are_excess_and_leave_groups_under_full(pattern, underfull, weight, keep):
    weight[0, :2] = 0
    weight[1, 7] = 0
    layer = verified(weight, keep, pattern)
    assert (layer.zeros, layer.excess, layer.underfull) == (8, 3, underfull)


@pytest.mark.parametrize(
    ("pattern", "dim", "ready", "axis"),
    [
        (NM(2, 4), 1, True, "input"),
        (NM(2, 4), 0, False, "output"),
        (NM(4, 8), 1, False, "input"),
        (Unstructured(0.5), 1, False, "input"),
        (Unstructured(0.5), None, False, "matrix"),
    ],
)
def test_only_2of4_along_the_input_axis_is_ready_for_a_stock_kernel(pattern, dim, ready, axis):
    weight = pattern.keep(torch.rand(8, 8), dim).float()
    layer = verified(weight, weight != 0, pattern, dim)
    assert (layer.kernel_ready, layer.axis) == (ready, axis)


# --- what is wrong


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 0)])
def test_a_mask_with_one_weight_too_few_or_too_many(row, column, weight, keep):
    keep[row, column] = ~keep[row, column]
    message = r"block\.down: 1 groups of its mask do not have the sparsity of 2:4 along the input axis"
    with pytest.raises(VerificationError, match=message):
        verified(weight * keep, keep, NM(2, 4))


def test_a_mask_with_the_right_total_in_the_wrong_groups(weight, keep):
    keep[0, 0], keep[0, 5] = False, True
    with pytest.raises(VerificationError, match="2 groups of its mask"):
        verified(weight * keep, keep, NM(2, 4))
    assert verified(weight * keep, keep, Unstructured(0.5)).zeros == 8


def test_a_mask_along_the_other_axis():
    weight = NM(2, 4).keep(torch.arange(64.0).view(8, 8).flip(0), 0).float()
    assert verified(weight, weight != 0, NM(2, 4), 0).zeros == 32
    with pytest.raises(VerificationError, match=r"16 groups .* along the input axis"):
        verified(weight, weight != 0, NM(2, 4), 1)


@pytest.mark.parametrize(("dim", "count"), [(1, 2), (0, 8), (None, 1)])
def test_an_unstructured_mask_that_misses_its_sparsity(dim, count, weight, keep):
    with pytest.raises(VerificationError, match=f"{count} groups of its mask do not have the sparsity of 50%"):
        verified(weight, torch.ones_like(keep), Unstructured(0.5), dim)


def test_slabs_that_were_ranked_apart_are_checked_apart():
    keep = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 1]], dtype=torch.bool)
    assert verified(keep.float(), keep, Unstructured(0.5), None, width=2).zeros == 5
    moved = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 0, 1]], dtype=torch.bool)
    assert verified(moved.float(), moved, Unstructured(0.5), None).zeros == 5
    with pytest.raises(VerificationError, match="2 groups of its mask"):
        verified(moved.float(), moved, Unstructured(0.5), None, width=2)


def test_a_weight_that_survives_its_mask(weight, keep):
    weight[0, 2] = weight[1, 4] = 1e-30
    with pytest.raises(VerificationError, match=r"block\.down: 2 weights are not zero although the mask removes them"):
        verified(weight, keep, NM(2, 4))


def test_an_over_full_group_even_if_its_mask_is_not_noticed(weight):
    class Lenient(NM):
        """Its count of violations is broken."""

        def violations(self, mask: Tensor, dim: int | None) -> int:
            return 0

    weight[0, 2] = weight[0, 3] = 1.0
    with pytest.raises(VerificationError, match="1 groups hold more than 2 of 4 weights"):
        verified(weight, weight != 0, Lenient(2, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(bad, weight, keep):
    weight[1, 1] = bad
    with pytest.raises(NumericalError, match=r"block\.down: its pruned weights hold numbers that are not finite"):
        verified(weight, keep, NM(2, 4))


def test_a_linear_that_was_not_pruned(weight, keep):
    views = [view_of(weight, "block.gate", GATE), view_of(weight, "block.q", Q)]
    report = BlockReport(0, "block", torch.nn.Identity(), views, {"block.gate": MaskResult(keep, 1, 0.0, 1.0)}, None)
    with pytest.raises(VerificationError, match=r"block\.q: it lies in the scope, and the method did not prune it"):
        verify(report, NM(2, 4))


@pytest.mark.parametrize("mask", [torch.ones(2, 4, dtype=torch.bool), torch.tensor(WEIGHT)], ids=["shape", "dtype"])
def test_a_mask_of_another_shape_or_type(mask, weight):
    message = r"block\.down: its mask is torch\.\w+ \[2, \d\], the weight is \[2, 8\]"
    with pytest.raises(VerificationError, match=message):
        verified(weight, mask, NM(2, 4))
