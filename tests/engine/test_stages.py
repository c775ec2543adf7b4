"""Every stage of conf, around every kind of method, on every family; and what the engine does with each of them."""

from __future__ import annotations

import copy
import itertools
from collections import Counter

import pytest
import torch
from engine_support import PRUNING, UNLIKE, assert_same_state, length_of, prune_blocks, sites_of
from support import CONF, compose, contains

from dass_exp.api import prune
from dass_exp.config.components import choice
from dass_exp.engine import repair_passes
from dass_exp.engine.stages import KINDS, Stages, build_stages
from dass_exp.engine.verify import verify
from dass_exp.errors import UserError
from dass_exp.masks import NM, Unstructured
from dass_exp.methods.dass import Dass
from dass_exp.methods.magnitude import Magnitude
from dass_exp.methods.sparsegpt import SparseGPT
from dass_exp.methods.wanda import Wanda
from dass_exp.models.decoder import decoder_of
from dass_exp.models.families import FAMILIES, READER_OF, Role
from dass_exp.permute.neurons import Neurons
from dass_exp.repair.least_squares import LeastSquares

CHOICES = [(group, path.stem) for group in KINDS for path in sorted((CONF / group).glob("*.yaml"))]
ACTIVE = [(group, name) for group, name in CHOICES if build_stages({group: choice(group, name)}).active]
# one method that only scores along neurons, one that scores along inputs, one that updates, one without statistics
METHODS = [Dass(), Wanda(), SparseGPT(), Magnitude()]
DEFAULTS = {"allocation": "uniform", "permute": "none", "refine": "none", "repair": "none"}
each_family = pytest.mark.parametrize("family", sorted(FAMILIES))


def stages_of(*choices):
    return build_stages({group: choice(group, name) for group, name in choices})


def is_served(stages, method, pattern, scope):
    try:
        stages.check(method, pattern, scope)
    except UserError as error:
        assert contains(str(error), ["choose"])
        return False
    return True


def test_each_group_has_a_default_that_does_nothing():
    assert [(group, name) for group, name in CHOICES if (group, name) not in ACTIVE] == list(DEFAULTS.items())
    assert {group: str(compose().get(group)._target_) for group in DEFAULTS} == {
        group: choice(group, name)["_target_"] for group, name in DEFAULTS.items()
    }


def contract_cases():
    """Every stage x method x scope x family; shorter runs leave out what differs in one of them only."""
    for chosen, method, scope, family in itertools.product(ACTIVE, METHODS, ["mlp", "all"], sorted(FAMILIES)):
        every_family = scope == "all" and isinstance(method, Dass | Wanda)
        first = family in UNLIKE and isinstance(method, Dass) and (scope == "all" or family == "llama")
        name, marks = (
            f"{family}-{scope}-{method}-{'='.join(chosen)}",
            length_of(first, every_family or family in UNLIKE),
        )
        yield pytest.param(chosen, method, scope, family, id=name, marks=marks)


@pytest.mark.parametrize(("chosen", "method", "scope", "family"), contract_cases())
def test_contract(chosen, method, scope, family, tiny_model, tokens, attached):
    stages, pattern = stages_of(chosen), Unstructured(0.5) if chosen[0] == "allocation" else NM(2, 4)
    if not is_served(stages, method, pattern, scope):
        return
    model = tiny_model(family)
    hooks = attached(model)
    others = {name: value for name, value in model.state_dict().items() if "norm" in name or "embed" in name}
    others = copy.deepcopy(others)
    options = {"scope": scope, "batch_size": 3, "min_tokens": 1, "return_hidden": True, "stages": stages}
    pruning = prune_blocks(model, tokens, method, pattern, **options)
    layers = [layer for report in pruning.reports for layer in verify(report, pruning.patterns[report.index])]
    assert {layer.name for layer in layers} == {site.name for site in sites_of(model, scope)}
    assert all(layer.excess == 0 for layer in layers)
    if chosen[0] == "allocation":
        blocks: Counter[int] = Counter()
        for report in pruning.reports:
            blocks[report.index] += sum(int((~result.keep).sum()) for result in report.results.values())
        assert abs(sum(blocks.values()) - sum(layer.size for layer in layers) // 2) <= max(2, len(layers) // 4)
        assert len(set(blocks.values())) == 2  # the two blocks get different shares
    else:
        assert all(layer.zeros * 2 == layer.size for layer in layers)
    if stages.repair.active:
        # reconstruction of a whole MLP may give up some of gate and up for its output, which is that of down
        last = [layer for layer in layers if chosen[1] != "block" or layer.role in ("down", "fc2", "o")]
        assert all(layer.output_error <= layer.output_error_before * (1 + 1e-5) for layer in last)
        assert any(layer.output_error < 0.99 * layer.output_error_before for layer in layers)
    else:
        assert all(layer.output_error is None for layer in layers)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in others.items())
    assert attached(model) == hooks


@pytest.mark.thorough
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
@pytest.mark.parametrize("chosen", [one for one in ACTIVE if one[0] != "allocation"], ids="=".join)
def test_the_batch_size_changes_no_weight(chosen, batch_size, family, tiny_model):
    weights = []
    tokens = torch.randint(64, (5, 60), generator=torch.Generator().manual_seed(2))  # enough for each expert
    for size in (batch_size, 5):
        model = tiny_model(family)
        method = next(one for one in METHODS if is_served(stages_of(chosen), one, NM(2, 4), "mlp"))
        prune_blocks(model, tokens, method, batch_size=size, min_tokens=1, stages=stages_of(chosen))
        weights.append([site.matrix.weight.clone() for site in sites_of(model, "mlp")])
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one == 0, other == 0)
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


# --- permute


@each_family
@pytest.mark.parametrize(("method", "scope"), [(Dass(), "mlp"), (Wanda(), "all")], ids=str)
def test_neurons_in_another_order_compute_the_same(family, method, scope, tiny_model, tokens):
    model = tiny_model(family)
    before = model(tokens).logits
    dense = {site.name: site.matrix.weight.clone() for site in sites_of(model, scope)}
    everything = NM(4, 4)
    pruning = prune_blocks(
        model, tokens, method, everything, scope=scope, min_tokens=0, stages=Stages(permute=Neurons())
    )
    assert torch.allclose(model(tokens).logits, before, atol=1e-5)
    orders = {name: entry for report in pruning.reports for name, entry in report.orders.items()}
    for site in sites_of(model, scope):
        if site.role in (Role.Q, Role.K):
            assert site.name not in orders and torch.equal(site.matrix.weight, dense[site.name])
            continue
        axis, order = orders[site.name]
        assert sorted(order.tolist()) == list(range(len(order))) != order.tolist()
        assert torch.equal(site.matrix.weight, dense[site.name].index_select(axis, order))


def test_channels_that_are_not_free_are_noticed(tiny_model, tokens):
    """An attention whose output has its channels scaled apart: the order of v and o is no longer free."""
    model = tiny_model("llama")
    output = model.model.layers[0].self_attn.o_proj
    scale = torch.linspace(-3, 3, output.in_features)
    output.register_forward_pre_hook(lambda module, args: (args[0] * scale,))
    with pytest.raises(UserError) as caught:
        prune_blocks(model, tokens, Wanda(), scope="all", stages=Stages(permute=Neurons()))
    assert contains(str(caught.value), ["layers.0", "not free", "permute=none"])


def test_the_order_helps_a_method_that_compares_neurons(tiny_model, tokens):
    """The score that the mask keeps grows: it is what the order is chosen for."""

    def kept_importance(rounds):
        model, total = tiny_model("llama"), 0.0
        stages = Stages() if rounds is None else Stages(permute=Neurons(rounds))
        for report in prune_blocks(model, tokens, Dass(alpha=1.0), stages=stages).reports:
            views = {linear.role: linear for linear in report.linears}
            for linear in report.linears:
                scale = linear.norm if linear.role not in READER_OF else None
                scores = linear.weight.abs() * (
                    scale if scale is not None else views[READER_OF[linear.role]].norm[:, None]
                )
                total += float(scores.sum() / len(scores))
            break  # later blocks get other inputs
        return total

    assert kept_importance(None) < kept_importance(0)
    assert kept_importance(0) <= kept_importance(2) * (1 + 1e-6)


def test_an_order_that_changes_nothing_is_refused():
    for stages, method, pattern, scope, words in (
        (Stages(permute=Neurons()), Dass(), Unstructured(0.5), "mlp", ["50%", "N:M"]),
    ):
        with pytest.raises(UserError) as refused:
            stages.check(method, pattern, scope)
        assert contains(str(refused.value), words)


# --- repair


@pytest.mark.thorough
@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3"])
@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=repr)
def test_least_squares_reaches_the_solution_on_the_support(method, family, inputs, tiny_model, tokens):
    """Against a dense solver on inputs and outputs that hooks of the test have seen."""
    stages = Stages(repair=LeastSquares(steps=400, damping=0.0, inputs=inputs))
    model = tiny_model(family)
    many = torch.randint(64, (20, 30), generator=torch.Generator().manual_seed(2))
    decoder = decoder_of(model)
    sites = {site.role: site for site in decoder.sites(0, "mlp")}
    last = sites[Role.DOWN if Role.DOWN in sites else Role.FC2]
    dense = copy.deepcopy(model)
    solved = []

    def stop(report):
        if not solved:
            solved.append({linear.role: linear.weight.clone() for linear in report.linears})

    prune_blocks(model, many, method, NM(2, 4), on_report=stop, stages=stages)
    seen = {}
    for name, one in (("dense", dense), ("pruned", model)):
        module = one.get_submodule(last.name)

        def record(module, args, output, name=name):
            seen[name] = (args[0].detach().flatten(0, -2).double(), output.detach().flatten(0, -2).double())

        handle = module.register_forward_hook(record)
        one(many)
        handle.remove()
    bias = getattr(dense.get_submodule(last.name), "bias", None)
    targets = seen["dense"][1] - (0 if bias is None else bias.detach().double())
    found = solved[0][last.role].double()
    inputs_seen = seen[inputs][0]
    for row in (0, 7):
        support = found[row] != 0
        best = torch.linalg.lstsq(inputs_seen[:, support], targets[:, row]).solution
        ours, theirs = (
            float((inputs_seen[:, support] @ weights - targets[:, row]).square().sum())
            for weights in (found[row, support], best)
        )
        assert ours <= theirs * 1.001 + 1e-9


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=repr)
@pytest.mark.parametrize("method", PRUNING, ids=repr)
def test_no_method_is_left_with_a_larger_error(method, pattern, tiny_model, tokens):
    model = tiny_model("llama").to(torch.bfloat16)
    layers = prune(model, tokens, {"method": method, "repair": "least_squares"}, pattern, scope="all").layers
    assert layers and all(layer.output_error <= layer.output_error_before for layer in layers)


def test_stages_at_their_default_leave_weights_and_speed_alone(tiny_model, tokens):
    one, other = tiny_model("llama"), tiny_model("llama")
    prune(one, tokens, "dass")
    prune(other, tokens, {"method": "dass", **DEFAULTS})
    assert_same_state(one, other.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "repair.steps=0"),
        ({"damping": -1.0}, "repair.damping=-1.0"),
        ({"inputs": "both"}, "repair.inputs='both'"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LeastSquares(**settings)
    with pytest.raises(UserError, match="rounds=-1"):
        Neurons(rounds=-1)


@pytest.mark.thorough
@each_family
@pytest.mark.parametrize(
    "chosen",
    [
        {"method": "dass", "permute": "neurons", "repair": "least_squares"},
        {"method": "sparsegpt", "permute": "neurons", "repair": "least_squares"},
        {"method": "wanda", "permute": "neurons", "refine": "swaps", "repair": "least_squares"},
    ],
    ids=lambda chosen: "+".join(chosen.values()),
)
def test_stages_compose(chosen, family, tiny_model, tokens):
    errors = []
    for stages in ({"method": chosen["method"], "repair": "least_squares"}, chosen):
        pruned = prune(tiny_model(family), tokens, stages)
        assert pruned.sparsity == 0.5
        assert all(layer.output_error <= layer.output_error_before * (1 + 1e-5) for layer in pruned.layers)
        errors.append([layer.output_error for layer in pruned.layers])
    assert errors[0] != errors[1]


@pytest.mark.thorough
@each_family
@pytest.mark.parametrize("repair", ["least_squares", "block"])
def test_kept_neurons_change_no_weight(repair, family, tiny_model, tokens, monkeypatch):
    """The pass on starts from the neurons that the repair has seen, unless gate or up were changed after it."""
    weights = []
    for limit in (repair_passes.MAX_KEPT_NEURONS, 0):
        monkeypatch.setattr(repair_passes, "MAX_KEPT_NEURONS", limit)
        model = tiny_model(family)
        stages = stages_of(("permute", "neurons"), ("repair", repair))
        prune_blocks(model, tokens, Dass(), scope="all", min_tokens=1, stages=stages)
        weights.append([site.matrix.weight.clone() for site in sites_of(model, "all")])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_the_first_linears_of_the_mlp_run_once_less_where_neurons_are_kept(tiny_model, tokens, monkeypatch):
    runs = []
    for limit in (repair_passes.MAX_KEPT_NEURONS, 0):
        monkeypatch.setattr(repair_passes, "MAX_KEPT_NEURONS", limit)
        model, inputs = tiny_model("llama"), []
        gate = model.model.layers[0].mlp.gate_proj
        own = gate.forward
        gate.forward = lambda entered, own=own, inputs=inputs: (inputs.append(1), own(entered))[1]
        prune_blocks(model, tokens, Dass(), stages=Stages(repair=LeastSquares()), batch_size=len(tokens))
        runs.append(len(inputs))
    assert runs[0] == runs[1] - 1
