"""SparseGPT against the paper's algorithm written column by column in float64, and where its Hessian is difficult."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dass_exp import prune
from dass_exp.engine.block_report import BlockReport, Spent
from dass_exp.engine.verify import Layer, verify
from dass_exp.errors import NumericalError, UserError
from dass_exp.masks import NM, Pattern, Unstructured
from dass_exp.methods.base import Block, LinearView, MaskResult, Pruner
from dass_exp.methods.magnitude import Magnitude
from dass_exp.methods.sparsegpt import SparseGPT
from dass_exp.models.decoder import Matrix
from dass_exp.models.families import Q
from dass_exp.statistics import Gram

OUT, IN = 12, 40
DEAD = [3, 8, 9, 10, 11, 24]  # features 8 to 11 are a whole 2:4 tile


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs() -> Tensor:
    """Five sequences of 32 tokens with correlated features, so that errors move between columns."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 32, IN, generator=generator) @ (
        torch.eye(IN) + 0.3 * torch.randn(IN, IN, generator=generator)
    )


def pruned(method: Pruner, weight: Tensor, inputs: Tensor, pattern: Pattern) -> tuple[Tensor, MaskResult]:
    """The weight after pruning, and what was cut."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    gram = Gram(weight.shape[1], weight.device)
    gram.update(inputs)
    view = LinearView("layer.q", Q, Matrix.of(linear), gram)
    return linear.weight.data, method.prune_linear(view, Block("layer", [view]), pattern)


def checked(weight: Tensor, cut: MaskResult, pattern: Pattern) -> Layer:
    """The verified entry of a single linear."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    (layer,) = verify(
        BlockReport("layer", [LinearView("layer.q", Q, Matrix.of(linear), None)], {"layer.q": cut}, None, Spent()),
        pattern,
    )
    return layer


# --- the paper's algorithm


def reference(weight: Tensor, inputs: Tensor, pattern: Pattern, slab: int, damping: float) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of arXiv 2301.00774, dense and in float64: each column's error goes to all columns on its right at once."""
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
            keep[:, j : j + width] = choose(
                weight[:, j : j + width] ** 2 / upper.diagonal()[j : j + width] ** 2, pattern
            )
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


@pytest.mark.parametrize("blocksize", [1, 7, 16, 18, 40, 128])
@pytest.mark.parametrize(
    "pattern", [NM(2, 4), NM(4, 8), NM(3, 5), NM(10, 20), Unstructured(0.5), Unstructured(0.3)], ids=repr
)
def test_agrees_with_the_dense_algorithm(pattern, blocksize, weight, inputs):
    """Slabs that do not divide the 40 columns, tiles that are wider than a slab or a strip, sparsities that leave a remainder."""
    expected, mask = reference(weight, inputs, pattern, blocksize, damping=0.01)
    found, cut = pruned(SparseGPT(blocksize), weight, inputs, pattern)
    assert torch.equal(cut.keep, mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    assert checked(found, cut, pattern).excess == 0
    assert cut.retries == 0


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_damping_is_a_multiple_of_the_mean_diagonal(damping, weight, inputs):
    expected, mask = reference(weight, inputs, NM(2, 4), 128, damping)
    found, cut = pruned(SparseGPT(damping=damping), weight, inputs, NM(2, 4))
    assert torch.equal(cut.keep, mask)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_one_column_by_hand():
    """X^T X is [[5, 3], [3, 5]]: the weight 1 that is cut moves to its neighbour as 1 * 3/5."""
    inputs = torch.tensor([[[2.0, 2.0], [1.0, -1.0]]])
    found, cut = pruned(SparseGPT(damping=0.0), torch.tensor([[1.0, 4.0]]), inputs, NM(1, 2))
    assert cut.keep.tolist() == [[False, True]]
    assert found.tolist() == [[0.0, pytest.approx(4.6, abs=1e-5)]]


@pytest.mark.parametrize(("pattern", "columns"), [(NM(2, 4), None), (Unstructured(0.5), 4)], ids=repr)
def test_the_score_range_spans_all_tiles(pattern, columns):
    """One token per feature: the Hessian is 2, so that the score is 2 w^2."""
    weight = torch.tensor([[9.0, 1.0, 2.0, 3.0, 0.5, 4.0, 4.0, 4.0, 2.0, 2.0, 2.0, 2.0]])
    found, cut = pruned(SparseGPT(blocksize=4, damping=0.0), weight, torch.eye(12)[None], pattern)
    assert torch.equal(found, weight * cut.keep)
    assert (cut.low, cut.high) == (pytest.approx(0.5), pytest.approx(162.0))
    assert cut.columns == columns


@pytest.mark.parametrize(
    ("pattern", "blocksize", "columns"),
    [(NM(2, 4), 18, 16), (NM(3, 5), 16, 15), (NM(10, 20), 16, 20), (Unstructured(0.5), 18, 18)],
)
def test_slabs_hold_whole_tiles(pattern, blocksize, columns):
    assert SparseGPT(blocksize).columns(pattern) == columns


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5)], ids=repr)
def test_the_output_error_is_below_that_of_magnitude_and_of_the_same_mask_alone(pattern, weight, inputs):
    rows = inputs.flatten(0, 1)

    def error(changed: Tensor) -> float:
        return float((rows @ (changed - weight).T).norm())

    found, cut = pruned(SparseGPT(), weight, inputs, pattern)
    assert error(found) < error(pruned(Magnitude(), weight, inputs, pattern)[0])
    assert error(found) < 0.8 * error(weight * cut.keep)


def test_bfloat16_weights_are_pruned_in_float32_and_rounded_once(weight, inputs):
    exact, cut = pruned(SparseGPT(), weight.bfloat16().float(), inputs, NM(2, 4))
    found, rounded = pruned(SparseGPT(), weight.bfloat16(), inputs, NM(2, 4))
    assert torch.equal(rounded.keep, cut.keep)
    assert torch.equal(found, exact.bfloat16())


# --- dead features and singular Hessians


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5)], ids=repr)
def test_dead_columns_leave_the_mask_exact_and_the_weights_zero(pattern, weight, inputs):
    inputs[:, :, DEAD] = 0
    expected, mask = reference(weight, inputs, pattern, 16, damping=0.01)
    found, cut = pruned(SparseGPT(blocksize=16), weight, inputs, pattern)
    layer = checked(found, cut, pattern)
    assert layer.zeros == OUT * IN // 2
    assert torch.equal(cut.keep, mask)
    assert not found[:, DEAD].any()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_a_dead_tile_is_under_full_and_counted(weight, inputs):
    inputs[:, :, DEAD] = 0
    found, cut = pruned(SparseGPT(), weight, inputs, NM(2, 4))
    layer = checked(found, cut, NM(2, 4))
    assert (layer.underfull, layer.excess) == (OUT, 2 * OUT)
    assert NM(2, 4).overfull(found, 1) == 0


def test_inputs_that_never_fire_still_give_the_exact_mask(weight):
    found, cut = pruned(SparseGPT(), weight, torch.zeros(2, 8, IN), NM(2, 4))
    assert checked(found, cut, NM(2, 4)).zeros == OUT * IN // 2
    assert not found.any()


def test_a_singular_hessian_is_damped_and_the_retries_are_noted(weight):
    twins = torch.zeros(2, 1, IN)
    twins[0] = 2.0  # all features equal: the second pivot is exactly zero
    found, cut = pruned(SparseGPT(damping=0.0), weight, twins, NM(2, 4))
    layer = checked(found, cut, NM(2, 4))
    assert layer.damping_retries == cut.retries > 0
    assert bool(torch.isfinite(found).all())


def test_a_weight_that_is_not_finite_names_the_layer(weight, inputs):
    weight[5, 30] = float("nan")
    with pytest.raises(NumericalError, match=r"^layer\.q: "):
        pruned(SparseGPT(), weight, inputs, NM(2, 4))


@pytest.mark.parametrize(
    "settings", [{"blocksize": 0}, {"blocksize": 12.5}, {"damping": -0.01}, {"damping": float("nan")}, {"damping": "1"}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=rf"method\.{next(iter(settings))}="):
        SparseGPT(**settings)


# --- in the engine


@pytest.mark.parametrize(("scope", "inputs_of_a_block"), [("mlp", 2), ("attention", 2), ("all", 4)])
def test_linears_with_one_input_share_one_factor(scope, inputs_of_a_block, tiny_model, tokens, monkeypatch):
    calls = []
    inner = torch.linalg.cholesky_ex
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda *args, **kwargs: calls.append(args) or inner(*args, **kwargs)
    )
    layers = prune(tiny_model("llama"), tokens, "sparsegpt", scope=scope).layers
    assert sum(layer.damping_retries for layer in layers) == 0
    assert len(calls) == 2 * inputs_of_a_block  # two blocks
