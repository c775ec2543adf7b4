"""Whether 2:4 weights are faster on a GPU: sparse kernels against dense products, prefill and decode."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dass_exp.api import prune
from dass_exp.benchmark.gpu_checks import Check, Line, Setup
from dass_exp.benchmark.measure import time_call
from dass_exp.masks import NM

# in and out features of gate and up: SmolLM2-135M, LLaMA-7B, LLaMA-70B; down has them the other way round
SHAPES = ((576, 1536), (4096, 11008), (8192, 28672))
TOKENS = {"prefill": 2048, "decode of 16": 16, "decode of 1": 1}
_ROUNDS = 20
_TOLERANCE = 2e-2  # relative, in float16


def kernel_lines(setup: Setup) -> Iterator[tuple[str, Check]]:
    """Yield the name and the function of each measurement."""
    for shape in (*SHAPES, *(wide[::-1] for wide in SHAPES)):
        for stage, tokens in TOKENS.items():
            name = f"2:4 kernel, {shape[0]} x {shape[1]}, {stage}"
            yield name, partial(_measure, name, shape, tokens, setup.device)
    for stage, length in TOKENS.items():
        name = f"2:4 kernels in a whole model, {stage}"
        yield name, partial(_measure_model, name, setup, length)


def _measure(name: str, shape: tuple[int, int], tokens: int, device: torch.device) -> Line:
    """Compare ``to_sparse_semi_structured`` with the dense product of the same 2:4 weight, float16."""
    features, outputs = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, features, generator=generator).to(device)
    weight = (weight * NM(2, 4).keep(weight.abs(), 1)).half()
    inputs = torch.randn(tokens, features, generator=generator).half().to(device)
    sparse = torch.sparse.to_sparse_semi_structured(weight)
    linear = torch.nn.functional.linear
    dense_output, sparse_output = linear(inputs, weight).float(), linear(inputs, sparse).float()
    dense_s, sparse_s = (_seconds(partial(linear, inputs, matrix)) for matrix in (weight, sparse))
    return _compared(name, (dense_output, dense_s), (sparse_output, sparse_s))


@torch.no_grad()
def _measure_model(name: str, setup: Setup, length: int) -> Line:
    """Compare the model of the checks with all linears of its MLPs in sparse kernels with itself, float16."""
    model: Any = setup.copy(torch.float16)
    masks = prune(model, setup.tokens, "wanda").masks  # the axis of Wanda is that of the kernels
    ids = setup.tokens.flatten().repeat(-(-length // setup.tokens.numel()))[:length]
    # one sequence for the prefill, one token of each sequence for the decoding
    ids = (ids[None] if length == TOKENS["prefill"] else ids[:, None]).to(setup.device)
    call = partial(model, ids, use_cache=False, logits_to_keep=1)
    dense = call().logits.float(), _seconds(call)
    for linear in masks:
        module = model.get_submodule(linear)
        sparse = torch.sparse.to_sparse_semi_structured(module.weight.detach())
        module.weight = torch.nn.Parameter(sparse, requires_grad=False)
    return _compared(f"{name}, {len(masks)} linears", dense, (call().logits.float(), _seconds(call)))


def _compared(name: str, dense: tuple[Tensor, float], sparse: tuple[Tensor, float]) -> Line:
    """Say how much faster the sparse product is, and how far its output is from the dense one."""
    off = float((dense[0] - sparse[0]).norm() / dense[0].norm())
    speed = dense[1] / sparse[1]
    verdict = f"{speed:.2f} times as fast as dense" if speed > 1 else f"not faster: {speed:.2f} times the dense speed"
    detail = f"{verdict} ({1e6 * sparse[1]:.0f} against {1e6 * dense[1]:.0f} us), outputs differ by {off:.1e}"
    return Line(name, "measured" if off <= _TOLERANCE else "differs", detail)


def _seconds(product: Callable[[], Any]) -> float:
    """Return the least of three means, after a warm-up."""

    def rounds() -> None:
        for _ in range(_ROUNDS):
            product()

    rounds()
    return min(time_call(rounds) for _ in range(3)) / _ROUNDS
