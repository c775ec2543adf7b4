"""DSnoT by hand and against a loop over rows and swaps, and the traps of its authors' code."""

from __future__ import annotations

import pytest
import torch
from engine_support import view_of
from torch import Tensor

from dass_exp.errors import UserError
from dass_exp.masks import NM, Pattern, TransposableNM, Unstructured
from dass_exp.methods.base import MaskResult
from dass_exp.refine.dsnot import DSnoT
from dass_exp.statistics import InputMoments


def refined(method: DSnoT, weight: Tensor, inputs: Tensor, keep: Tensor, pattern: Pattern, **more: int) -> Tensor:
    dim = 1 if isinstance(pattern, NM) else None
    view = view_of(weight, inputs, InputMoments)
    return method.refine(view, weight, MaskResult(keep, dim, 0.0, 1.0, **more), pattern)


def test_one_swap_by_hand():
    """Inputs sum to 1 1 1 -1, variances are 1/4 1/4 1/4 1/4, norms are 1.

    Row 1 has lost 3 + 2 = 5: it restores the 3, and removes the smallest kept weight that loses the opposite, 1 * -1.
    Row 2 has lost 1 - 1 = 0 and stays.
    """
    weight = torch.tensor([[3.0, 2.0, 4.0, 1.0], [1.0, 5.0, 7.0, 1.0]])
    inputs = torch.zeros(1, 2, 4)
    inputs[0, 0] = torch.tensor([1.0, 1.0, 1.0, -1.0])
    keep = torch.tensor([[False, False, True, True], [False, True, True, False]])
    for pattern in (Unstructured(0.5), NM(2, 4)):
        after = refined(DSnoT(cycles=1), weight, inputs, keep, pattern)
        assert after.int().tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]
    assert torch.equal(refined(DSnoT(threshold=5), weight, inputs, keep, Unstructured(0.5)), keep)


def reference(
    method: DSnoT, weight: Tensor, inputs: Tensor, keep: Tensor, pattern: Pattern, slab: int | None
) -> Tensor:
    """One row and one swap after the other, in float64."""
    inputs, weight, keep = inputs.double(), weight.double(), keep.clone()
    s, v = inputs.sum(1).mean(0), inputs.var(1, correction=0).mean(0)
    norm, m = inputs.flatten(0, 1).norm(dim=0), pattern.m if isinstance(pattern, NM) else slab or weight.shape[1]
    for w, row in zip(weight, keep, strict=True):
        used: set[int] = set()
        for _ in range(method.cycles):
            e = float((w * s)[~row].sum())
            if abs(e) <= method.threshold:
                break
            sign = 1 if e > 0 else -1
            pruned = [j for j in range(len(w)) if not row[j] and j not in used]
            if not pruned:
                break
            g = max(pruned, key=lambda j: float(sign * w[j] * s[j] / v[j] ** method.power))
            kept = [j for j in range(len(w)) if row[j] and j not in used and j // m == g // m]
            if not isinstance(pattern, NM):
                kept = [j for j in kept if float(w[j] * s[j]) * sign < 0]
            if not kept:
                break
            q = min(kept, key=lambda j: float(abs(w[j]) * norm[j]))
            if isinstance(pattern, NM) and float(e + w[q] * s[q] - w[g] * s[g]) * sign <= 0:
                break
            row[g], row[q] = True, False
            used |= {g, q}
    return keep


@pytest.mark.parametrize(
    ("pattern", "slab"), [(NM(2, 4), None), (NM(4, 8), None), (Unstructured(0.5), None), (Unstructured(0.7), 16)]
)
@pytest.mark.parametrize("method", [DSnoT(), DSnoT(cycles=3, threshold=1.0, power=0.5)], ids=repr)
def test_agrees_with_a_loop_in_float64(pattern, slab, method, weight, inputs):
    keep = torch.cat([pattern.keep(part.abs(), 1 if slab is None else None) for part in weight.split(slab or 40, 1)], 1)
    after = refined(method, weight, inputs + 0.3, keep, pattern, **({"slab_width": slab} if slab else {}))
    assert torch.equal(after, reference(method, weight, inputs + 0.3, keep, pattern, slab))
    assert not torch.equal(after, keep)
    if isinstance(pattern, NM):
        assert pattern.violations(after, 1) == 0
    assert torch.equal(after.sum(1), keep.sum(1))


def test_constant_and_dead_inputs_are_no_division_by_zero(weight, inputs):
    inputs[:, :, 0], inputs[:, :, 1] = 2.0, 0.0
    keep = Unstructured(0.5).keep(weight.abs(), 1)
    after = refined(DSnoT(), weight, inputs, keep, Unstructured(0.5))
    assert torch.equal(after.sum(1), keep.sum(1))


def test_what_cannot_be_refined_is_refused():
    with pytest.raises(UserError, match="refine=dsnot with pattern 2:4 transposable"):
        DSnoT().check(TransposableNM(2, 4))
    with pytest.raises(UserError, match="refine=dsnot with weights that compete in a column"):
        DSnoT().check(NM(2, 4), 0)
    for name, value in {"cycles": 0, "threshold": -1, "power": "1"}.items():
        with pytest.raises(UserError, match=rf"refine\.{name}="):
            DSnoT(**{name: value})
