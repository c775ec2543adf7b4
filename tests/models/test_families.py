"""Roles: complete, on the right modules, and with the shared inputs that the table claims."""

from __future__ import annotations

import pytest
import torch
from family_configs import OWN, SHAPE
from support import VOCABULARY, run_with, save_tiny, settings_of, tiny_overrides
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from dass_exp.data.tokens import calibration_tokens, evaluation_windows
from dass_exp.errors import UserError
from dass_exp.models.decoder import decoder_of
from dass_exp.models.families import (
    DOWN,
    FAMILIES,
    FC1,
    FC2,
    GATE,
    GLU,
    PLAIN,
    READER_OF,
    ROLES_IN_SCOPE,
    UP,
    O,
    Q,
    Role,
    family_of,
)
from dass_exp.runs.resolved_run import Components

LLAMA_ROLES = {role: f"self_attn.{role}_proj" for role in "qkvo"} | {
    role: f"mlp.{role}_proj" for role in ("gate", "up", "down")
}
EACH = pytest.mark.parametrize("family", sorted(FAMILIES))


@EACH
def test_sites_cover_every_matrix_of_a_block_once_but_the_router(family, tiny_model):
    """Every weight counts the sites that contain it: one everywhere, zero in routers."""
    model = tiny_model(family)
    decoder = decoder_of(model)
    assert len(decoder.blocks) == model.config.num_hidden_layers
    for index, block in enumerate(decoder.blocks):
        assert dict(model.named_modules())[decoder.names[index]] is block
        for parameter in block.parameters():
            parameter.data.zero_()
        sites = list(decoder.sites(index, "all"))
        for site in sites:
            site.matrix.write(site.matrix.weight + 1)
            assert site.matrix.weight.shape == (site.matrix.out_features, site.matrix.in_features)
        assert len({site.name for site in sites}) == len(sites)
        assert all(site.name.startswith(decoder.names[index]) for site in sites)
        for name, parameter in block.named_parameters():
            router = FAMILIES[family].experts is not None and name == "mlp.gate.weight"
            expected = 0 if parameter.ndim == 1 or router else 1
            assert bool((parameter == expected).all()), name
    assert decoder.size == sum(parameter.numel() for parameter in decoder.blocks.parameters() if parameter.ndim > 1)


@EACH
def test_a_site_is_the_rows_that_compute_its_output(family, tiny_model):
    """The module, given the identity, returns the site's weight in the site's rows."""
    for site in decoder_of(tiny_model(family)).sites(0, "all"):
        matrix = site.matrix
        if matrix.expert is None:
            bias = 0 if matrix.module.bias is None else matrix.module.bias
            output = matrix.module(torch.eye(matrix.in_features)) - bias
            rows = slice(None) if matrix.rows is None else matrix.rows
            torch.testing.assert_close(output[:, rows].T, matrix.weight)


@EACH
def test_roles_share_an_input_exactly_where_the_table_says_so(family, tiny_model, tokens):
    model = tiny_model(family)
    seen: dict[str, Tensor] = {}
    sites = [site for site in decoder_of(model).sites(0, "all") if site.matrix.expert is None]
    for site in sites:
        site.matrix.module.register_forward_pre_hook(lambda module, args, name=site.name: seen.update({name: args[0]}))
    with torch.no_grad():
        model(tokens)
    for one in sites:
        for other in sites:
            # attention and MLP of phi are parallel: they read the output of one norm
            parallel = family == "phi" and {one.source, other.source} == {"attention", "mlp"}
            assert torch.equal(seen[one.name], seen[other.name]) == (one.source == other.source or parallel)


@EACH
def test_the_reader_of_a_neuron_has_a_column_for_it(family, tiny_model):
    for index in range(2):
        units: dict[str, dict[Role, tuple[int, ...]]] = {}
        for site in decoder_of(tiny_model(family)).sites(index, "mlp"):
            units.setdefault(site.unit, {})[site.role] = tuple(site.matrix.weight.shape)
        for shapes in units.values():
            assert shapes.keys() in (GLU, PLAIN)
            assert all(shapes[role] == shapes[READER_OF[role]][::-1] for role in shapes if role in READER_OF)


@torch.no_grad()
def after_first_block(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens, output_hidden_states=True).hidden_states[1]


@EACH
def test_queries_keys_and_values_are_what_they_are_called(family, tiny_model, tokens):
    """Without queries attention is uniform, whatever the keys; this holds for any layout of a fused linear."""
    model = tiny_model(family)
    sites = {site.role: site.matrix for site in decoder_of(model).sites(0, "attention")}
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()

    def change_of_output(role: Role) -> bool:
        before = after_first_block(model, tokens)
        sites[role].write(1.5 * sites[role].weight.flip(0))
        return not torch.allclose(after_first_block(model, tokens), before, rtol=1.3e-6, atol=1e-5)

    assert change_of_output(Role.K)
    assert change_of_output(Role.V)
    sites[Q].write(torch.zeros_like(sites[Q].weight))
    assert not change_of_output(Role.K)
    assert change_of_output(Role.V)


@pytest.mark.parametrize(
    "family", sorted(name for name, family in FAMILIES.items() if GATE in family.locations and family.experts is None)
)
def test_gate_and_up_are_what_they_are_called(family, tiny_model, tokens):
    """The neurons are linear in up, and not in gate."""
    model = tiny_model(family)
    sites = {site.role: site.matrix for site in decoder_of(model).sites(0, "mlp")}
    seen: list[Tensor] = []
    sites[DOWN].module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for role in (None, UP, GATE):
        if role is not None:
            sites[role].write(2 * sites[role].weight)
        with torch.no_grad():
            model(tokens)
    torch.testing.assert_close(seen[1], 2 * seen[0])
    assert not torch.allclose(seen[2], 2 * seen[1], rtol=1e-2)


def test_experts_are_units_of_their_own_and_plain_mlps_between_them_are_not(tiny_model):
    decoder = decoder_of(tiny_model("qwen3_moe"))
    mixture, plain = ([(site.unit, site.name) for site in decoder.sites(index, "mlp")] for index in (0, 1))
    units, roles = [f"model.layers.0.mlp.experts.{expert}" for expert in range(4)], ("gate", "up", "down")
    assert mixture == [(unit, f"{unit}.{role}") for unit in units for role in roles]
    assert plain == [("model.layers.1", f"model.layers.1.mlp.{role}_proj") for role in roles]


def test_scopes_partition_the_roles():
    assert ROLES_IN_SCOPE["mlp"] | ROLES_IN_SCOPE["attention"] == ROLES_IN_SCOPE["all"] == frozenset(Role)
    assert not ROLES_IN_SCOPE["mlp"] & ROLES_IN_SCOPE["attention"]


@pytest.mark.parametrize(("scope", "count"), [("mlp", 3), ("attention", 4), ("all", 7)])
def test_a_scope_yields_its_linears_only(scope, count, tiny_model):
    roles = [site.role for site in decoder_of(tiny_model("llama")).sites(1, scope)]
    assert len(roles) == count
    assert set(roles) == ROLES_IN_SCOPE[scope] - PLAIN


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("family", "bos"), [("gemma", "window"), ("gemma2", "window"), ("gemma3_text", "window"), ("llama", "never")]
)
def test_a_run_of_a_gemma_begins_every_window_with_bos(family, bos, tmp_path, short_texts):
    """In calibration and in scoring, with a tokenizer that adds none by itself."""
    own = {**SHAPE, **OWN[family], "vocab_size": VOCABULARY, "max_position_embeddings": 4096}
    folder = save_tiny(tmp_path / "model", AutoConfig.for_model(family, **own))
    overrides = tiny_overrides(folder, tmp_path / "results")
    record, settings = run_with(*overrides).record, settings_of(*overrides)
    tokenizer, texts = AutoTokenizer.from_pretrained(folder), Components.of(settings)
    drawn = calibration_tokens(texts.calibration_text, settings.calibration, tokenizer, bos, settings.seed)
    windows = evaluation_windows(texts.evaluation_texts["wikipedia_mini"], 32, 4, tokenizer, bos)
    assert record["protocol"]["bos"] == bos
    assert record["calibration"]["tokens_sha256"] == drawn.sha256
    assert record["protocol"]["windows_sha256"] == windows.sha256


def test_every_family_has_a_tiny_model():
    assert set(OWN) == set(FAMILIES)


def test_a_family_that_looks_like_llama_is_tried_as_one_with_a_warning(tiny_model, caplog):
    model = tiny_model("llama")
    model.config.model_type = "newcomer"
    decoder = decoder_of(model)
    assert [site.role for site in decoder.sites(0, "all")] == [role for role in Role if role not in PLAIN]
    warning = (
        "model family 'newcomer' is in no table: it is taken for a LLaMA, with blocks: model.layers, q: self_attn."
    )
    assert warning in caplog.text


# Errors


@pytest.mark.parametrize("family", ["gpt2", "phi"])  # no blocks where LLaMA has them; other linears in the blocks
def test_the_error_for_an_unknown_family_lists_the_known_ones_and_how_to_describe_it(family, tiny_model):
    model = tiny_model(family)
    model.config.model_type = "mamba"
    with pytest.raises(UserError, match="'mamba' is not known") as caught:
        decoder_of(model)
    roles = "roles: {blocks: PATH, q: PATH, k: PATH, v: PATH, o: PATH, gate: PATH, up: PATH, down: PATH}"
    assert f"known: {', '.join(sorted(FAMILIES))}" in str(caught.value)
    assert roles in str(caught.value)


def test_a_model_without_a_config_is_named_by_its_class():
    with pytest.raises(UserError, match="'Linear' is not known"):
        decoder_of(nn.Linear(2, 2))


# Roles given by the user


def test_given_roles_describe_an_unknown_family(tiny_model):
    model = tiny_model("llama")
    model.config.model_type = "novel"
    model.trunk = model.model
    model.trunk.stages = model.model.layers
    for block in model.trunk.stages:
        block.mlp.out = block.mlp.down_proj
    decoder = decoder_of(model, {**LLAMA_ROLES, "down": "mlp.out", "blocks": "trunk.stages"})
    site = list(decoder.sites(1, "mlp"))[-1]
    assert (site.name, site.role) == ("trunk.stages.1.mlp.out", DOWN)
    assert site.matrix.module is model.model.layers[1].mlp.down_proj


def test_given_roles_may_describe_an_mlp_without_a_glu(tiny_model):
    attention = {role: LLAMA_ROLES[role] for role in "qkv"} | {"o": "self_attn.dense"}
    mlp = {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    decoder = decoder_of(tiny_model("phi"), {"blocks": "model.layers", **attention, **mlp})
    assert [site.role for site in decoder.sites(0, "mlp")] == [FC1, FC2]
    with pytest.raises(UserError, match="gate, up and down, or fc1 and fc2, not both"):
        family_of("novel", {**LLAMA_ROLES, "fc1": "mlp.fc1"})


def test_given_roles_replace_those_of_a_known_family():
    swapped = {**LLAMA_ROLES, "q": LLAMA_ROLES["o"], "o": LLAMA_ROLES["q"]}
    family = family_of("gemma", swapped)
    assert (family.locations[Q].path, family.locations[O].path) == (LLAMA_ROLES["o"], LLAMA_ROLES["q"])
    assert (family.blocks, family.bos) == (FAMILIES["gemma"].blocks, "window")


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({role: LLAMA_ROLES[role] for role in ("q", "v", "o", "gate", "up")}, r"model\.roles: missing k, down"),
        (LLAMA_ROLES | {"router": "mlp.router"}, r"model\.roles='router': expected one of blocks, q, k, v, o, gate"),
    ],
)
def test_incomplete_and_unknown_roles_are_refused(roles, message):
    with pytest.raises(UserError, match=message):
        family_of("novel", roles)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down": "mlp.nowhere"}, r"role down: the model has no module model\.layers\.0\.mlp\.nowhere"),
        ({"down": "mlp"}, r"role down: model\.layers\.0\.mlp is a LlamaMLP; only a linear can be pruned"),
        ({"blocks": "model.nowhere"}, r"no blocks at model\.nowhere; set model\.roles\.blocks"),
        ({"blocks": "model.norm"}, r"model\.norm is no list of decoder blocks"),
    ],
)
def test_roles_that_lead_nowhere_are_refused(change, message, tiny_model):
    with pytest.raises(UserError, match=message):
        list(decoder_of(tiny_model("llama"), {**LLAMA_ROLES, **change}).sites(0, "all"))
