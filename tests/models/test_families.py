"""Roles: complete, on the right modules, and sharing the inputs that the table says they share."""

from __future__ import annotations

import pytest
import torch
from conftest import OWN, SHAPE
from support import VOCABULARY, save_tiny, settings_of, tiny_overrides
from torch import Tensor, nn
from transformers import AutoConfig

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
    SCOPES,
    UP,
    O,
    Q,
    Role,
    family_of,
)
from dass_exp.runs.context import Bench, SilentReporter

LLAMA_ROLES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


EACH = pytest.mark.parametrize("family", sorted(FAMILIES))


@EACH
def test_sites_cover_every_matrix_of_a_block_once_but_the_router(family, tiny_model):
    """Each weight is marked with the number of sites that it lies in: one everywhere, zero in routers."""
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
def test_a_site_is_the_rows_that_make_its_output(family, tiny_model, tokens):
    """Zeroing a site's weight zeroes what it makes and nothing beside it: seen at the linear that holds it."""
    model = tiny_model(family)
    decoder = decoder_of(model)
    for site in decoder.sites(0, "all"):
        if site.matrix.expert is not None:
            continue
        whole = site.matrix.module(torch.eye(site.matrix.in_features)) - (
            site.matrix.module.bias if site.matrix.module.bias is not None else 0
        )
        rows = (
            torch.arange(whole.shape[1]) if site.matrix.rows is None else torch.arange(whole.shape[1])[site.matrix.rows]
        )
        torch.testing.assert_close(whole[:, rows].T, site.matrix.weight)


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
            first, second = seen[one.name], seen[other.name]
            shared = first.shape == second.shape and torch.equal(first, second)
            parallel = {one.source, other.source} == {
                "attention",
                "mlp",
            } and family == "phi"  # attention and MLP read one norm
            assert shared == (one.source == other.source or parallel)


@EACH
def test_what_reads_a_neuron_has_a_column_for_it(family, tiny_model):
    for index in range(2):
        units: dict[str, dict[Role, tuple[int, int]]] = {}
        for site in decoder_of(tiny_model(family)).sites(index, "mlp"):
            units.setdefault(site.unit, {})[site.role] = (site.matrix.out_features, site.matrix.in_features)
        for shapes in units.values():
            assert shapes.keys() in (GLU, PLAIN)
            assert all(shapes[role] == shapes[READER_OF[role]][::-1] for role in shapes if role in READER_OF)


@torch.no_grad()
def after_first_block(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens, output_hidden_states=True).hidden_states[1]


@EACH
def test_queries_keys_and_values_are_what_they_are_called(family, tiny_model, tokens):
    """Without queries attention is uniform, whatever the keys: independent of how a fused linear is laid out."""
    model = tiny_model(family)
    sites = {site.role: site.matrix for site in decoder_of(model).sites(0, "attention")}
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    for role in (Role.K, Role.V):
        whole = after_first_block(model, tokens)
        sites[role].write(1.5 * sites[role].weight.flip(0))
        assert not torch.allclose(after_first_block(model, tokens), whole)
    sites[Q].write(torch.zeros_like(sites[Q].weight))
    without = after_first_block(model, tokens)
    sites[Role.K].write(1.5 * sites[Role.K].weight.flip(0))
    torch.testing.assert_close(after_first_block(model, tokens), without)
    sites[Role.V].write(1.5 * sites[Role.V].weight.flip(0))
    assert not torch.allclose(after_first_block(model, tokens), without)


@pytest.mark.parametrize(
    "family", sorted(name for name, family in FAMILIES.items() if GATE in family.places and family.experts is None)
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


def test_experts_are_units_of_their_own_and_plain_blocks_among_them_are_not(tiny_model):
    decoder = decoder_of(tiny_model("qwen3_moe"))
    mixture, plain = ([(site.unit, site.name) for site in decoder.sites(index, "mlp")] for index in (0, 1))
    assert mixture[:4] == [
        ("model.layers.0.mlp.experts.0", "model.layers.0.mlp.experts.0.gate"),
        ("model.layers.0.mlp.experts.0", "model.layers.0.mlp.experts.0.up"),
        ("model.layers.0.mlp.experts.0", "model.layers.0.mlp.experts.0.down"),
        ("model.layers.0.mlp.experts.1", "model.layers.0.mlp.experts.1.gate"),
    ]
    assert len(mixture) == 12
    assert plain == [("model.layers.1", f"model.layers.1.mlp.{role}_proj") for role in ("gate", "up", "down")]


def test_scopes_divide_the_roles():
    assert SCOPES["mlp"] | SCOPES["attention"] == SCOPES["all"] == frozenset(Role)
    assert not SCOPES["mlp"] & SCOPES["attention"]


@pytest.mark.parametrize(("scope", "count"), [("mlp", 3), ("attention", 4), ("all", 7)])
def test_a_scope_yields_its_linears_only(scope, count, tiny_model):
    found = [site.role for site in decoder_of(tiny_model("llama")).sites(1, scope)]
    assert len(found) == count
    assert set(found) == SCOPES[scope] - PLAIN


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "llama"])
def test_a_run_of_a_gemma_begins_every_window_with_bos(family, tmp_path, short_texts):
    """In calibration and in scoring, with a tokenizer that adds none by itself."""
    own = {**SHAPE, **OWN[family], "vocab_size": VOCABULARY, "max_position_embeddings": 4096}
    folder = save_tiny(tmp_path / "model", AutoConfig.for_model(family, **own))
    bench = Bench(settings_of(*tiny_overrides(folder, tmp_path / "results")), SilentReporter())
    first = torch.cat([bench.calibration.ids[:, 0], bench.windows.ids[:, 0]])
    assert bench.bos == ("never" if family == "llama" else "window")
    assert bool((first == bench.tokenizer.bos_token_id).all()) == (family != "llama")
    assert bench.calibration.ids.shape[1] == bench.windows.ids.shape[1] == 32


@pytest.mark.parametrize(
    ("family", "bos"),
    [("llama", "tokenizer"), ("mistral", "tokenizer"), ("gemma", "window"), ("gemma3_text", "window")],
)
def test_gemma_windows_start_with_bos(family, bos):
    assert FAMILIES[family].bos == bos


def test_every_family_has_a_tiny_model():
    assert set(OWN) == set(FAMILIES)


def test_a_family_that_looks_like_llama_is_tried_as_one_with_a_warning(tiny_model, caplog):
    model = tiny_model("llama")
    model.config.model_type = "newcomer"
    decoder = decoder_of(model)
    assert [site.role for site in decoder.sites(0, "all")] == [role for role in Role if role not in PLAIN]
    assert (
        "model family 'newcomer' is in no table: it is taken for a LLaMA, with blocks: model.layers, q: self_attn.q_proj"
        in caplog.text
    )


# --- what is refused


def test_an_unknown_family_is_refused_with_the_known_ones_and_the_lines_that_would_describe_it(tiny_model):
    for model in (tiny_model("gpt2"), tiny_model("phi")):  # no blocks where LLaMA has them; other linears in them
        model.config.model_type = "mamba"
        with pytest.raises(UserError, match="'mamba' is not known") as told:
            decoder_of(model)
        assert f"known: {', '.join(sorted(FAMILIES))}" in str(told.value)
        assert "roles: {blocks: PATH, q: PATH, k: PATH, v: PATH, o: PATH, gate: PATH, up: PATH, down: PATH}" in str(
            told.value
        )


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
    site = list(decoder.sites(1, "mlp"))[-1]
    assert (site.name, site.role) == ("trunk.stages.1.mlp.out", DOWN)
    assert site.matrix.module is model.model.layers[1].mlp.down_proj


def test_given_roles_may_describe_an_mlp_without_a_glu(tiny_model):
    roles = {
        "blocks": "model.layers",
        **{role: LLAMA_ROLES[role] for role in "qkv"},
        "o": "self_attn.dense",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    decoder = decoder_of(tiny_model("phi"), roles)
    assert [site.role for site in decoder.sites(0, "mlp")] == [FC1, FC2]
    with pytest.raises(UserError, match="gate, up and down, or fc1 and fc2, not both"):
        family_of("novel", {**LLAMA_ROLES, "fc1": "mlp.fc1"})


def test_given_roles_replace_those_of_a_known_family():
    swapped = {**LLAMA_ROLES, "q": LLAMA_ROLES["o"], "o": LLAMA_ROLES["q"]}
    family = family_of("gemma", swapped)
    assert (family.places[Q].path, family.places[O].path) == (LLAMA_ROLES["o"], LLAMA_ROLES["q"])
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
        ({"down": "mlp"}, r"role down: model\.layers\.0\.mlp is a LlamaMLP; only a linear can be pruned"),
        ({"blocks": "model.nowhere"}, r"no blocks at model\.nowhere; set model\.roles\.blocks"),
        ({"blocks": "model.norm"}, r"model\.norm is no list of decoder blocks"),
    ],
)
def test_roles_that_lead_nowhere_are_refused(change, message, tiny_model):
    with pytest.raises(UserError, match=message):
        list(decoder_of(tiny_model("llama"), {**LLAMA_ROLES, **change}).sites(0, "all"))
