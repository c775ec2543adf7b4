"""ALPS by hand and against its algorithm with explicit inverses in float64."""

from __future__ import annotations

import pytest
import torch
from engine_support import output_error
from engine_support import prune_matrix as pruned
from support import IN, OUT
from torch import Tensor

from dass_exp.errors import UserError
from dass_exp.masks import NM, Pattern, TransposableNM, Unstructured
from dass_exp.methods.admm import ADMM
from dass_exp.methods.alps import ALPS


def reference(weight: Tensor, inputs: Tensor, pattern: Pattern, method: ALPS) -> tuple[Tensor, Tensor]:
    """The published algorithm, transposed as there: B is [in, out]."""
    rows = inputs.double().flatten(0, 1)
    gram = rows.T @ rows
    gram += method.damping * gram.diagonal().mean() * torch.eye(len(gram))
    scale = gram.diagonal().sqrt() + 1e-8
    gram, eye = gram / torch.outer(scale, scale), torch.eye(len(gram), dtype=torch.float64)

    def support(b: Tensor) -> Tensor:
        return pattern.keep(b.T.abs(), 1 if isinstance(pattern, NM) else None).T

    first = (weight.double() * scale).T
    y, k = gram @ first, int(support(first).sum())
    b, d, v, rho, last, started = (
        first,
        first * support(first),
        torch.zeros_like(first),
        method.rho,
        support(first),
        False,
    )
    for iteration in range(1, method.iterations + 1):
        b = torch.linalg.inv(gram + rho * eye) @ (y - v + rho * d)
        d = (b + v / rho) * support(b + v / rho)
        v = v + rho * (b - d)
        if iteration % 3 == 0:
            current = d != 0
            c, last = int((current != last).sum()), current
            started = started or c > 0.005 * k
            if (started and c < 0.5) or (iteration > 30 and c / k < 3e-4):
                break
            if started:
                rho = min(1e6, rho * (1.3 if c > 0.1 * k else 1.2 if c > 0.005 * k else 1.1))
            else:
                rho = rho / 5
                if c > 0.5:
                    b, d, v, last = first, first * support(first), torch.zeros_like(first), support(first)
    keep = support(b)
    for column in range(b.shape[1]):  # the exact solution, which conjugate gradients approach
        kept = keep[:, column].nonzero()[:, 0]
        b[:, column] = 0
        b[kept, column] = torch.linalg.solve(gram[kept][:, kept], y[kept, column])
    return (b.T / scale), keep.T


@pytest.mark.parametrize(
    "pattern", [NM(2, 4), NM(4, 8), NM(1, 4), TransposableNM(2, 4), Unstructured(0.5), Unstructured(0.7)], ids=repr
)
@pytest.mark.parametrize("method", [ALPS(cg_steps=60), ALPS(damping=0.1, rho=1.0, cg_steps=60)], ids=repr)
def test_agrees_with_the_algorithm_in_float64(pattern, method, weight, inputs):
    expected, mask = reference(weight, inputs, pattern, method)
    after, result, _ = pruned(method, weight, inputs, pattern)
    assert torch.equal(result.keep, mask)
    assert output_error(after, expected, inputs) < 0.01 * output_error(expected, weight, inputs)


def test_two_rows_by_hand():
    """Inputs without correlation: each weight stays as it is, and the largest |w| * norm stay.

    The dual variable lets a removed weight grow by its own size in each iteration, so those are smaller by far.
    """
    weight = torch.tensor([[10.0, -0.1, 0.2, 50.0], [80.0, 0.1, -0.3, 30.0]])
    inputs = torch.diag(torch.tensor([8.0, 1.0, 1.0, 3.0]))[None]  # scores 80 0.1 0.2 150 and 640 0.1 0.3 90
    for pattern, mask in ((NM(2, 4), [[1, 0, 0, 1], [1, 0, 0, 1]]), (NM(1, 2), [[1, 0, 0, 1], [1, 0, 0, 1]])):
        after, result, _ = pruned(ALPS(damping=0.0), weight, inputs, pattern)
        assert result.keep.int().tolist() == mask
        torch.testing.assert_close(after, weight * result.keep, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), Unstructured(0.5)], ids=repr)
def test_the_output_error_is_below_that_of_the_mask_alone_and_of_admm(pattern, weight, inputs):
    after, result, _ = pruned(ALPS(), weight, inputs, pattern)
    assert output_error(after, weight, inputs) < 0.5 * output_error(weight * result.keep, weight, inputs)
    assert output_error(after, weight, inputs) < output_error(
        pruned(ADMM(), weight, inputs, pattern)[0], weight, inputs
    )


def test_conjugate_gradients_lower_the_error_step_by_step(weight, inputs):
    errors = [
        output_error(pruned(ALPS(cg_steps=steps), weight, inputs, NM(2, 4))[0], weight, inputs)
        for steps in (0, 1, 3, 9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=repr)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_dead_inputs_keep_the_sparsity_exact(damping, pattern, weight, inputs):
    inputs[:, :, [0, 1, 9]] = 0
    after, _, layer = pruned(ALPS(damping), weight, inputs, pattern)
    assert (layer.zeros, layer.excess) == (OUT * IN // 2, 0)
    assert bool(after.isfinite().all())


@pytest.mark.parametrize("settings", [{"damping": -1}, {"rho": 0}, {"iterations": 0}, {"cg_steps": -1}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=rf"method\.{next(iter(settings))}="):
        ALPS(**settings)
