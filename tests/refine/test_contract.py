"""What every refinement has in common, after every method and for every pattern."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_support import PRUNING, view_of

from dass_exp.errors import UserError
from dass_exp.masks import NM, Budget, TransposableNM, Unstructured
from dass_exp.methods.base import Block, Pruner
from dass_exp.models.decoder import Unit
from dass_exp.models.families import DOWN, GATE, INPUT_OF, UP, Q, Role
from dass_exp.refine import base
from dass_exp.refine.base import Refinement
from dass_exp.statistics import Gram

FILES = sorted(path.stem for path in Path(base.__file__).parent.glob("*.py") if path.stem not in ("__init__", "base"))
MODULES = [importlib.import_module(f"dass_exp.refine.{name}") for name in FILES]
REFINEMENTS = [
    value()
    for module in MODULES
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, Refinement) and value.__module__ == module.__name__
]
PATTERNS = [NM(2, 4), NM(4, 8), Unstructured(0.5), Budget(0.52), TransposableNM(2, 4)]


def test_each_file_holds_one_refinement():
    assert len(REFINEMENTS) == len(FILES) >= 3


def pruned(method: Pruner, pattern: object, role: Role, inputs: torch.Tensor) -> tuple[object, torch.Tensor, object]:
    """A linear with this role in a block that has what DaSS reads, its dense weight, and its mask."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 40, generator=generator)
    roles = [GATE, UP, DOWN] if role in (GATE, UP) else [role]
    views = [view_of(weight, inputs) for _ in roles]
    unit = Unit(
        {name: view.matrix for name, view in zip(roles, views, strict=True)}, SimpleNamespace(hidden_act="silu")
    )
    for name, view in zip(roles, views, strict=True):
        view.name, view.role = f"block.{name.value}", name
        view.statistic = (method.stat_of(name) or Gram).of_unit(40, weight.device, unit)
        view.statistic.update(inputs)
    chosen = views[roles.index(role)]
    return chosen, weight, method.prune_linear(chosen, Block("block", views), pattern)


@pytest.mark.thorough
@pytest.mark.parametrize("refinement", REFINEMENTS, ids=repr)
@pytest.mark.parametrize("method", PRUNING, ids=lambda method: method.name)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("role", [Q, UP], ids=lambda role: role.value)
def test_the_new_mask_has_the_pattern_of_the_old_one_or_is_refused_before(refinement, method, pattern, role, inputs):
    assert role in INPUT_OF
    _, weight, result = pruned(method, pattern, role, inputs + 0.2)
    view = view_of(weight, inputs + 0.2, refinement.stat) if refinement.stat else view_of(weight, inputs)
    before = result.keep.clone()
    try:
        refinement.check(pattern, method.comparison_dim(role, pattern))
    except UserError:
        with pytest.raises(UserError):
            refinement.refine(view, weight, result, pattern)
        return
    after = refinement.refine(view, weight, result, pattern)
    assert torch.equal(result.keep, before)  # the old mask is not changed
    assert torch.equal(view.weight, weight)
    slabs = after.split(result.slab_width, 1) if result.slab_width else (after,)
    assert sum(pattern.violations(slab, result.dim) for slab in slabs) == 0
    assert after.dtype == torch.bool
