"""The engine: what it captures, what it passes on, what it observes, and that it leaves nothing behind."""

from __future__ import annotations

import copy
import re
import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from engine_support import (
    CALIBRATED,
    FLAT_ROLES,
    PRUNING,
    assert_same_state,
    block_outputs,
    engine_options,
    prune_blocks,
    sites_of,
)
from torch import Tensor, nn

from dass_exp.engine.callbacks import Callback
from dass_exp.engine.capture import capture
from dass_exp.engine.prune import prune_model
from dass_exp.errors import NumericalError, UserError
from dass_exp.masks import NM, Pattern
from dass_exp.methods.base import Block, LinearView, MaskResult, Pruner
from dass_exp.methods.magnitude import Magnitude
from dass_exp.methods.sparsegpt import SparseGPT
from dass_exp.methods.wanda import Wanda
from dass_exp.models.families import DOWN, FAMILIES, PLAIN, Role
from dass_exp.statistics import Gram, InputNorm

each_family = pytest.mark.parametrize("family", sorted(FAMILIES))


@dataclass
class NoOp(Pruner):
    """Observes and prunes nothing, or raises."""

    failing: bool = False
    stat = InputNorm

    def prune_block(self, block: Block, pattern: Pattern) -> dict[str, MaskResult]:
        if self.failing:
            raise RuntimeError("inside a method")
        return {}

    def prune_linear(self, linear: LinearView, block: Block, pattern: Pattern) -> MaskResult:
        raise NotImplementedError


class TokenBlock(nn.Module):
    """A block that depends on a positional and on keyword arguments, passes inputs by keyword, and returns a tuple."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        shapes = {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
        for role in set(Role) - PLAIN:
            self.add_module(role.value, nn.Linear(*shapes.get(role, (width, width)), bias=False))

    def forward(
        self, hidden_states: Tensor, offset: Tensor, *, scale: Tensor, pair: tuple[Tensor, int]
    ) -> tuple[Tensor, str]:
        read = hidden_states * scale + offset + pair[0] * pair[1]
        hidden_states = hidden_states + self.o(input=self.q(read) + self.k(read) * self.v(read).tanh())
        neurons = self.gate(hidden_states).tanh() * self.up(hidden_states)
        return hidden_states + self.down(input=neurons), "attention weights"


class TokenModel(nn.Module):
    """A model whose block arguments depend on the tokens of the batch and on the block.

    Args:
        calls: how often each block is called.
        by_name: whether the hidden states are passed by keyword.
    """

    def __init__(self, calls: tuple[int, ...] = (1, 1, 1), by_name: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(model_type="novel", hidden_act="silu")
        self.embed, self.table = nn.Embedding(64, 8), nn.Embedding(64, 8)
        self.blocks = nn.ModuleList(TokenBlock(8, 16) for _ in calls)
        self.calls, self.by_name = calls, by_name

    def forward(self, input_ids: Tensor, use_cache: bool) -> None:
        assert not use_cache
        hidden, offset = self.embed(input_ids), self.table(input_ids.flip(1))
        for index, (block, times) in enumerate(zip(self.blocks, self.calls, strict=True)):
            rest = {"scale": (input_ids % (index + 2))[..., None], "pair": (self.table(input_ids), index)}
            for _ in range(times):
                if self.by_name:
                    hidden = block(hidden_states=hidden, offset=offset, **rest)[0]
                else:
                    hidden = block(hidden, offset, **rest)[0]


def assert_close(hidden: list[Tensor], expected: Tensor) -> None:
    torch.testing.assert_close(torch.cat(hidden), expected, rtol=0, atol=1e-5)


# --- what is passed on


@each_family
@pytest.mark.parametrize("attention", ["eager", None])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_with_nothing_pruned_the_hidden_states_are_the_models_own(family, attention, batch_size, tiny_model, tokens):
    model = tiny_model(family, **({"attn_implementation": attention} if attention else {}))
    expected = block_outputs(model, tokens)[-1]
    hidden = prune_blocks(model, tokens, NoOp(), scope="all", batch_size=batch_size, return_hidden=True).hidden
    assert_close(hidden, expected)
    if batch_size == len(tokens):
        assert torch.equal(hidden[0], expected)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3_text"])
def test_the_sliding_window_of_the_tiny_models_matters(family, tiny_model, tokens):
    """Otherwise the test above would not see a mask that went to the wrong block."""
    narrow, wide = (
        block_outputs(model, tokens)[-1] for model in (tiny_model(family), tiny_model(family, sliding_window=64))
    )
    assert not torch.allclose(narrow, wide, atol=1e-2)


@each_family
@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=repr)
def test_a_pattern_that_keeps_everything_changes_no_hidden_state(family, method, tiny_model, tokens):
    model = tiny_model(family)
    expected = block_outputs(model, tokens)[-1]
    pruning = prune_blocks(model, tokens, method, NM(4, 4), scope="all", batch_size=5, return_hidden=True)
    assert_close(pruning.hidden, expected)
    assert torch.equal(block_outputs(model, tokens)[-1], expected)
    assert [report.error for report in pruning.reports] == [0.0, 0.0]


@pytest.mark.thorough
@each_family
@pytest.mark.parametrize("method", CALIBRATED, ids=repr)
def test_pruned_activations_are_passed_on(family, method, tiny_model, tokens):
    model = tiny_model(family)
    dense = block_outputs(model, tokens)[-1]
    hidden = prune_blocks(model, tokens, method, scope="all", batch_size=2, return_hidden=True).hidden
    assert [len(part) for part in hidden] == [2, 2, 1]
    pruned = block_outputs(model, tokens)[-1]
    assert_close(hidden, pruned)
    assert not torch.allclose(pruned, dense, atol=1e-2)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("method", [NoOp(), Wanda()], ids=repr)
def test_each_batch_meets_the_arguments_that_belong_to_it_and_to_the_block(by_name, batch_size, method, tokens):
    model = TokenModel(by_name=by_name)
    options = {"scope": "all", "batch_size": batch_size, "roles": FLAT_ROLES, "return_hidden": True}
    hidden = prune_blocks(model, tokens, method, **options).hidden
    assert_close(hidden, block_outputs(model, tokens, FLAT_ROLES)[-1])


@pytest.mark.parametrize("method", PRUNING, ids=repr)
@pytest.mark.parametrize("family", ["llama", "gemma2", None])
def test_the_batch_size_changes_no_mask(method, family, tiny_model, tokens):
    def masks(batch_size: int) -> dict[str, Tensor]:
        model, roles = (tiny_model(family), None) if family else (TokenModel(), FLAT_ROLES)
        return prune_blocks(model, tokens, method, scope="all", batch_size=batch_size, roles=roles).masks

    whole = masks(5)
    assert len(whole) == (14 if family else 21)
    for batch_size in (1, 2, 3):
        parts = masks(batch_size)
        assert all(torch.equal(parts[name], keep) for name, keep in whole.items())


# --- capture


def test_capture_runs_no_block_but_one_call_of_the_first(tiny_model, tokens):
    model, ran = tiny_model("llama"), []
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *call, index=index: ran.append(index))
    batches = capture(model, model.model.layers, tokens, 2)
    assert ran == [0]
    assert torch.equal(torch.cat([batch.hidden for batch in batches]), model.model.embed_tokens(tokens))


def test_equal_arguments_of_two_batches_are_held_once(tiny_model, tokens):
    model = tiny_model("gemma3_text")
    first, second, last = capture(model, model.model.layers, tokens, 2)
    for call, other in zip(first.calls, second.calls, strict=True):
        assert call.kwargs["attention_mask"] is other.kwargs["attention_mask"]
        tables = zip(call.kwargs["position_embeddings"], other.kwargs["position_embeddings"], strict=True)
        assert all(one is another for one, another in tables)
    sliding, full = (call.kwargs["attention_mask"] for call in first.calls)
    assert sliding is not full
    assert len(last.calls[0].kwargs["attention_mask"]) == len(last.hidden) == 1


def test_arguments_that_differ_are_not_shared(tokens):
    model = TokenModel()
    batches = capture(model, model.blocks, tokens, 1)
    for batch, sequence in zip(batches, tokens, strict=True):
        for index, call in enumerate(batch.calls):
            assert torch.equal(call.args[0], model.table(sequence.flip(0))[None])
            assert torch.equal(call.kwargs["scale"][0, :, 0], sequence % (index + 2))
            assert torch.equal(call.kwargs["pair"][0], model.table(sequence)[None])
            assert call.kwargs["pair"][1] == index


@pytest.mark.parametrize(("calls", "count"), [((1, 0, 1), 2), ((1, 2, 1), 4)])
def test_a_model_that_does_not_call_each_block_once_is_refused(calls, count, tokens, attached):
    model = TokenModel(calls)
    with pytest.raises(UserError, match=f"made {count} block calls for its 3 blocks"):
        prune_blocks(model, tokens, Wanda(), scope="all", roles=FLAT_ROLES)
    assert not attached(model).total()


# --- what is observed


@pytest.mark.parametrize(("scope", "inputs"), [("mlp", 2), ("attention", 2), ("all", 4)])
@pytest.mark.parametrize(("method", "kind"), [(Wanda(), InputNorm), (SparseGPT(), Gram)], ids=["norm", "gram"])
def test_a_shared_input_is_observed_once_per_batch_and_on_dense_weights_only(
    scope, inputs, method, kind, tiny_model, tokens, monkeypatch
):
    updates, inner = [], kind.update
    monkeypatch.setattr(kind, "update", lambda stat, batch: updates.append(len(batch)) or inner(stat, batch))
    prune_blocks(tiny_model("llama"), tokens, method, scope=scope, batch_size=2)
    blocks, batches = 2, 3
    assert len(updates) == blocks * batches * inputs
    assert sum(updates) == blocks * len(tokens) * inputs


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_every_sequence_counts_as_one_whatever_the_batch(family, batch_size, tiny_model, tokens):
    """OPT flattens the sequences of a batch before its MLP."""
    reports = prune_blocks(tiny_model(family), tokens, SparseGPT(), batch_size=batch_size).reports
    assert {linear.stat.sequences for report in reports for linear in report.linears} == {5}


def test_factors_are_computed_once_per_input_and_released_after_its_last_linear(tiny_model, tokens, monkeypatch):
    factorised, alive, factorise, prune = [], [], Gram._factorise, SparseGPT.prune_linear

    def counted(method: SparseGPT, linear: LinearView, block: Block, pattern: Pattern) -> MaskResult:
        result = prune(method, linear, block, pattern)
        grams = {id(other.stat): other.stat for other in block.linears}
        alive.append(sum(bool(gram._factors) for gram in grams.values()))
        return result

    monkeypatch.setattr(
        Gram, "_factorise", lambda gram, *rest: factorised.append(gram.features) or factorise(gram, *rest)
    )
    monkeypatch.setattr(SparseGPT, "prune_linear", counted)
    prune_blocks(tiny_model("llama", num_hidden_layers=1), tokens, SparseGPT(), scope="all", batch_size=2)
    assert len(factorised) == 4  # q, k and v share an input, gate and up another
    assert alive == [1] * 7


# --- what is reported


@pytest.mark.parametrize("scope", ["mlp", "all"])
def test_the_block_error_is_that_of_its_output_on_the_same_inputs(scope, tiny_model, tokens):
    model = tiny_model("gemma2")
    dense = copy.deepcopy(model)
    reports = prune_blocks(model, tokens, Wanda(), scope=scope, batch_size=2, return_hidden=True).reports
    for index, report in enumerate(reports):
        expected = block_outputs(dense, tokens)[index].double()
        dense.model.layers[index] = model.model.layers[index]  # the next block is measured on pruned inputs
        error = (block_outputs(model, tokens)[index] - expected).norm() / expected.norm()
        assert report.error == pytest.approx(error.item(), rel=1e-4)


def test_each_block_is_reported_as_soon_as_it_is_pruned(tiny_model, tokens):
    model, zeros = tiny_model("llama"), []
    layers = model.model.layers
    prune_blocks(
        model,
        tokens,
        Wanda(),
        on_report=lambda report: zeros.append(
            (report.name, [bool((block.mlp.up_proj.weight == 0).any()) for block in layers])
        ),
    )
    assert zeros == [("model.layers.0", [True, False]), ("model.layers.1", [True, True])]


def test_statistics_and_masks_of_a_block_are_released_before_the_next_one(tiny_model, tokens):
    reports, alive = [], []
    callback = Callback()
    callback.on_block_end = lambda report: reports.append(weakref.ref(report))
    callback.on_block_start = lambda index: alive.extend(report() for report in reports)
    prune_model(tiny_model("llama"), tokens, SparseGPT(), NM(2, 4), callbacks=[callback])
    assert len(reports) == 2
    assert alive == [None]


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_method_without_statistics_runs_no_token(calibrated, tiny_model, tokens, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    pruning = prune_blocks(model, tokens if calibrated else None, Magnitude())
    assert pruning.hidden == []
    assert [(report.name, report.error) for report in pruning.reports] == [
        ("model.layers.0", None),
        ("model.layers.1", None),
    ]


# --- what is left behind


@pytest.mark.parametrize("index", [0, 1])
def test_nothing_is_left_behind_by_an_error_inside_a_block(index, tiny_model, tokens, attached, monkeypatch):
    model = tiny_model("llama").train()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("inside a block")

    monkeypatch.setattr(model.model.layers[index], "forward", fail)
    before = attached(model)
    with pytest.raises(RuntimeError, match="inside a block"):
        prune_blocks(model, tokens, Wanda())
    assert attached(model) == before
    assert vars(model.model.layers[index])["forward"] is fail
    assert model.training


@pytest.mark.parametrize("method", [NoOp(failing=True), Wanda()], ids=["method", "linear"])
def test_nothing_is_left_behind_by_an_error_inside_a_method_or_an_observed_linear(method, tiny_model, tokens, attached):
    model = tiny_model("llama").train()
    if isinstance(method, Wanda):
        model.model.layers[1].mlp.down_proj.weight.data = torch.ones(32, 44)
    with pytest.raises(RuntimeError):
        prune_blocks(model, tokens, method, NM(4, 4))
    assert not attached(model).total()
    assert model.training


def test_a_forward_that_was_set_on_a_block_is_run_and_stays(tiny_model, tokens):
    """Libraries that offload weights set one."""
    model, ran = tiny_model("llama"), []
    block = model.model.layers[0]
    inner = block.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        ran.append(1)
        return inner(*args, **kwargs)

    block.forward = own
    prune_blocks(model, tokens, Wanda(), batch_size=5)
    assert vars(block)["forward"] is own
    assert len(ran) == 3  # while capturing, dense, pruned


def test_dropout_is_off_meanwhile_and_the_mode_of_each_module_is_restored(tiny_model, tokens):
    """A user may hold part of a model in evaluation mode."""
    model = tiny_model("llama", attention_dropout=0.5)
    expected = block_outputs(model, tokens)[-1]
    model.train().model.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert_close(prune_blocks(model, tokens, NoOp(), return_hidden=True).hidden, expected)
    assert [module.training for module in model.modules()] == before


def test_no_gradient_is_recorded(tiny_model, tokens):
    model = tiny_model("llama")
    hidden = prune_blocks(model, tokens, Wanda(), return_hidden=True).hidden
    assert hidden
    assert not any(part.requires_grad for part in hidden)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


# --- what is refused


def starting_with(model: nn.Module, index: int, role: Role) -> str:
    """A regular expression for a message that starts with the name of a linear."""
    names = [site.name for site in sites_of(model, "all") if site.role == role]
    return "^" + re.escape(names[index])


@pytest.mark.parametrize(("scope", "role"), [("mlp", Role.GATE), ("all", Role.Q)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_names_the_first_layer_that_meets_it(scope, role, bad, tiny_model, tokens):
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[tokens[2, 3]] = bad
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NumericalError, match=starting_with(model, 0, role)):
        prune_blocks(model, tokens, Wanda(), scope=scope)
    assert_same_state(model, before)


def test_an_input_that_is_not_finite_in_the_midst_of_a_block_names_its_linear(tiny_model, tokens):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0] = 1e38
    with pytest.raises(NumericalError, match=starting_with(model, 1, DOWN)):
        prune_blocks(model, tokens, Wanda())


def test_an_output_that_is_not_finite_names_the_block(tiny_model, tokens):
    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj.weight.data[0] = float("inf")
    with pytest.raises(NumericalError, match=r"^model\.layers\.0: its output"):
        prune_blocks(model, tokens, Wanda(), scope="attention")


@pytest.mark.parametrize("method", [Magnitude(), Wanda()], ids=repr)
def test_a_pattern_that_fits_no_axis_names_the_layer_and_changes_nothing(method, tiny_model, tokens):
    model = tiny_model("llama", intermediate_size=42)
    before = copy.deepcopy(model.state_dict())
    message = starting_with(model, 0, DOWN) + ": pattern 2:4: m=4 does not divide the input axis"
    with pytest.raises(UserError, match=message):
        prune_blocks(model, tokens, method, scope="all")
    assert_same_state(model, before)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (None, "wanda needs calibration tokens"),
        (torch.zeros(0, 12, dtype=torch.int64), r"shape \[0, 12\]"),
        (torch.zeros(12, dtype=torch.int64), r"shape \[12\]"),
    ],
)
def test_a_method_with_statistics_needs_sequences(tokens, message, tiny_model):
    """Without a sequence every statistic would be zero, and every score a tie."""
    with pytest.raises(UserError, match=message):
        prune_blocks(tiny_model("llama"), tokens, Wanda())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scope": "head"}, "scope='head': expected one of"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
    ],
)
def test_impossible_options_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        engine_options(**settings)


@pytest.mark.parametrize("method", CALIBRATED, ids=repr)
def test_a_model_that_accelerate_has_spread_is_pruned_the_same(method, tiny_model, tokens):
    """All of its parts on one device, but with the hooks that move activations between several."""
    plain = tiny_model("llama")
    spread = copy.deepcopy(plain)
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    dispatch_model(spread, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)
    assert hasattr(spread.model.layers[0].mlp, "_hf_hook")
    for model in (plain, spread):
        prune_blocks(model, tokens, method, scope="all", batch_size=2)
    assert_same_state(spread, plain.state_dict())


def test_a_model_whose_weights_lie_elsewhere_is_refused(tiny_model, tokens):
    model = tiny_model("llama")
    model.model.layers[1].to("meta")
    with pytest.raises(UserError, match=r"not all in memory .* model\.placement=stream"):
        prune_blocks(model, tokens, Wanda())
