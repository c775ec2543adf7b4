"""Mixtures of experts: each expert's statistics are those of its own tokens, the starved ones are told, the router stays."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dass_exp.engine.block_report import BlockReport
from dass_exp.engine.capture import capture
from dass_exp.engine.experts import observing_experts
from dass_exp.engine.observers import observing
from dass_exp.engine.prune import Options, prune_model
from dass_exp.engine.verify import verify
from dass_exp.errors import NumericalError, UserError
from dass_exp.masks import NM
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
def slowly(model: nn.Module, tokens: Tensor) -> dict[int, tuple[list[Tensor], list[Tensor]]]:
    """By expert of the first block: each token that is routed to it, and the neurons that it makes there, one token at a time."""
    block, seen = model.model.layers[0], []
    handle = block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for sequence in tokens:
        model(sequence[None])
    handle.remove()
    experts, top_k = block.mlp.experts, block.mlp.gate.top_k
    found: dict[int, tuple[list[Tensor], list[Tensor]]] = {number: ([], []) for number in range(len(experts.down_proj))}
    for token in torch.cat([part[0] for part in seen]):
        chosen = sorted(range(len(found)), key=lambda number: -float(block.mlp.gate.weight[number] @ token))[:top_k]
        for number in chosen:
            fused = experts.gate_up_proj[number]
            gate, up = fused[: len(fused) // 2] @ token, fused[len(fused) // 2 :] @ token
            found[number][0].append(token)
            found[number][1].append(torch.nn.functional.silu(gate) * up)
    return found


@each_mixture
@pytest.mark.parametrize("batch_size", [1, 4])
def test_routed_statistics_are_those_of_a_slow_reference(family, batch_size, tiny_model, many):
    model = tiny_model(family)
    decoder, expected = decoder_of(model), slowly(model, many)
    with torch.no_grad():
        batches = capture(model, list(decoder.blocks), many, batch_size)
        for kind in (InputNorm, Gram):
            with observing(decoder, 0, "mlp", kind, many.shape[1]) as stats:
                for batch in batches:
                    batch.through(decoder.blocks[0], 0)
            for site in decoder.sites(0, "mlp"):
                rows = expected[site.matrix.expert][site.role == DOWN]
                stat = stats[site.source]
                assert stat.tokens == len(rows)
                assert stat.sequences == len(many)
                inputs = (
                    torch.stack(rows).double() if rows else torch.zeros(0, site.matrix.in_features, dtype=torch.float64)
                )
                found, wanted = (
                    (stat.norm, inputs.norm(dim=0)) if kind is InputNorm else (stat.matrix, inputs.T @ inputs)
                )
                torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    assert sum(len(rows) for rows, _ in expected.values()) == many.numel() * decoder.blocks[0].mlp.gate.top_k


@each_mixture
def test_the_observed_experts_give_what_the_model_gives(family, tiny_model, many):
    model = tiny_model(family)
    decoder = decoder_of(model)
    with torch.no_grad():
        (batch,) = capture(model, list(decoder.blocks), many, len(many))
        plain = batch.through(decoder.blocks[0], 0)
        with observing(decoder, 0, "mlp", InputNorm, many.shape[1]):
            observed = batch.through(decoder.blocks[0], 0)
        torch.testing.assert_close(observed, plain, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(batch.through(decoder.blocks[0], 0), plain, rtol=0, atol=0)


@each_mixture
def test_each_expert_is_pruned_by_its_own_tokens(family, tiny_model, many):
    """DaSS by hand in every expert of the first block."""
    model = tiny_model(family)
    reference, expected = copy.deepcopy(model), slowly(model, many)
    reports: list[BlockReport] = []
    prune_model(model, many, Dass(), NM(2, 4), Options(on_block=reports.append, min_tokens=1))
    experts = reference.model.layers[0].mlp.experts
    for number, (inputs, neurons) in expected.items():
        gate, up = experts.gate_up_proj.detach()[number].chunk(2)
        importance = torch.stack(neurons).norm(dim=0)
        by_hand = {role: half.abs() * importance.sqrt()[:, None] for role, half in ((GATE, gate), (UP, up))}
        by_hand[DOWN] = experts.down_proj.detach()[number].abs() * importance
        assert inputs
        for role, scores in by_hand.items():
            dim = 1 if role == DOWN else 0
            keep = reports[0].cuts[f"model.layers.0.mlp.experts.{number}.{role.value}"].keep
            assert torch.equal(keep, NM(2, 4).keep(scores, dim)), (number, role)


@pytest.mark.parametrize("method", [Wanda(), Dass(), SparseGPT()], ids=repr)
def test_a_starved_expert_is_told_and_ranked_by_its_weights(method, tiny_model, many):
    model = tiny_model("mixtral")
    lost = starve(model)
    weights = {site.name: site.matrix.weight.clone() for site in decoder_of(model).sites(0, "mlp")}
    reports: list[BlockReport] = []
    prune_model(model, many, method, NM(2, 4), Options(on_block=reports.append, min_tokens=1))
    name = f"model.layers.0.mlp.experts.{lost}"
    assert reports[0].starved == (name,)
    layers = {layer.name: layer for layer in verify(reports[0], NM(2, 4))}
    for role in (GATE, UP, DOWN):
        site = f"{name}.{role.value}"
        assert layers[site].tokens == 0
        if not isinstance(method, SparseGPT):
            assert torch.equal(
                reports[0].cuts[site].keep, NM(2, 4).keep(weights[site].abs(), method.group(role, NM(2, 4)))
            )


def starve(model: nn.Module) -> int:
    """Let no token reach one expert of the first block; its number."""
    gate = model.model.layers[0].mlp.gate
    lost, forward = 2, gate.forward

    def routed(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, scores, indices = forward(hidden)
        free = torch.tensor([[next(number for number in (0, 1, 3) if number not in row)] for row in indices.tolist()])
        return logits, scores, torch.where(indices == lost, free, indices)

    gate.forward = routed
    return lost


def test_a_starved_expert_may_be_refused(tiny_model, many):
    model = tiny_model("mixtral")
    starve(model)
    with pytest.raises(
        NumericalError,
        match=r"experts\.2: 0 calibration tokens were routed to this expert, fewer than experts\.min_tokens=1",
    ):
        prune_model(model, many, Wanda(), NM(2, 4), Options(min_tokens=1, starved="refuse"))


def test_too_few_is_what_the_setting_says(tiny_model, many):
    reports: list[BlockReport] = []
    prune_model(tiny_model("olmoe"), many, Wanda(), NM(2, 4), Options(on_block=reports.append, min_tokens=10**6))
    assert all(len(report.starved) == 4 for report in reports)
    with pytest.raises(UserError, match=r"experts\.starved='ignore'"):
        Options(starved="ignore")


def test_experts_of_another_layout_are_refused(tiny_model):
    experts = tiny_model("mixtral").model.layers[0].mlp.experts
    experts.is_transposed = True
    observed = observing_experts(experts, FAMILIES["mixtral"].experts, {}, 1)
    with pytest.raises(UserError, match=r"MixtralExperts: experts of this layout \(is_transposed\)"), observed:
        pass


def test_a_forward_of_ones_own_is_given_back(tiny_model):
    experts = tiny_model("mixtral").model.layers[0].mlp.experts
    experts.forward = own = lambda *arguments: None
    with observing_experts(experts, FAMILIES["mixtral"].experts, {}, 1):
        assert experts.forward is not own
    assert experts.forward is own


def test_an_expert_without_a_token_is_starved_even_if_none_is_asked_for(tiny_model, tokens):
    model, reports = tiny_model("mixtral"), []
    prune_model(model, tokens[:1, :1], SparseGPT(), NM(2, 4), Options(on_block=reports.append, min_tokens=0))
    assert any(report.starved for report in reports)
    experts = model.model.layers[0].mlp.experts
    assert all((half != 0).any() for half in experts.gate_up_proj)
