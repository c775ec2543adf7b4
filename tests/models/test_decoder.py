"""Matrices: [out, in] however the model stores them; writing one changes no other weight."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dass_exp.models.decoder import Matrix


@pytest.mark.parametrize(
    ("shape", "place", "expected"),
    [
        ((2, 3), {}, [[1, 2, 3], [4, 5, 6]]),
        ((2, 3), {"transposed": True}, [[1, 4], [2, 5], [3, 6]]),
        ((4, 2), {"rows": slice(1, 3)}, [[3, 4], [5, 6]]),
        ((4, 2), {"rows": [3, 0]}, [[7, 8], [1, 2]]),
        ((2, 4), {"transposed": True, "rows": slice(2, 4)}, [[3, 7], [4, 8]]),
        ((2, 2, 2), {"expert": 1}, [[5, 6], [7, 8]]),
        ((2, 4, 1), {"expert": 1, "rows": slice(2, 4)}, [[7], [8]]),
    ],
)
def test_a_matrix_is_read_and_written_in_place(shape, place, expected):
    parameter = nn.Parameter(torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape))
    matrix = Matrix(nn.Identity(), parameter, **place)
    assert matrix.weight.tolist() == expected
    assert (matrix.out_features, matrix.in_features) == (len(expected), len(expected[0]))
    before, keep = parameter.detach().clone(), torch.ones(matrix.weight.shape, dtype=torch.bool)
    keep[0, 0] = False
    matrix.zero(keep)
    assert matrix.weight[0, 0] == 0
    assert int((parameter != before).sum()) == 1
    matrix.write(torch.full_like(matrix.weight, -1))
    assert int((parameter == -1).sum()) == int((parameter != before).sum()) == keep.numel()
    matrix.write(torch.tensor(expected, dtype=torch.float32))
    assert torch.equal(parameter, before)


def test_linear_and_conv1d_compute_what_their_matrix_says():
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    linear, conv = nn.Linear(3, 4, bias=False), Conv1D(4, 3)
    for matrix, module in ((Matrix.of(linear), linear), (Matrix(conv, conv.weight, transposed=True), conv)):
        torch.testing.assert_close(module(inputs), inputs @ matrix.weight.T)


@pytest.mark.parametrize("rows", [None, slice(0, 2), [0, 1]])
def test_a_written_weight_is_rounded_to_the_models_dtype(rows):
    parameter = nn.Parameter(torch.zeros(4, 2, dtype=torch.bfloat16))
    Matrix(nn.Identity(), parameter, rows=rows).write(torch.full((4 if rows is None else 2, 2), 1 / 3))
    assert parameter.dtype == torch.bfloat16
    assert parameter[0, 0] == torch.tensor(1 / 3).to(torch.bfloat16)
