"""SparseGPT against the paper's algorithm written column by column in float64, and where its Hessian is difficult."""

from __future__ import annotations

import pytest
import torch
from engine_support import output_error
from engine_support import prune_matrix as pruned
from support import IN, OUT
from torch import Tensor

from dass_exp.api import load
from dass_exp.config.settings import CalibrationConfig
from dass_exp.data.texts import OfflineText
from dass_exp.data.tokens import calibration_tokens
from dass_exp.engine.verify import Layer
from dass_exp.errors import UserError
from dass_exp.masks import NM, Pattern, Unstructured
from dass_exp.methods.magnitude import Magnitude
from dass_exp.methods.sparsegpt import SparseGPT, _prune_tile, _prune_tile_in_few_launches

DEAD = [3, 8, 9, 10, 11, 24]  # features 8 to 11 are a whole 2:4 tile


# --- the paper's algorithm


def reference(weight: Tensor, inputs: Tensor, pattern: Pattern, slab: int, damping: float) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of arXiv 2301.00774 in float64: each column's error goes to all columns on its right at once."""
    rows, weight = inputs.double().flatten(0, 1), weight.double().clone()
    hessian = 2 / len(inputs) * rows.T @ rows
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    keep = torch.zeros(weight.shape, dtype=torch.bool)
    width = pattern.m if isinstance(pattern, NM) else slab
    for j in range(weight.shape[1]):
        if j % width == 0:
            tile = slice(j, j + width)
            keep[:, tile] = choose(weight[:, tile] ** 2 / upper.diagonal()[tile] ** 2, pattern)
        error = weight[:, j] * ~keep[:, j] / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
        weight[~keep[:, j], j] = 0
    return weight, keep


def choose(scores: Tensor, pattern: Pattern) -> Tensor:
    """The best n of each row of a tile, or the best of a whole slab."""
    groups = scores if isinstance(pattern, NM) else scores.reshape(1, -1)
    stay = pattern.n if isinstance(pattern, NM) else groups.shape[1] - int(pattern.sparsity * groups.shape[1])
    best = groups.sort(dim=1, descending=True, stable=True).indices[:, :stay]
    return torch.zeros(groups.shape, dtype=torch.bool).scatter(1, best, True).view(scores.shape)


def assert_agrees(method: SparseGPT, weight: Tensor, inputs: Tensor, pattern: Pattern) -> tuple[Tensor, Layer]:
    """Mask and weights are those of the reference; the pruned weight and its verified entry."""
    expected, mask = reference(weight, inputs, pattern, method.blocksize, method.damping)
    after, result, layer = pruned(method, weight, inputs, pattern)
    assert torch.equal(result.keep, mask)
    torch.testing.assert_close(after.double(), expected, rtol=1e-3, atol=1e-3)
    return after, layer


@pytest.mark.parametrize("blocksize", [1, 7, 16, 18, 40, 128])
@pytest.mark.parametrize(
    "pattern", [NM(2, 4), NM(4, 8), NM(3, 5), NM(10, 20), Unstructured(0.5), Unstructured(0.3)], ids=repr
)
def test_agrees_with_the_dense_algorithm(pattern, blocksize, weight, inputs):
    """Slabs that do not divide the 40 columns, tiles wider than a slab or strip, sparsities that leave a remainder."""
    _, layer = assert_agrees(SparseGPT(blocksize), weight, inputs, pattern)
    assert (layer.excess, layer.damping_retries) == (0, 0)


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_damping_is_a_multiple_of_the_mean_diagonal(damping, weight, inputs):
    assert_agrees(SparseGPT(damping=damping), weight, inputs, NM(2, 4))


def test_one_column_by_hand():
    """X^T X is [[5, 3], [3, 5]]: the weight 1 that is removed moves to its neighbour as 1 * 3/5."""
    inputs = torch.tensor([[[2.0, 2.0], [1.0, -1.0]]])
    after, result, _ = pruned(SparseGPT(damping=0.0), torch.tensor([[1.0, 4.0]]), inputs, NM(1, 2))
    assert result.keep.tolist() == [[False, True]]
    assert after.tolist() == [[0.0, pytest.approx(4.6, abs=1e-5)]]


@pytest.mark.parametrize(
    ("columns", "pattern"), [(4, NM(2, 4)), (128, Unstructured(0.5)), (37, Unstructured(0.7))], ids=str
)
def test_a_tile_in_few_launches_is_the_tile_column_by_column(columns, pattern):
    weight, feedback = torch.randn(columns, 24), 0.1 * torch.randn(columns, columns)
    keep = pattern.keep(weight.abs(), 0 if isinstance(pattern, NM) else None)
    expected, solved = weight.double(), weight.clone()
    _prune_tile(expected, keep, feedback.double())
    _prune_tile_in_few_launches(solved, keep, feedback)
    assert torch.all(solved[~keep] == 0)
    torch.testing.assert_close(solved, expected.float(), atol=1e-5, rtol=0)
    with pytest.raises(AssertionError):  # the feedback matters
        torch.testing.assert_close(solved, weight * keep, atol=1e-2, rtol=0)


@pytest.mark.parametrize(("pattern", "width"), [(NM(2, 4), None), (Unstructured(0.5), 4)], ids=repr)
def test_the_score_range_spans_all_tiles(pattern, width):
    """One token per feature: the Hessian is 2, so that the score is 2 w^2."""
    weight = torch.tensor([[9.0, 1.0, 2.0, 3.0, 0.5, 4.0, 4.0, 4.0, 2.0, 2.0, 2.0, 2.0]])
    after, result, _ = pruned(SparseGPT(blocksize=4, damping=0.0), weight, torch.eye(12)[None], pattern)
    assert torch.equal(after, weight * result.keep)
    assert (result.low, result.high) == (pytest.approx(0.5), pytest.approx(162.0))
    assert result.slab_width == width


@pytest.mark.parametrize(
    ("pattern", "blocksize", "width"),
    [(NM(2, 4), 18, 16), (NM(3, 5), 16, 15), (NM(10, 20), 16, 20), (Unstructured(0.5), 18, 18)],
)
def test_slabs_hold_whole_tiles(pattern, blocksize, width):
    assert SparseGPT(blocksize).slab_width(pattern) == width


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5)], ids=repr)
def test_the_output_error_is_below_that_of_magnitude_and_of_the_same_mask_alone(pattern, weight, inputs):
    rows = inputs.flatten(0, 1)

    def error(changed: Tensor) -> float:
        return float((rows @ (changed - weight).T).norm())

    after, result, _ = pruned(SparseGPT(), weight, inputs, pattern)
    assert error(after) < error(pruned(Magnitude(), weight, inputs, pattern)[0])
    assert error(after) < 0.8 * error(weight * result.keep)


def test_bfloat16_weights_are_pruned_in_float32_and_rounded_once(weight, inputs):
    exact, expected, _ = pruned(SparseGPT(), weight.bfloat16().float(), inputs, NM(2, 4))
    rounded, result, _ = pruned(SparseGPT(), weight.bfloat16(), inputs, NM(2, 4))
    assert torch.equal(result.keep, expected.keep)
    assert torch.equal(rounded, exact.bfloat16())


# --- dead features and singular Hessians


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5)], ids=repr)
def test_dead_columns_leave_the_mask_exact_and_the_weights_zero(pattern, weight, inputs):
    inputs[:, :, DEAD] = 0
    after, layer = assert_agrees(SparseGPT(blocksize=16), weight, inputs, pattern)
    assert layer.zeros == OUT * IN // 2
    assert not after[:, DEAD].any()


def test_a_dead_tile_is_under_full_and_counted(weight, inputs):
    inputs[:, :, DEAD] = 0
    after, _, layer = pruned(SparseGPT(), weight, inputs, NM(2, 4))
    assert (layer.underfull, layer.excess) == (OUT, 2 * OUT)
    assert NM(2, 4).overfull(after, 1) == 0


def test_inputs_that_never_fire_still_give_the_exact_mask(weight):
    after, _, layer = pruned(SparseGPT(), weight, torch.zeros(2, 8, IN), NM(2, 4))
    assert layer.zeros == OUT * IN // 2
    assert not after.any()


def test_a_singular_hessian_is_damped_and_the_retries_are_counted(weight):
    twins = torch.zeros(2, 1, IN)
    twins[0] = 2.0  # all features equal: the second pivot is exactly zero
    after, _, layer = pruned(SparseGPT(damping=0.0), weight, twins, NM(2, 4))
    assert layer.damping_retries > 0
    assert bool(torch.isfinite(after).all())


@pytest.mark.parametrize(
    "settings", [{"blocksize": 0}, {"blocksize": 12.5}, {"damping": -0.01}, {"damping": float("nan")}, {"damping": "1"}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=rf"method\.{next(iter(settings))}="):
        SparseGPT(**settings)


# --- on a real model


@pytest.mark.slow
def test_a_real_models_errors_are_those_of_float64():
    """Blocks from first to last on equal inputs: what differs in perplexity between runs is the walk, not the solver.

    The reference takes a minute for four blocks, since it goes column by column through 1,536 columns.
    """
    model, tokenizer = load()
    config = CalibrationConfig("c4_mini", num_samples=4, seq_len=512)
    ids = calibration_tokens(OfflineText("c4"), config, tokenizer, "never", 0).ids
    for block in (0, 9, 19, 29):
        down, seen = model.model.layers[block].mlp.down_proj, []
        handle = down.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0]))
        with torch.no_grad():
            model(ids)
        handle.remove()
        weight, inputs = down.weight.detach().float(), seen[0].float()
        exact, mask = reference(weight, inputs, NM(2, 4), 128, 0.01)
        after, result, _ = pruned(SparseGPT(), weight, inputs, NM(2, 4))
        size = float((inputs.double().flatten(0, 1) @ weight.double().T).norm())
        ours, theirs = (output_error(each, weight, inputs) / size for each in (after, exact))
        assert ours == pytest.approx(theirs, rel=1e-5), block
        assert (result.keep != mask).float().mean() <= 1e-4, block
