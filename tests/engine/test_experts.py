"""Mixtures of experts: each expert is pruned by its own tokens, starved ones are reported, the router stays."""

import pytest
import torch
from engine_support import CALIBRATED, prune_blocks, sites_of
from torch import Tensor, nn

from dass_exp.engine.capture import capture
from dass_exp.engine.observers import observe_experts, observe_inputs, routes_of
from dass_exp.engine.verify import verify
from dass_exp.errors import NumericalError, UserError
from dass_exp.masks import NM
from dass_exp.methods.base import Block, LinearView
from dass_exp.methods.dass import Dass
from dass_exp.methods.sparsegpt import SparseGPT
from dass_exp.methods.wanda import Wanda
from dass_exp.models.decoder import decoder_of
from dass_exp.models.families import DOWN, FAMILIES, GATE, UP
from dass_exp.statistics import Gram, InputNorm

MIXTURES = sorted(name for name, family in FAMILIES.items() if family.experts is not None)
each_mixture = pytest.mark.parametrize("family", MIXTURES)


@pytest.fixture
def many() -> Tensor:
    return torch.randint(64, (6, 20), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def routed(model: nn.Module, tokens: Tensor) -> dict[int, tuple[list[Tensor], list[Tensor]]]:
    """By expert of the first block: the tokens routed to it and their neurons there, one token at a time."""
    mlp, inputs = model.model.layers[0].mlp, []
    handle = mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    for sequence in tokens:
        model(sequence[None])
    handle.remove()
    fused = mlp.experts.gate_up_proj
    by_expert = {number: ([], []) for number in range(len(fused))}
    for token in torch.cat(inputs):
        ranked = sorted(by_expert, key=lambda number: -float(mlp.gate.weight[number] @ token))
        for number in ranked[: mlp.gate.top_k]:
            gate, up = (half @ token for half in fused[number].chunk(2))
            by_expert[number][0].append(token)
            by_expert[number][1].append(torch.nn.functional.silu(gate) * up)
    return by_expert


@each_mixture
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", [InputNorm, Gram])
@torch.no_grad()
def test_routed_statistics_are_those_of_a_slow_reference(family, batch_size, kind, tiny_model, many):
    model = tiny_model(family)
    decoder, expected = decoder_of(model), routed(model, many)
    batches = capture(model, list(decoder.blocks), many, batch_size)
    with observe_inputs(decoder, 0, "mlp", lambda role: [kind], many.shape[1]) as stats:
        for batch in batches:
            batch.run_block(decoder.blocks[0], 0)
    for site in decoder.sites(0, "mlp"):
        rows = expected[site.matrix.expert][site.role == DOWN]
        stat = stats[site.source]
        assert (stat.tokens, stat.sequences) == (len(rows), len(many))
        inputs = torch.stack(rows).double() if rows else torch.zeros(0, site.matrix.in_features, dtype=torch.float64)
        observed, wanted = (stat.norm, inputs.norm(dim=0)) if kind is InputNorm else (stat.matrix, inputs.T @ inputs)
        torch.testing.assert_close(observed.double(), wanted, rtol=1e-4, atol=1e-5)
    assert sum(len(rows) for rows, _ in expected.values()) == many.numel() * decoder.blocks[0].mlp.gate.top_k


@each_mixture
@torch.no_grad()
def test_the_observed_experts_give_what_the_model_gives(family, tiny_model, many):
    model = tiny_model(family)
    decoder = decoder_of(model)
    (batch,) = capture(model, list(decoder.blocks), many, len(many))
    plain = batch.run_block(decoder.blocks[0], 0)
    with observe_inputs(decoder, 0, "mlp", lambda role: [InputNorm], many.shape[1]):
        observed = batch.run_block(decoder.blocks[0], 0)
    torch.testing.assert_close(observed, plain, rtol=1e-5, atol=1e-6)
    assert torch.equal(batch.run_block(decoder.blocks[0], 0), plain)


@each_mixture
def test_each_expert_is_pruned_by_its_own_tokens(family, tiny_model, many):
    """DaSS by hand in every expert of the first block."""
    model, experts = tiny_model(family), tiny_model(family).model.layers[0].mlp.experts
    expected = routed(model, many)
    masks = prune_blocks(model, many, Dass(), min_tokens=1).masks
    for number, (inputs, neurons) in expected.items():
        gate, up = experts.gate_up_proj.detach()[number].chunk(2)
        importance = torch.stack(neurons).norm(dim=0)
        by_hand = {role: half.abs() * importance.sqrt()[:, None] for role, half in ((GATE, gate), (UP, up))}
        by_hand[DOWN] = experts.down_proj.detach()[number].abs() * importance
        assert inputs
        for role, scores in by_hand.items():
            keep = masks[f"model.layers.0.mlp.experts.{number}.{role.value}"]
            assert torch.equal(keep, NM(2, 4).keep(scores, 1 if role == DOWN else 0)), (number, role)


# --- starved experts


def starve(model: nn.Module) -> int:
    """Let no token reach one expert of the first block; its number."""
    gate = model.model.layers[0].mlp.gate
    lost, forward = 2, gate.forward

    def route(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, scores, indices = forward(hidden)
        free = torch.tensor([[next(number for number in (0, 1, 3) if number not in row)] for row in indices.tolist()])
        return logits, scores, torch.where(indices == lost, free, indices)

    gate.forward = route
    return lost


@pytest.mark.parametrize("method", CALIBRATED, ids=repr)
def test_a_starved_expert_is_reported_and_ranked_as_if_its_inputs_were_alike(method, tiny_model, many):
    model = tiny_model("mixtral")
    name = f"model.layers.0.mlp.experts.{starve(model)}"
    report = prune_blocks(model, many, method, min_tokens=1).reports[0]
    assert report.starved == (name,)
    assert {layer.tokens for layer in verify(report, NM(2, 4)) if layer.name.startswith(name)} == {0}
    views, unit = [], decoder_of(tiny_model("mixtral")).units(0, "mlp")[name]
    for site in sites_of(tiny_model("mixtral"), "mlp"):
        if site.unit == name:
            kind = method.stat_of(site.role)
            stat = kind.of_unit(site.matrix.in_features, torch.device("cpu"), unit)
            stat.reset_to_uniform()
            views.append(LinearView(site.name, site.role, site.matrix, stat))
    expected = method.prune_block(Block(name, views), NM(2, 4))
    assert len(expected) == 3
    assert all(torch.equal(report.results[linear].keep, result.keep) for linear, result in expected.items())


def test_a_starved_expert_may_be_refused(tiny_model, many):
    model = tiny_model("mixtral")
    starve(model)
    message = r"experts\.2: 0 calibration tokens were routed to this expert, fewer than experts\.min_tokens=1"
    with pytest.raises(NumericalError, match=message):
        prune_blocks(model, many, Wanda(), min_tokens=1, starved="raise")


def test_too_few_is_what_the_setting_says(tiny_model, many):
    reports = prune_blocks(tiny_model("olmoe"), many, Wanda(), min_tokens=10**6).reports
    assert all(len(report.starved) == 4 for report in reports)


def test_an_expert_without_a_token_is_starved_even_if_none_is_asked_for(tiny_model, tokens):
    model = tiny_model("mixtral")
    reports = prune_blocks(model, tokens[:1, :1], SparseGPT(), min_tokens=0).reports
    assert any(report.starved for report in reports)
    assert all((half != 0).any() for half in model.model.layers[0].mlp.experts.gate_up_proj)


# --- the module that holds the experts


def test_experts_of_another_layout_are_refused(tiny_model):
    experts = tiny_model("mixtral").model.layers[0].mlp.experts
    experts.is_transposed = True
    observed = observe_experts(experts, FAMILIES["mixtral"].experts, {}, 1)
    with pytest.raises(UserError, match=r"MixtralExperts: experts of this layout \(is_transposed\)"), observed:
        pass


def test_a_forward_of_ones_own_is_given_back(tiny_model):
    experts = tiny_model("mixtral").model.layers[0].mlp.experts
    experts.forward = own = lambda *arguments: None
    with observe_experts(experts, FAMILIES["mixtral"].experts, {}, 1):
        assert experts.forward is not own
    assert experts.forward is own


def test_routes_are_the_tokens_of_each_expert_in_their_order():
    tokens, sequences, experts = 7, 3, 5
    scores = torch.rand(tokens * sequences, experts - 1, generator=torch.Generator().manual_seed(0))
    top_k_index = scores.topk(2).indices  # the last expert gets none
    for expert, route in enumerate(routes_of(top_k_index, experts, tokens)):
        token, choice = torch.where(top_k_index == expert)
        assert torch.equal(route.token, token)
        assert torch.equal(route.choice, choice)
        assert route.lengths == torch.bincount(token // tokens, minlength=sequences).tolist()
