"""Statistics by hand, and that the batch size adds nothing to them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dass_exp.errors import NumericalError
from dass_exp.hessian import HessianFactor
from dass_exp.statistics import Gram, InputMoments, InputNorm, Statistic

CPU = torch.device("cpu")


def observed(kind: type[Statistic], *batches: Tensor) -> Statistic:
    stat = kind(batches[0].shape[-1], CPU)
    for batch in batches:
        stat.update(batch)
    return stat


@pytest.fixture
def inputs() -> Tensor:
    """Five sequences of seven tokens."""
    return torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0))


# --- the input norm


def test_the_norm_runs_over_all_tokens_of_all_sequences():
    first = torch.tensor([[[3.0, 0.0, 1.0], [4.0, 0.0, -1.0]]])
    second = torch.tensor([[[12.0, 0.0, 1.0], [0.0, 0.0, 1.0]]])
    stat = observed(InputNorm, first, second)
    assert stat.norm.tolist() == pytest.approx([13.0, 0.0, 2.0], rel=1e-6)  # a root and its square, by processor
    assert stat.norm.dtype == torch.float32
    assert stat.sequences == 2


def test_an_input_without_a_batch_axis_is_one_sequence(inputs):
    stat = observed(InputNorm, inputs[0])
    assert torch.equal(stat.norm, observed(InputNorm, inputs[:1]).norm)
    assert (stat.sequences, stat.tokens) == (1, 7)


def test_a_reset_leaves_features_that_are_alike_and_independent(inputs):
    norm, gram = observed(InputNorm, inputs), observed(Gram, inputs)
    gram.factor(0.01, 4)
    for stat in (norm, gram):
        stat.reset_to_uniform()
    assert norm.norm.tolist() == [1.0] * 6
    assert torch.equal(gram.matrix, torch.eye(6))
    assert torch.equal(gram.factor(0.01, 4).feedback, torch.eye(6))


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 300.0), (torch.bfloat16, 1.0)])
def test_half_precision_inputs_are_summed_in_float32(dtype, value):
    """300 squared overflows float16; in bfloat16 a sum of ones stops growing at 256."""
    stat = observed(InputNorm, torch.full((4, 256, 1), value, dtype=dtype))
    assert stat.norm.item() == 32 * value
    assert observed(Gram, torch.full((4, 256, 1), value, dtype=dtype)).matrix.item() == 1024 * value**2


@pytest.mark.parametrize(("kind", "total"), [(InputNorm, "squares"), (Gram, "matrix")])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_batch_size_changes_no_bit(kind, total, batch_size, inputs):
    whole, parts = observed(kind, inputs), observed(kind, *inputs.split(batch_size))
    assert torch.equal(getattr(whole, total), getattr(parts, total))
    assert whole.sequences == parts.sequences == 5


@pytest.mark.parametrize("kind", [InputNorm, Gram])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_reported_with_the_layer(kind, bad, inputs):
    stat = observed(kind, inputs)
    stat.check("fine")
    inputs[3, 2, 1] = bad
    stat.update(inputs)
    with pytest.raises(NumericalError, match=r"^model\.layers\.3\.gate: its inputs hold numbers that are not finite"):
        stat.check("model.layers.3.gate")


# --- the Gram matrix


def test_gram_by_hand():
    stat = observed(Gram, torch.tensor([[[1.0, 2.0, 0.0], [3.0, -1.0, 0.0]]]), torch.tensor([[[1.0, 1.0, 0.0]]]))
    assert stat.matrix.tolist() == [[11.0, 0.0, 0.0], [0.0, 6.0, 0.0], [0.0, 0.0, 0.0]]
    assert stat.dead.tolist() == [False, False, True]


def hessian(inputs: Tensor, damping: float) -> Tensor:
    """float64: twice the mean over the sequences of X^T X, ones beside dead features, damped."""
    rows = inputs.double().flatten(0, 1)
    matrix = 2 / len(inputs) * rows.T @ rows
    matrix[range(len(matrix)), range(len(matrix))] += (matrix.diagonal() == 0).double()
    return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)


def root(factor: HessianFactor, tile: int) -> Tensor:
    """R in float64, put together again from the feedback: diagonal tiles hold R_jk / R_kk, those above R R[T, T]^-1."""
    feedback, whole = factor.feedback.double(), torch.zeros_like(factor.feedback, dtype=torch.float64)
    for start in range(0, len(whole), tile):
        now = slice(start, start + tile)
        whole[now, now] = feedback[now, now] * factor.diagonal[now]
        whole[:start, now] = feedback[:start, now] @ whole[now, now]
    return whole


@pytest.mark.parametrize("tile", [1, 2, 4, 6, 128])
@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
def test_the_factor_is_that_of_the_hessian(damping, tile, inputs):
    inputs[:, :, 2] = 0
    factor = observed(Gram, inputs).factor(damping, tile)
    upper = root(factor, tile)
    assert factor.retries == 0
    assert torch.equal(factor.feedback, factor.feedback.triu())
    torch.testing.assert_close(factor.feedback.diagonal(), torch.ones(6))
    assert bool((factor.diagonal > 0).all())
    torch.testing.assert_close(upper @ upper.T, hessian(inputs, damping), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tile", [1, 2])
def test_the_feedback_by_hand(tile):
    """R = [[2, 3, 4], [0, 5, 6], [0, 0, 7]] and H = R R^T, undamped: both tile widths give R_jk / R_kk."""
    factor = factor_of([[2.0, 3.0, 4.0], [0.0, 5.0, 6.0], [0.0, 0.0, 7.0]], tile)
    torch.testing.assert_close(factor.diagonal, torch.tensor([2.0, 5.0, 7.0]))
    torch.testing.assert_close(factor.feedback, torch.tensor([[1.0, 3 / 5, 4 / 7], [0.0, 1.0, 6 / 7], [0.0, 0.0, 1.0]]))


def test_above_the_diagonal_tiles_the_feedback_is_divided_by_the_whole_tile():
    rows = [[2.0, 3.0, 4.0, 1.0], [0.0, 5.0, 6.0, 2.0], [0.0, 0.0, 7.0, 14.0], [0.0, 0.0, 0.0, 2.0]]
    inverse = torch.tensor([[1 / 7, -1.0], [0.0, 0.5]])  # of [[7, 14], [0, 2]]
    expected = torch.tensor([[4.0, 1.0], [6.0, 2.0]]) @ inverse
    torch.testing.assert_close(factor_of(rows, 2).feedback[:2, 2:], expected, rtol=1e-5, atol=1e-5)


def factor_of(upper: list[list[float]], tile: int) -> HessianFactor:
    """The undamped factor of a Hessian R R^T with R = ``upper``."""
    stat, rows = Gram(len(upper), CPU), torch.tensor(upper)
    stat.upper, stat.sequences = rows @ rows.T, 2
    return stat.factor(0.0, tile)


def test_the_factor_is_computed_once_for_each_damping_and_tile_and_again_after_more_inputs(inputs):
    stat = observed(Gram, inputs)
    before = stat.matrix
    first = stat.factor(0.01, 4)
    assert stat.factor(0.01, 4) is first
    assert not torch.equal(stat.factor(0.1, 4).feedback, first.feedback)
    assert not torch.equal(stat.factor(0.01, 2).feedback, first.feedback)
    assert torch.equal(stat.matrix, before)
    stat.update(3 * inputs)
    assert not torch.equal(stat.factor(0.01, 4).feedback, first.feedback)


@pytest.mark.parametrize("features", [6, 256, 300, 600])
def test_a_gram_matrix_that_is_added_up_in_bands_is_whole(features):
    inputs = torch.randn(3, 7, features, generator=torch.Generator().manual_seed(0))
    matrix, rows = observed(Gram, inputs).matrix, inputs.double().flatten(0, 1)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix.double(), rows.T @ rows, rtol=1e-4, atol=1e-4)


def twins() -> Tensor:
    """Two features that are always equal. Their Hessian holds fours, so that its second pivot is exactly zero."""
    return torch.tensor([[[2.0, 2.0]], [[0.0, 0.0]]])


def test_damping_starts_at_a_millionth_when_an_undamped_matrix_is_singular():
    factor = observed(Gram, twins()).factor(0.0, 1)
    assert factor.retries == 1
    assert bool(torch.isfinite(factor.feedback).all())
    assert 1 / factor.diagonal[0].item() == pytest.approx(hessian(twins(), 1e-6).inverse()[0, 0].item() ** 0.5, rel=0.1)


def test_damping_rises_tenfold_until_the_matrix_is_positive_definite():
    stat = observed(Gram, twins())
    # the lowest eigenvalue is -0.3: more than 0.075 of the mean is needed
    stat.upper = torch.tensor([[4.0, 4.3], [4.3, 4.0]])
    factor = stat.factor(0.01, 1)
    assert factor.retries == 1
    upper = root(factor, 1)
    torch.testing.assert_close(upper @ upper.T, torch.tensor([[4.4, 4.3], [4.3, 4.4]]).double(), rtol=1e-3, atol=1e-3)
    assert stat.factor(0.0, 1).retries == 6  # from a millionth to a tenth


def test_giving_up_on_a_singular_matrix_says_how_often_it_was_damped():
    stat = observed(Gram, twins())
    stat.upper = -torch.eye(2)
    with pytest.raises(NumericalError, match="stayed singular after its damping was raised 2 times"):
        stat.factor(0.01, 1, tries=2)


@pytest.mark.parametrize("features", [96, 576])
def test_the_factor_does_not_depend_on_the_number_of_threads(features):
    """LAPACK's does: at 576 features already, in the last digits, and a mask made from it in some weights."""
    inputs = torch.randn(64, 32, features, generator=torch.Generator().manual_seed(0))
    factors = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        factors.append(observed(Gram, inputs).factor(0.01, 4).feedback)
        assert torch.get_num_threads() == threads
    assert torch.equal(factors[0], factors[1])
    assert torch.equal(factors[0], factors[2])


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_normalised_gram_matrix_has_a_unit_diagonal_a_ridge_inverse_and_its_eigenvectors(damping):
    inputs = torch.randn(4, 16, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(12)  # the first is dead
    stat, rows = observed(Gram, inputs), inputs.double().flatten(0, 1)
    gram = rows.T @ rows
    gram += damping * gram.diagonal().mean() * torch.eye(12)
    scale = gram.diagonal().sqrt() + 1e-8
    normalised, expected = stat.normalised(damping), gram / torch.outer(scale, scale)
    torch.testing.assert_close(normalised.scale.double(), scale, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalised.matrix.double(), expected, rtol=1e-5, atol=1e-5)
    inverse = torch.linalg.inv(expected + 0.5 * torch.eye(12))
    torch.testing.assert_close(normalised.inverse(0.5).double(), inverse, rtol=1e-4, atol=1e-4)
    values, vectors = normalised.eigen
    torch.testing.assert_close((vectors * values @ vectors.T).double(), expected, rtol=1e-4, atol=1e-4)
    assert stat.normalised(damping) is normalised
    assert normalised.inverse(0.5) is normalised.inverse(0.5)
    stat.release()
    assert stat.normalised(damping) is not normalised


def test_a_ridge_or_damping_beyond_float32_is_an_error_of_ours():
    stat = observed(Gram, torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(NumericalError, match="cannot be inverted with a ridge of"):
        stat.normalised().inverse(1e300)
    with pytest.raises(NumericalError, match="lower the damping"):
        _ = stat.normalised(1e300).eigen


def test_a_normalised_gram_matrix_does_not_depend_on_the_number_of_threads():
    inputs = torch.randn(64, 32, 300, generator=torch.Generator().manual_seed(0))
    derived = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        normalised = observed(Gram, inputs).normalised(0.01)
        derived.append(torch.stack([normalised.inverse(1.0), normalised.eigen[1]]))
        assert torch.get_num_threads() == threads
    assert torch.equal(derived[0], derived[1])
    assert torch.equal(derived[0], derived[2])


def test_moments_are_those_of_sequences_and_a_uniform_reset_has_no_sum():
    inputs = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    stat = observed(InputMoments, inputs)
    stat.update(torch.empty(0, 5))
    stat.update(torch.empty(1, 0, 5))  # two more sequences, without a token
    torch.testing.assert_close(stat.sums_per_sequence, inputs.sum(1).sum(0) / 5)
    torch.testing.assert_close(stat.variance, inputs.var(1, correction=0).sum(0) / 5)
    torch.testing.assert_close(stat.norm, inputs.flatten(0, 1).norm(dim=0))
    stat.reset_to_uniform()
    assert (stat.sums_per_sequence.tolist(), stat.variance.tolist(), stat.norm.tolist()) == ([0] * 5, [1] * 5, [1] * 5)
    stat.variances[0] = float("nan")
    with pytest.raises(NumericalError, match=r"^layer: "):
        stat.check("layer")
