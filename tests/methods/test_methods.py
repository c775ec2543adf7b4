"""Scores by hand, an independent float64 formula on tiny models, and the contract of every method in conf/method."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from engine_support import (
    METHODS,
    PRUNING,
    UNLIKE,
    assert_same_state,
    block_of,
    kept,
    length_of,
    prune_blocks,
    sites_of,
)
from torch import Tensor, nn

from dass_exp import prune
from dass_exp.engine.callbacks import BlockReport
from dass_exp.engine.verify import verify
from dass_exp.errors import NumericalError, UserError
from dass_exp.masks import NM, Pattern, TransposableNM, Unstructured
from dass_exp.methods.admm import ADMM
from dass_exp.methods.base import Block, LinearView, ScorePruner
from dass_exp.methods.dass import Dass
from dass_exp.methods.magnitude import Magnitude
from dass_exp.methods.sparsegpt import SparseGPT
from dass_exp.methods.thanos import Thanos
from dass_exp.methods.wanda import Wanda
from dass_exp.models.decoder import Matrix, decoder_of
from dass_exp.models.families import DOWN, FAMILIES, FC1, FC2, GATE, INPUT_OF, SCOPES, UP, Q, Role
from dass_exp.statistics import Gram, InputNorm

VARIANTS = [*PRUNING, Dass(alpha=0.0), Dass(granularity="output")]
PATTERNS = [NM(2, 4), NM(4, 8), TransposableNM(2, 4), Unstructured(0.5)]
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=repr)


# --- magnitude


@pytest.mark.parametrize(
    ("pattern", "mask"), [(Unstructured(0.5), [[1, 1, 1, 0], [0, 1, 0, 0]]), (NM(2, 4), [[1, 1, 0, 0], [1, 1, 0, 0]])]
)
def test_magnitude_ranks_over_the_matrix_or_inside_groups_along_the_input_axis(pattern, mask):
    block = block_of({Q: [[5.0, 4.0, -3.0, 2.0], [1.0, -6.0, 0.5, 0.25]]}, {})
    assert kept(Magnitude(), block, Q, pattern) == mask


# --- Wanda


def test_wanda_weighs_each_column_by_the_norm_of_its_input():
    """The two fours of the first row tie, and both stay; the last weight, the largest of its row, is removed."""
    norms = {"attention": [1.0, 4.0, 1.0, 0.5]}
    block = block_of({Q: [[4.0, 1.0, -3.0, 2.0], [1.0, -2.0, 3.0, 4.0]]}, norms)
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
    """The norms of their own inputs, 100 and 0.01, do not count; the rows have factors (1 4 16 0)**alpha."""
    block = block_of({role: TALL, DOWN: [[1.0, 1.0, 1.0, 1.0]]}, INTERMEDIATE)
    assert Dass(alpha).score(block.linears[0], block).tolist() == scores
    assert kept(Dass(alpha), block, role, pattern) == mask


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dass_treats_down_as_wanda(alpha):
    """Scores 9 8 16 0 and 1 8 32 0."""
    weights = {GATE: TALL, DOWN: [[9.0, 2.0, 1.0, 50.0], [1.0, -2.0, -2.0, 7.0]]}
    for method in (Dass(alpha), Wanda()):
        assert kept(method, block_of(weights, INTERMEDIATE), DOWN, NM(2, 4)) == [[1, 0, 1, 0], [0, 1, 1, 0]]


@each_pattern
@pytest.mark.parametrize(
    ("method", "dim"),
    [(Dass(0.0), 0), *((Dass(alpha, granularity="output"), 1) for alpha in (0.0, 0.5, 2.0))],
    ids=repr,
)
def test_dass_without_the_norm_is_magnitude_per_column_and_per_output_row_for_every_alpha(
    method, dim, pattern, tiny_model, tokens
):
    model = tiny_model("llama")
    sites = [site for site in sites_of(model, "mlp") if site.role != DOWN]
    weights = {site.name: site.matrix.weight.clone() for site in sites}
    masks = prune(model, tokens, method, pattern).masks
    assert len(sites) == 4
    assert all(torch.equal(masks[name], pattern.keep(weight.abs(), dim)) for name, weight in weights.items())


@each_pattern
def test_dass_of_attention_is_wanda(pattern, tiny_model, tokens):
    dass, wanda = (prune(tiny_model("llama"), tokens, name, pattern, "attention").masks for name in ("dass", "wanda"))
    assert dass.keys() == wanda.keys()
    assert len(dass) == 8
    assert all(torch.equal(dass[name], wanda[name]) for name in dass)


@pytest.mark.parametrize(
    "settings", [{"alpha": -0.1}, {"alpha": float("nan")}, {"alpha": "0.5"}, {"alpha": True}, {"granularity": "row"}]
)
def test_impossible_dass_settings_are_refused(settings):
    with pytest.raises(UserError, match=rf"method\.{next(iter(settings))}="):
        Dass(**settings)


def test_dass_scores_the_first_of_two_matrices_by_the_neurons_that_it_makes():
    """fc1 [4 neurons, 2 inputs], neuron norms 1, 4, 9, 16, their roots 1, 2, 3, 4; columns compete."""
    block = block_of(
        {FC1: [[5.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 3.0]], FC2: [[1.0, 1.0, 1.0, 1.0]]},
        {"intermediate": [1.0, 4.0, 9.0, 16.0]},
    )
    # scores of the first column: 5, 2, 3, 4; of the second: 1, 2, 3, 12
    assert kept(Dass(), block, FC1, NM(2, 4)) == [[1, 0], [0, 0], [0, 1], [1, 1]]
    assert kept(Dass(), block, FC2, NM(2, 4)) == [[0, 0, 1, 1]]


def test_only_dass_without_a_glu_has_a_remark():
    assert "extension of dass_exp" in Dass().remark({FC1, FC2})
    assert Dass().remark({GATE, UP, DOWN}) == Wanda().remark({FC1}) == SparseGPT().remark({FC1}) == ""


# --- what every method has in common


ROW_OF_ZEROS = torch.ones(8, 8).index_fill(0, torch.tensor(2), 0)
WEIGHTS = {"ones": torch.ones(8, 8), "zeros": torch.zeros(8, 8), "row": ROW_OF_ZEROS, "column": ROW_OF_ZEROS.T}


@pytest.mark.thorough
@pytest.mark.parametrize("method", VARIANTS, ids=repr)
@each_pattern
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("norms", [[1.0] * 8, [0.0] * 8, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0]], ids=str)
def test_ties_and_zeros_still_give_the_exact_sparsity(method, pattern, weight, norms):
    """Equal weights; a matrix, row or column of zeros; inputs that never fire."""
    weights = dict.fromkeys(Role, WEIGHTS[weight])
    block = block_of(weights, dict.fromkeys(INPUT_OF.values(), norms), method)
    results = method.prune_block(block, pattern)
    assert len(results) == len(Role)
    for linear in block.linears:
        result = results[linear.name]
        assert int(result.keep.sum()) == 32
        assert pattern.violations(result.keep, result.dim) == 0
        assert bool(linear.weight.isfinite().all())


@pytest.mark.parametrize("method", VARIANTS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_removed_weights_are_zero_and_a_score_leaves_the_others_bit_for_bit(method, dtype, tiny_model, tokens):
    model = tiny_model("llama").to(dtype)
    before = {site.name: site.matrix.weight.clone() for site in sites_of(model, "all")}
    masks = prune(model, tokens, method, "2:4", scope="all").masks
    for site in sites_of(model, "all"):
        survivors = before[site.name] if isinstance(method, ScorePruner) else site.matrix.weight
        assert torch.equal(site.matrix.weight, torch.where(masks[site.name], survivors, 0))


@pytest.mark.parametrize("method", VARIANTS, ids=repr)
def test_a_weight_that_is_not_finite_stops_the_run_with_its_name(method):
    weight = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    weight[3, 5] = float("nan")
    block = block_of(dict.fromkeys(Role, weight), {}, method)
    for linear in block.linears:
        with pytest.raises(NumericalError, match=f"^{linear.name}: "):
            results = {linear.name: method.prune_linear(linear, block, NM(2, 4))}
            verify(BlockReport(0, "block", nn.Identity(), [linear], results, None), NM(2, 4))


@pytest.mark.parametrize("method", [SparseGPT(damping=1e300), Thanos(damping=1e300), ADMM(damping=1e300)], ids=repr)
def test_a_matrix_that_cannot_be_factorised_stops_the_run_with_the_name_of_its_linear(method):
    block = block_of({Q: torch.ones(4, 8)}, {}, Gram)
    with pytest.raises(NumericalError, match=f"^{block.linears[0].name}: "):
        method.prune_block(block, NM(2, 4))


def test_a_method_that_asks_for_no_statistic_gets_none():
    view = LinearView("block.q", Q, Matrix.of(nn.Linear(4, 4)), None)
    with pytest.raises(LookupError, match=r"block\.q: no statistic was collected"):
        _ = view.stat
    with pytest.raises(LookupError, match="role down does not lie in the scope"):
        Block("block", [view]).stat(DOWN)


@dataclass
class Wrapper(ScorePruner):
    """Scores as another method does."""

    inner: ScorePruner = field(default_factory=Wanda)
    stat = InputNorm

    def score(self, linear: LinearView, block: Block) -> Tensor:
        return self.inner.score(linear, block)


def test_a_new_version_of_a_nested_method_changes_the_settings_of_its_wrapper():
    @dataclass
    class Revised(Dass):
        version = 2
        name = "dass"

    first, second = Wrapper(Dass()).settings(), Wrapper(Revised()).settings()
    assert first == {"inner": {"name": "dass", "version": 1, "alpha": 0.5, "granularity": "input"}}
    assert second == {"inner": {**first["inner"], "version": 2}}


# --- an independent formula


@torch.no_grad()
def token_by_token(model: nn.Module, tokens: Tensor, modules: Mapping[Role, nn.Linear]) -> dict[Role, Tensor]:
    """float64 norm of each linear's input: each sequence alone through the whole model, each token added by itself."""
    squares = {role: torch.zeros(module.in_features, dtype=torch.float64) for role, module in modules.items()}

    def add(role: Role, inputs: Tensor) -> None:
        for token in inputs[0]:
            squares[role] += token**2

    handles = [
        module.register_forward_pre_hook(lambda module, args, role=role: add(role, args[0]))
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
    """Each group (along the last axis) keeps its highest scores; masks may differ only where scores tie to 1e-6."""
    width = pattern.m if isinstance(pattern, NM) else scores.shape[-1]
    stay = pattern.n if isinstance(pattern, NM) else width - int(pattern.sparsity * width)
    for chosen, group in zip(keep.reshape(-1, width), scores.reshape(-1, width), strict=True):
        assert int(chosen.sum()) == stay
        lowest = group.sort(descending=True).values[stay - 1]
        expected = group >= lowest
        assert bool((torch.abs(group - lowest)[chosen != expected] <= 1e-6 * lowest).all())


@pytest.mark.thorough
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


def test_every_method_but_dense_prunes():
    assert {"dass", "magnitude", "sparsegpt", "wanda"} <= {method.name for method in PRUNING}
    assert [method.name for method in METHODS if not method.prunes] == ["dense"]


def test_dense_changes_nothing(tiny_model, tokens):
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    pruned = prune(model, tokens, "dense")
    assert (pruned.masks, pruned.layers, pruned.sparsity) == ({}, [], 0.0)
    assert_same_state(model, before)


def contract_cases():
    """Every method x pattern x scope x family; shorter runs leave out what differs in one of them only."""
    for method, pattern, scope, family in itertools.product(PRUNING, PATTERNS, sorted(SCOPES), sorted(FAMILIES)):
        every_family = scope == "all" and pattern in (NM(2, 4), Unstructured(0.5))
        first = family == "llama" or (every_family and isinstance(method, Dass) and pattern == NM(2, 4))
        marks = length_of(first, every_family or family in UNLIKE)
        yield pytest.param(method, pattern, scope, family, id=f"{family}-{scope}-{pattern}-{method}", marks=marks)


@pytest.mark.parametrize(("method", "pattern", "scope", "family"), contract_cases())
def test_contract(method, pattern, scope, family, tiny_model, tokens, attached):
    model = tiny_model(family)
    hooks, state = attached(model), copy.deepcopy(model.state_dict())
    before = {site.name: site.matrix.weight.clone() for site in sites_of(model, "all")}
    pruning = prune_blocks(model, tokens, method, pattern, scope=scope, batch_size=3, min_tokens=1, return_hidden=True)

    layers = [layer for report in pruning.reports for layer in verify(report, pattern)]
    scoped = {site.name: site.role for site in sites_of(model, scope)}
    assert {layer.name: layer.role for layer in layers} == scoped
    assert len(layers) == len(scoped) > 0
    assert all(layer.zeros * 2 == layer.size for layer in layers)
    # a transposable mask keeps some weights of a dead input, and SparseGPT zeroes them
    if not (method.updates_weights and isinstance(pattern, TransposableNM)):
        assert all(layer.excess == 0 and layer.underfull == 0 for layer in layers)
    assert all(layer.tokens is None if method.stat is None else layer.tokens > 0 for layer in layers)
    assert all(report.error is None if method.stat is None else 0 < report.error < 2 for report in pruning.reports)
    for site in sites_of(model, "all"):
        assert torch.equal(site.matrix.weight, before[site.name]) == (site.name not in scoped), site.name
        site.matrix.write(before[site.name])
    assert_same_state(model, state)  # nothing else was touched: norms, biases, routers, embeddings
    assert attached(model) == hooks
    assert not model.training
