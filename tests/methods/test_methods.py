"""Scores by hand, an independent float64 formula on tiny models, and the contract that every method keeps on every family."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dass_exp import prune
from dass_exp.api import method_of
from dass_exp.engine.block_report import BlockReport
from dass_exp.engine.prune import Options, prune_model
from dass_exp.engine.verify import verify
from dass_exp.errors import NumericalError, UserError
from dass_exp.masks import NM, Pattern, Unstructured
from dass_exp.methods.base import Block, LinearView, Pruner, ScorePruner
from dass_exp.methods.dass import Dass
from dass_exp.methods.magnitude import Magnitude
from dass_exp.methods.sparsegpt import SparseGPT
from dass_exp.methods.wanda import Wanda
from dass_exp.models.decoder import LinearSite, Matrix, decoder_of
from dass_exp.models.families import DOWN, FAMILIES, FC1, FC2, GATE, INPUT_OF, SCOPES, UP, Q, Role
from dass_exp.statistics import InputNorm

METHODS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "method").glob("*.yaml"))
SCORING = [Magnitude(), Wanda(), Dass(), Dass(alpha=0.0), Dass(granularity="output")]
PATTERNS = [NM(2, 4), NM(4, 8), Unstructured(0.5)]


def block_of(weights: Mapping[Role, list[list[float]]], norms: Mapping[str, list[float]]) -> Block:
    """A block with these weights, whose inputs had these norms (by :data:`INPUT_OF`)."""
    return Block("block", [view_of(role, rows, norms.get(INPUT_OF[role])) for role, rows in weights.items()])


def view_of(role: Role, rows: list[list[float]], norms: list[float] | None) -> LinearView:
    weight = torch.tensor(rows)
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight
    stat = InputNorm(weight.shape[1], weight.device)
    stat.update(torch.tensor([norms or [1.0] * weight.shape[1]]))  # one token: its size is the norm
    return LinearView(role.value, role, Matrix.of(module), stat)


def kept(method: Pruner, block: Block, role: Role, pattern: Pattern) -> list[list[int]]:
    """The mask of the linear with this role, with ones where a weight stays."""
    (linear,) = [linear for linear in block.linears if linear.role == role]
    before = linear.weight.clone()
    keep = method.prune_linear(linear, block, pattern).keep
    assert torch.equal(linear.weight, before * keep)
    return keep.int().tolist()


def sites_of(model: nn.Module, scope: str) -> Iterator[LinearSite]:
    """Every matrix in the scope."""
    decoder = decoder_of(model)
    for index in range(len(decoder.blocks)):
        yield from decoder.sites(index, scope)


# --- magnitude


def test_magnitude_ranks_over_the_matrix():
    block = block_of({Q: [[5.0, 4.0, -3.0, 2.0], [1.0, -6.0, 0.5, 0.25]]}, {})
    assert kept(Magnitude(), block, Q, Unstructured(0.5)) == [[1, 1, 1, 0], [0, 1, 0, 0]]


def test_magnitude_ranks_inside_groups_along_the_input_axis():
    block = block_of({Q: [[5.0, 4.0, -3.0, 2.0], [1.0, -6.0, 0.5, 0.25]]}, {})
    assert kept(Magnitude(), block, Q, NM(2, 4)) == [[1, 1, 0, 0], [1, 1, 0, 0]]


# --- Wanda

WANDA_NORMS = {"attention": [1.0, 4.0, 1.0, 0.5]}


def test_wanda_weighs_each_column_by_the_norm_of_its_input():
    """Scores 4 4 3 1 and 1 8 3 2: the tie of the first row goes to both, and the last weight, the largest of its row, goes."""
    block = block_of({Q: [[4.0, 1.0, -3.0, 2.0], [1.0, -2.0, 3.0, 4.0]]}, WANDA_NORMS)
    assert Wanda().score(block.linears[0], block).tolist() == [[4.0, 4.0, 3.0, 1.0], [1.0, 8.0, 3.0, 2.0]]
    assert kept(Wanda(), block, Q, NM(2, 4)) == [[1, 1, 0, 0], [0, 1, 1, 0]]


def test_wanda_ranks_in_each_row():
    """Scores 9 8 7 6 and 0 1 2 3: over the matrix the first row would stay whole."""
    block = block_of({Q: [[9.0, 8.0, 7.0, 6.0], [0.0, 1.0, 2.0, 3.0]]}, {})
    assert kept(Wanda(), block, Q, Unstructured(0.5)) == [[1, 1, 0, 0], [0, 0, 1, 1]]


# --- DaSS

INTERMEDIATE = {"mlp": [100.0, 0.01], "intermediate": [1.0, 4.0, 16.0, 0.0]}
TALL = [[6.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [1.0, 9.0]]


@pytest.mark.parametrize("role", [GATE, UP])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)])
@pytest.mark.parametrize(
    ("alpha", "scores", "mask"),
    [
        (0.0, [[6, 1], [2, 1], [2, 1], [1, 9]], [[1, 1], [1, 0], [0, 0], [0, 1]]),
        (0.5, [[6, 1], [4, 2], [8, 4], [0, 0]], [[1, 0], [0, 1], [1, 1], [0, 0]]),
        (1.0, [[6, 1], [8, 4], [32, 16], [0, 0]], [[0, 0], [1, 1], [1, 1], [0, 0]]),
    ],
)
def test_dass_ranks_gate_and_up_in_each_column_by_the_intermediate_norm(role, pattern, alpha, scores, mask):
    """The norms of their own inputs, 100 and 0.01, play no part; factors of the rows are 1 4 16 0 to the power of alpha."""
    block = block_of({role: TALL, DOWN: [[1.0, 1.0, 1.0, 1.0]]}, INTERMEDIATE)
    assert Dass(alpha).score(block.linears[0], block).tolist() == scores
    assert kept(Dass(alpha), block, role, pattern) == mask


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dass_treats_down_as_wanda(alpha):
    """Scores 9 8 16 0 and 1 8 32 0."""
    weights = {GATE: TALL, DOWN: [[9.0, 2.0, 1.0, 50.0], [1.0, -2.0, -2.0, 7.0]]}
    for method in (Dass(alpha), Wanda()):
        assert kept(method, block_of(weights, INTERMEDIATE), DOWN, NM(2, 4)) == [[1, 0, 1, 0], [0, 1, 1, 0]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dass_with_alpha_zero_is_magnitude_per_column(pattern, tiny_model, tokens):
    model = tiny_model("llama")
    weights = {site.name: site.matrix.weight.clone() for site in sites_of(model, "mlp")}
    masks = prune(model, tokens, Dass(alpha=0.0), pattern).masks
    for name, role in ((site.name, site.role) for site in sites_of(model, "mlp")):
        if role != DOWN:
            assert torch.equal(masks[name], pattern.keep(weights[name].abs(), 0))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_dass_per_output_row_is_row_wise_magnitude_for_every_alpha(alpha, pattern, tiny_model, tokens):
    model = tiny_model("llama")
    weights = {site.name: site.matrix.weight.clone() for site in sites_of(model, "mlp")}
    masks = prune(model, tokens, Dass(alpha, granularity="output"), pattern).masks
    for name, role in ((site.name, site.role) for site in sites_of(model, "mlp")):
        if role != DOWN:
            assert torch.equal(masks[name], pattern.keep(weights[name].abs(), 1))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dass_of_attention_is_wanda(pattern, tiny_model, tokens):
    dass = prune(tiny_model("llama"), tokens, "dass", pattern, scope="attention").masks
    wanda = prune(tiny_model("llama"), tokens, "wanda", pattern, scope="attention").masks
    assert dass.keys() == wanda.keys()
    assert len(dass) == 8
    assert all(torch.equal(dass[name], wanda[name]) for name in dass)


@pytest.mark.parametrize(
    "settings", [{"alpha": -0.1}, {"alpha": float("nan")}, {"alpha": "0.5"}, {"alpha": True}, {"granularity": "row"}]
)
def test_impossible_dass_settings_are_refused(settings):
    with pytest.raises(UserError, match=rf"method\.{next(iter(settings))}="):
        Dass(**settings)


# --- what all scores have in common


@pytest.mark.parametrize("method", SCORING, ids=repr)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize(
    ("value", "norms"),
    [(1.0, [1.0] * 8), (0.0, [1.0] * 8), (1.0, [0.0] * 8), (2.0, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0])],
)
def test_equal_scores_and_dead_inputs_still_give_the_exact_sparsity(method, pattern, value, norms):
    """Weights that are all equal, or zero; inputs that never fire."""
    weights = {role: [[value] * 8] * 8 for role in Role}
    block = block_of(weights, dict.fromkeys(INPUT_OF.values(), norms))
    cuts = method.prune_block(block, pattern)
    assert len(cuts) == len(Role)
    for cut in cuts.values():
        assert int(cut.keep.sum()) == 32
        assert pattern.violations(cut.keep, cut.dim) == 0


@pytest.mark.parametrize("method", SCORING, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_stay_are_the_same_bit_for_bit(method, dtype, tiny_model, tokens):
    model = tiny_model("llama").to(dtype)
    before = {site.name: site.matrix.weight.clone() for site in sites_of(model, "all")}
    masks = prune(model, tokens, method, "2:4", scope="all").masks
    for site in sites_of(model, "all"):
        assert torch.equal(site.matrix.weight, torch.where(masks[site.name], before[site.name], 0))


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), Dass(), SparseGPT()], ids=repr)
def test_a_weight_that_is_not_finite_stops_the_run_with_its_name(method, tiny_model):
    model = tiny_model("llama")
    site = next(sites_of(model, "mlp"))
    name, module = site.name, site.matrix.module
    module.weight.data[3, 5] = float("nan")
    stat = (method.stat or InputNorm)(module.in_features, torch.device("cpu"))
    stat.update(torch.eye(module.in_features))
    view = LinearView(name, Q, site.matrix, stat)
    with pytest.raises(NumericalError, match=name):
        method.prune_linear(view, Block("block", [view]), NM(2, 4))


def test_a_method_that_asks_for_no_statistic_gets_none():
    view = LinearView("block.q", Q, Matrix.of(nn.Linear(4, 4)), None)
    with pytest.raises(LookupError, match=r"block\.q: no statistic was collected"):
        _ = view.stat
    with pytest.raises(LookupError, match="role down does not lie in the scope"):
        Block("block", [view]).stat(DOWN)


# --- DaSS without a GLU: an extension of this project


def test_dass_scores_the_first_of_two_matrices_by_the_neurons_that_it_makes():
    """fc1 [4 neurons, 2 inputs], neuron norms 1, 4, 9, 16, their roots 1, 2, 3, 4; columns compete."""
    block = block_of(
        {FC1: [[5.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 3.0]], FC2: [[1.0, 1.0, 1.0, 1.0]]},
        {"intermediate": [1.0, 4.0, 9.0, 16.0]},
    )
    # scores of the first column: 5, 2, 3, 4; of the second: 1, 2, 3, 12
    assert kept(Dass(), block, FC1, NM(2, 4)) == [[1, 0], [0, 0], [0, 1], [1, 1]]
    assert kept(Dass(), block, FC2, NM(2, 4)) == [[0, 0, 1, 1]]


def test_only_dass_without_a_glu_has_something_to_remark():
    assert "extension of dass_exp" in Dass().remark({FC1, FC2})
    assert Dass().remark({GATE, UP, DOWN}) == Wanda().remark({FC1}) == SparseGPT().remark({FC1}) == ""


# --- an independent formula


@torch.no_grad()
def token_by_token(model: nn.Module, tokens: Tensor, modules: Mapping[Role, nn.Linear]) -> dict[Role, Tensor]:
    """float64 norm of each linear's input: each sequence alone through the whole model, each token added by itself."""
    squares: dict[Role, Tensor] = {
        role: torch.zeros(module.in_features, dtype=torch.float64) for role, module in modules.items()
    }

    def add(module: nn.Module, args: tuple[Tensor], role: Role) -> None:
        del module
        for token in args[0][0]:
            squares[role] += token**2

    handles = [
        module.register_forward_pre_hook(lambda module, args, role=role: add(module, args, role))
        for role, module in modules.items()
    ]
    for sequence in tokens:
        model(sequence[None])
    for handle in handles:
        handle.remove()
    return {role: total.sqrt() for role, total in squares.items()}


def naive_score(method: ScorePruner, role: Role, weight: Tensor, norms: Mapping[Role, Tensor]) -> tuple[Tensor, bool]:
    """The scores in float64, and whether weights of one column compete."""
    score = torch.empty_like(weight)
    by_column = isinstance(method, Dass) and role in (GATE, UP)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            factor = norms[DOWN][i] ** method.alpha if by_column else norms[role][j]
            score[i, j] = abs(weight[i, j]) * factor
    return score, by_column


def assert_same_mask(keep: Tensor, scores: Tensor, pattern: Pattern) -> None:
    """Each group (along the last axis) keeps its highest scores; a difference is allowed only where they tie to 1e-6."""
    width = pattern.m if isinstance(pattern, NM) else scores.shape[-1]
    stay = pattern.n if isinstance(pattern, NM) else width - int(pattern.sparsity * width)
    for chosen, group in zip(keep.reshape(-1, width), scores.reshape(-1, width), strict=True):
        assert int(chosen.sum()) == stay
        lowest = group.sort(descending=True).values[stay - 1]
        expected = group >= lowest
        assert bool((torch.abs(group - lowest)[chosen != expected] <= 1e-6 * lowest).all())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("method", [Wanda(), Dass(alpha=0.5), Dass(alpha=0.25)], ids=repr)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=repr)
def test_masks_agree_with_a_formula_over_naive_statistics(family, method, pattern, tiny_model, tokens):
    model = tiny_model(family)
    reference = copy.deepcopy(model).double()
    masks = prune(model, tokens, method, pattern, scope="all").masks
    decoder = decoder_of(reference)
    for index in range(len(decoder.blocks)):
        linears = [(site.name, site.role, site.matrix.module) for site in decoder.sites(index, "all")]
        norms = token_by_token(reference, tokens, {role: module for _, role, module in linears})
        for name, role, module in linears:
            scores, by_column = naive_score(method, role, module.weight.detach(), norms)
            keep = masks[name]
            assert_same_mask(keep.T if by_column else keep, scores.T if by_column else scores, pattern)
            module.weight.data *= keep


# --- the contract: every method x pattern x scope x family


def test_every_method_of_the_config_group_is_tested():
    assert METHODS == ["dass", "dense", "magnitude", "sparsegpt", "wanda"]
    assert [name for name in METHODS if not method_of(name).uses] == ["dense"]


def test_dense_changes_nothing(tiny_model, tokens):
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    pruned = prune(model, tokens, "dense")
    assert (pruned.masks, pruned.layers, pruned.sparsity) == ({}, [], 0.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("scope", sorted(SCOPES))
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
def test_contract(name, pattern, scope, family, tiny_model, tokens, attached):
    model = tiny_model(family)
    method, hooks = method_of(name), attached(model)
    state = copy.deepcopy(model.state_dict())
    before = {site.name: site.matrix.weight.clone() for site in sites_of(model, "all")}
    reports: list[BlockReport] = []
    prune_model(
        model,
        tokens,
        method,
        pattern,
        Options(scope, batch_size=3, on_block=reports.append, min_tokens=1, outputs=True),
    )

    layers = [layer for report in reports for layer in verify(report, pattern)]
    scoped = {site.name: site.role for site in sites_of(model, scope)}
    assert {layer.name: layer.role for layer in layers} == scoped
    assert len(layers) == len(scoped) > 0
    assert all(layer.zeros * 2 == layer.size for layer in layers)
    assert all(layer.excess == 0 and layer.underfull == 0 for layer in layers)
    assert all(layer.tokens is None if method.stat is None else layer.tokens > 0 for layer in layers)
    assert all(report.error is None if method.stat is None else 0 < report.error < 2 for report in reports)
    for site in sites_of(model, "all"):
        assert torch.equal(site.matrix.weight, before[site.name]) == (site.name not in scoped), site.name
        site.matrix.write(before[site.name])
    assert all(
        torch.equal(value, state[key]) for key, value in model.state_dict().items()
    )  # nothing else was touched: norms, biases, routers, embeddings
    assert attached(model) == hooks
    assert not model.training
