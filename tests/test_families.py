"""Roles: complete, on the right modules, and sharing the inputs that the table says they share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dass_exp.errors import UserError
from dass_exp.families import DOWN, FAMILIES, INPUT_OF, SCOPES, O, Q, Role, decoder_of, family_of

LLAMA_ROLES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_roles_cover_every_linear_of_a_block_once(family, tiny_model):
    model = tiny_model(family)
    decoder = decoder_of(model)
    modules = dict(model.named_modules())
    assert len(decoder.blocks) == model.config.num_hidden_layers
    for index, block in enumerate(decoder.blocks):
        found = list(decoder.linears(index, "all"))
        expected = {id(module) for module in block.modules() if isinstance(module, nn.Linear)}
        assert [role for _, role, _ in found] == list(Role)
        assert {id(module) for _, _, module in found} == expected
        assert len(found) == len(expected)
        assert all(modules[name] is module for name, _, module in found)
        assert modules[decoder.names[index]] is block


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_roles_share_an_input_exactly_where_the_table_says_so(family, tiny_model, tokens):
    model = tiny_model(family)
    seen: dict[Role, Tensor] = {}
    for _, role, module in decoder_of(model).linears(0, "all"):
        module.register_forward_pre_hook(lambda module, args, role=role: seen.update({role: args[0]}))
    with torch.no_grad():
        model(tokens)
    for one in Role:
        for other in Role:
            shared = seen[one].shape == seen[other].shape and torch.equal(seen[one], seen[other])
            assert shared == (INPUT_OF[one] == INPUT_OF[other])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_down_reads_what_gate_and_up_make(family, tiny_model):
    shapes = {role: module.weight.shape for _, role, module in decoder_of(tiny_model(family)).linears(0, "mlp")}
    assert shapes[Role.GATE] == shapes[Role.UP] == shapes[DOWN][::-1]


def test_scopes_divide_the_roles():
    assert SCOPES["mlp"] | SCOPES["attention"] == SCOPES["all"] == frozenset(Role)
    assert not SCOPES["mlp"] & SCOPES["attention"]


@pytest.mark.parametrize(("scope", "count"), [("mlp", 3), ("attention", 4), ("all", 7)])
def test_a_scope_yields_its_linears_only(scope, count, tiny_model):
    found = [role for _, role, _ in decoder_of(tiny_model("llama")).linears(1, scope)]
    assert len(found) == count
    assert set(found) == SCOPES[scope]


@pytest.mark.parametrize(("family", "bos"), [("llama", "tokenizer"), ("mistral", "tokenizer"), ("gemma", "window"), ("gemma3_text", "window")])
def test_gemma_windows_start_with_bos(family, bos):
    assert FAMILIES[family].bos == bos


# --- what is refused


def test_an_unknown_family_is_refused_with_the_known_ones(tiny_model):
    model = tiny_model("llama")
    model.config.model_type = "mamba"
    with pytest.raises(UserError, match=f"'mamba' is not known; known: {', '.join(sorted(FAMILIES))}"):
        decoder_of(model)


def test_a_model_without_a_config_is_named_by_its_class():
    with pytest.raises(UserError, match="'Linear' is not known"):
        decoder_of(nn.Linear(2, 2))


# --- roles given by the user


def renamed(model: nn.Module) -> nn.Module:
    """The model with its family, its list of blocks and one linear under other names."""
    model.config.model_type = "novel"
    model.trunk = model.model
    model.trunk.stages = model.model.layers
    for block in model.trunk.stages:
        block.mlp.out = block.mlp.down_proj
    return model


def test_given_roles_describe_an_unknown_family(tiny_model):
    model = renamed(tiny_model("llama"))
    decoder = decoder_of(model, {**LLAMA_ROLES, "down": "mlp.out", "blocks": "trunk.stages"})
    name, role, module = list(decoder.linears(1, "mlp"))[-1]
    assert (name, role) == ("trunk.stages.1.mlp.out", DOWN)
    assert module is model.model.layers[1].mlp.down_proj


def test_given_roles_replace_those_of_a_known_family():
    swapped = {**LLAMA_ROLES, "q": LLAMA_ROLES["o"], "o": LLAMA_ROLES["q"]}
    family = family_of("gemma", swapped)
    assert (family.linears[Q], family.linears[O]) == (LLAMA_ROLES["o"], LLAMA_ROLES["q"])
    assert (family.blocks, family.bos) == (FAMILIES["gemma"].blocks, "window")


def test_incomplete_roles_are_refused():
    partial = {key: path for key, path in LLAMA_ROLES.items() if key not in ("k", "down")}
    with pytest.raises(UserError, match=r"model\.roles: missing k, down"):
        family_of("novel", partial)


def test_an_unknown_role_is_refused():
    with pytest.raises(UserError, match=r"model\.roles='router': expected one of blocks, q, k, v, o, gate, up, down"):
        family_of("novel", {**LLAMA_ROLES, "router": "mlp.router"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down": "mlp.nowhere"}, r"role down: the model has no module model\.layers\.0\.mlp\.nowhere"),
        ({"down": "mlp"}, r"role down: model\.layers\.0\.mlp is a LlamaMLP; only nn\.Linear can be pruned"),
        ({"blocks": "model.nowhere"}, r"no blocks at model\.nowhere; set model\.roles\.blocks"),
        ({"blocks": "model.norm"}, r"model\.norm is no list of decoder blocks"),
    ],
)
def test_roles_that_lead_nowhere_are_refused(change, message, tiny_model):
    with pytest.raises(UserError, match=message):
        list(decoder_of(tiny_model("llama"), {**LLAMA_ROLES, **change}).linears(0, "all"))
