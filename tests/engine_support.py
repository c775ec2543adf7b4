"""What the tests of methods and engine share: every method of conf/method, and pruning that returns the reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import CONF
from torch import Tensor, nn

from dass_exp.config.components import build, choice
from dass_exp.config.settings import ExpertsConfig
from dass_exp.engine.callbacks import BlockReport, Callback, LoopState
from dass_exp.engine.prune import EngineOptions, prune_model
from dass_exp.engine.verify import Layer, verify
from dass_exp.masks import NM, Pattern
from dass_exp.methods.base import Block, LinearView, MaskResult, Pruner
from dass_exp.models.decoder import LinearSite, Matrix, Unit, decoder_of
from dass_exp.models.families import INPUT_OF, PLAIN, Q, Role
from dass_exp.statistics import Gram, InputNorm, Statistic

NAMES = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
METHODS = [build(choice("method", name), Pruner, "method") for name in NAMES]
PRUNING = [method for method in METHODS if method.prunes]
CALIBRATED = [method for method in PRUNING if method.stat is not None]
# families that differ in all that matters to the engine: a GLU, fused experts, a plain MLP with transposed weights
UNLIKE = ("llama", "mixtral", "gpt2")

FLAT_ROLES = {**{role.value: role.value for role in Role if role not in PLAIN}, "blocks": "blocks"}

engine_options = EngineOptions


def block_of(
    weights: Mapping[Role, object], norms: Mapping[str, list[float]], stat: type | Pruner = InputNorm
) -> Block:
    """A block with these weights, whose inputs had these norms (by :data:`INPUT_OF`); ones where none are given.

    ``stat`` is the type of its statistics, or the method that says which it needs.
    """
    views, matrices = [], {}
    for role, rows in weights.items():
        weight = torch.as_tensor(rows)
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        module.weight.data = weight.clone()
        matrices[role] = Matrix.of(module)
    unit = Unit(matrices, SimpleNamespace(hidden_act="silu"))
    for role, matrix in matrices.items():
        kind = (stat.stat_of(role) or InputNorm) if isinstance(stat, Pruner) else stat
        statistic = kind.of_unit(matrix.in_features, matrix.weight.device, unit)
        # a single token: the size of each feature is its norm
        statistic.update(torch.tensor([norms.get(INPUT_OF[role]) or [1.0] * matrix.in_features]))
        views.append(LinearView(role.value, role, matrix, statistic))
    return Block("block", views)


def kept(method: Pruner, block: Block, role: Role, pattern: Pattern) -> list[list[int]]:
    """The mask of the linear with this role, with ones where a weight stays."""
    (linear,) = [linear for linear in block.linears if linear.role == role]
    before = linear.weight.clone()
    keep = method.prune_linear(linear, block, pattern).keep
    assert torch.equal(linear.weight, before * keep)
    return keep.int().tolist()


def view_of(weight: Tensor, inputs: Tensor, stat: type[Statistic] = Gram) -> LinearView:
    """A linear with this weight and the statistic of these inputs [sequences, tokens, in_features]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    statistic = stat(weight.shape[1], weight.device)
    statistic.update(inputs)
    return LinearView("layer.q", Q, Matrix.of(linear), statistic)


def prune_matrix(method: Pruner, weight: Tensor, inputs: Tensor, pattern: Pattern) -> tuple[Tensor, MaskResult, Layer]:
    """The weight after pruning, its mask, and the verified entry of the linear."""
    view = view_of(weight, inputs)
    result = method.prune_linear(view, Block("layer", [view]), pattern)
    (layer,) = verify(BlockReport(0, "layer", nn.Identity(), [view], {"layer.q": result}, None), pattern)
    return view.weight.clone(), result, layer


def output_error(changed: Tensor, weight: Tensor, inputs: Tensor) -> float:
    """The Frobenius norm of the change of a layer's outputs, in float64."""
    return float((inputs.double().flatten(0, 1) @ (changed.double() - weight.double()).T).norm())


@dataclass
class Pruning:
    """The hidden states that :func:`prune_model` returns, and the report of each block."""

    hidden: list[Tensor] = field(default_factory=list)
    reports: list[BlockReport] = field(default_factory=list)
    patterns: list[Pattern] = field(default_factory=list)

    @property
    def masks(self) -> dict[str, Tensor]:
        return {name: result.keep for report in self.reports for name, result in report.results.items()}


def prune_blocks(
    model: nn.Module,
    tokens: Tensor | None,
    method: Pruner,
    pattern: Pattern | None = None,
    on_report: Callable[[BlockReport], None] = lambda report: None,
    **options: Any,
) -> Pruning:
    """Prune a model, 2:4 by default, with these engine options; ``on_report`` is called after each block."""
    experts = {name: options.pop(name) for name in ("min_tokens", "starved") if name in options}
    chosen = engine_options(experts=ExpertsConfig(**experts), **options)
    pruning = Pruning()
    pruning.hidden = prune_model(model, tokens, method, pattern or NM(2, 4), chosen, [Reports(pruning, on_report)])
    return pruning


class Reports(Callback):
    """Keeps the report of each block."""

    def __init__(self, pruning: Pruning, on_report: Callable[[BlockReport], None]) -> None:
        self._pruning, self._on_report = pruning, on_report

    def on_start(self, loop: LoopState) -> None:
        self._pruning.patterns = loop.patterns

    def on_block_end(self, report: BlockReport) -> None:
        self._pruning.reports.append(report)
        self._on_report(report)


@torch.no_grad()
def block_outputs(model: nn.Module, tokens: Tensor, roles: Mapping[str, str] | None = None) -> list[Tensor]:
    """The output of every block in the model's own forward pass."""
    outputs: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(note) for block in decoder_of(model, roles).blocks]
    getattr(model, "base_model", model)(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return outputs


def sites_of(model: nn.Module, scope: str) -> Iterator[LinearSite]:
    """Every matrix of the model in the scope."""
    decoder = decoder_of(model)
    for index in range(len(decoder.blocks)):
        yield from decoder.sites(index, scope)


def assert_same_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The model's tensors are those of ``state``, bit for bit but for NaN."""
    assert model.state_dict().keys() == state.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), state[name].nan_to_num()), name


def length_of(first: bool, second: bool) -> Any:
    """The mark of a case of a matrix: none for ``make test``, thorough for CI, slow for the others."""
    return () if first else pytest.mark.thorough if second else pytest.mark.slow
