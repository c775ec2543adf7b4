"""The engine: what it captures, what it passes on, what it observes, and that it leaves nothing behind."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, nn

from dass_exp.api import method_of
from dass_exp.engine.block_report import BlockReport
from dass_exp.engine.capture import capture
from dass_exp.engine.prune import Options, prune_model
from dass_exp.errors import NumericalError, UserError
from dass_exp.masks import NM, Pattern
from dass_exp.methods.base import Block, LinearView, MaskResult, Pruner
from dass_exp.methods.magnitude import Magnitude
from dass_exp.methods.sparsegpt import SparseGPT
from dass_exp.methods.wanda import Wanda
from dass_exp.models.decoder import decoder_of
from dass_exp.models.families import DOWN, FAMILIES, PLAIN, Role
from dass_exp.statistics import Gram, InputNorm

METHODS = ["dass", "magnitude", "sparsegpt", "wanda"]
ROLES = {**{role.value: role.value for role in Role if role not in PLAIN}, "blocks": "blocks"}  # of TokenModel


@dataclass
class Cutless(Pruner):
    """Observes and cuts nothing; raises instead if it is told to."""

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
        for role in set(Role) - PLAIN:
            rows, columns = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}.get(
                role, (width, width)
            )
            self.add_module(role.value, nn.Linear(columns, rows, bias=False))

    def forward(
        self, hidden_states: Tensor, offset: Tensor, *, scale: Tensor, pair: tuple[Tensor, int]
    ) -> tuple[Tensor, str]:
        read = hidden_states * scale + offset + pair[0] * pair[1]
        hidden_states = hidden_states + self.o(input=self.q(read) + self.k(read) * self.v(read).tanh())
        return hidden_states + self.down(
            input=self.gate(hidden_states).tanh() * self.up(hidden_states)
        ), "attention weights"


class TokenModel(nn.Module):
    """What it hands to its blocks depends on the tokens of the batch and on the block.

    Args:
        calls: how often each block is called.
        by_name: whether the hidden states are handed over by keyword.
    """

    def __init__(self, calls: tuple[int, ...] = (1, 1, 1), by_name: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(model_type="novel")
        self.embed, self.table = nn.Embedding(64, 8), nn.Embedding(64, 8)
        self.blocks = nn.ModuleList(TokenBlock(8, 16) for _ in calls)
        self.norm = nn.LayerNorm(8)
        self.calls, self.by_name = calls, by_name

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        hidden = self.embed(input_ids)
        for index, (block, times) in enumerate(zip(self.blocks, self.calls, strict=True)):
            rest: dict[str, Any] = {
                "scale": (input_ids % (index + 2))[..., None],
                "pair": (self.table(input_ids), index),
            }
            for _ in range(times):
                offset = self.table(input_ids.flip(1))
                output = (
                    block(hidden_states=hidden, offset=offset, **rest)
                    if self.by_name
                    else block(hidden, offset, **rest)
                )
                hidden = output[0]
        return SimpleNamespace(last_hidden_state=self.norm(hidden))


def final_norm(model: nn.Module) -> nn.Module:
    """What the model does to the hidden states behind its last block."""
    names = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "decoder.final_layer_norm")
    found = {name: module for name, module in getattr(model, "base_model", model).named_modules() if name in names}
    assert len(found) == 1, found
    return next(iter(found.values()))


def normed(model: nn.Module, hidden: list[Tensor]) -> Tensor:
    """The last hidden state that the model would return."""
    return final_norm(model)(torch.cat(hidden)).detach()


@torch.no_grad()
def own(model: nn.Module, tokens: Tensor) -> Tensor:
    """The model's own last hidden state."""
    return getattr(model, "base_model", model)(input_ids=tokens, use_cache=False).last_hidden_state


@torch.no_grad()
def block_output(model: nn.Module, index: int, tokens: Tensor) -> Tensor:
    """The output of one block inside a plain forward pass."""
    seen = []
    handle = model.model.layers[index].register_forward_hook(lambda module, args, output: seen.append(output))
    model(tokens)
    handle.remove()
    return seen[0]


def masks_of(
    model: nn.Module, tokens: Tensor | None, method: Pruner, options: Options | None = None
) -> dict[str, Tensor]:
    reports: list[BlockReport] = []
    chosen = options or Options("all")
    prune_model(model, tokens, method, NM(2, 4), Options(chosen.scope, chosen.batch_size, chosen.roles, reports.append))
    return {name: cut.keep for report in reports for name, cut in report.cuts.items()}


# --- what is passed on


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("attention", ["eager", None])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_with_nothing_cut_the_hidden_states_are_the_models_own(family, attention, batch_size, tiny_model, tokens):
    model = tiny_model(family, **({"attn_implementation": attention} if attention else {}))
    expected = own(model, tokens)
    found = normed(model, prune_model(model, tokens, Cutless(), NM(2, 4), Options("all", batch_size, outputs=True)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if batch_size == len(tokens):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3_text"])
def test_the_sliding_window_of_the_tiny_models_matters(family, tiny_model, tokens):
    """Otherwise the test above would not see a mask that went to the wrong block."""
    wide = tiny_model(family, sliding_window=64)
    assert not torch.allclose(own(tiny_model(family), tokens), own(wide, tokens), atol=1e-2)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=repr)
def test_a_pattern_that_keeps_everything_changes_no_hidden_state(family, method, tiny_model, tokens):
    model = tiny_model(family)
    expected = own(model, tokens)
    reports: list[BlockReport] = []
    hidden = prune_model(model, tokens, method, NM(4, 4), Options("all", 5, on_block=reports.append, outputs=True))
    torch.testing.assert_close(normed(model, hidden), expected, rtol=0, atol=1e-5)
    assert torch.equal(own(model, tokens), expected)
    assert [report.error for report in reports] == [0.0, 0.0]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("method", ["dass", "sparsegpt"])
def test_pruned_activations_are_passed_on(family, method, tiny_model, tokens):
    model = tiny_model(family)
    dense = own(model, tokens)
    hidden = prune_model(model, tokens, method_of(method), NM(2, 4), Options("all", 2, outputs=True))
    assert [len(part) for part in hidden] == [2, 2, 1]
    torch.testing.assert_close(normed(model, hidden), own(model, tokens), rtol=0, atol=1e-5)
    assert not torch.allclose(own(model, tokens), dense, atol=1e-2)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_each_batch_meets_the_arguments_that_belong_to_it_and_to_the_block(by_name, batch_size, tokens):
    model = TokenModel(by_name=by_name)
    expected = own(model, tokens)
    hidden = prune_model(model, tokens, Cutless(), NM(2, 4), Options("all", batch_size, ROLES, outputs=True))
    torch.testing.assert_close(normed(model, hidden), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("by_name", [False, True])
def test_pruned_activations_are_passed_on_where_arguments_depend_on_the_tokens(by_name, tokens):
    model = TokenModel(by_name=by_name)
    hidden = prune_model(model, tokens, Wanda(), NM(2, 4), Options("all", 2, ROLES, outputs=True))
    torch.testing.assert_close(normed(model, hidden), own(model, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_batch_size_changes_no_mask(method, family, tiny_model, tokens):
    whole = masks_of(tiny_model(family), tokens, method_of(method), Options("all", 5))
    assert len(whole) == 14
    for batch_size in (1, 2, 3):
        parts = masks_of(tiny_model(family), tokens, method_of(method), Options("all", batch_size))
        assert all(torch.equal(parts[name], keep) for name, keep in whole.items())


def test_the_batch_size_changes_no_mask_where_arguments_depend_on_the_tokens(tokens):
    whole = masks_of(TokenModel(), tokens, Wanda(), Options("all", 5, ROLES))
    for batch_size in (1, 2, 3):
        parts = masks_of(TokenModel(), tokens, Wanda(), Options("all", batch_size, ROLES))
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
    for index in range(2):
        one, other = first.calls[index].kwargs, second.calls[index].kwargs
        assert one["attention_mask"] is other["attention_mask"]
        assert all(
            mine is its for mine, its in zip(one["position_embeddings"], other["position_embeddings"], strict=True)
        )
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


@pytest.mark.parametrize(("calls", "found"), [((1, 0, 1), 2), ((1, 2, 1), 4)])
def test_a_model_that_does_not_call_each_block_once_is_refused(calls, found, tokens, attached):
    model = TokenModel(calls)
    with pytest.raises(UserError, match=f"made {found} block calls for its 3 blocks"):
        prune_model(model, tokens, Wanda(), NM(2, 4), Options("all", roles=ROLES))
    assert not attached(model).total()


# --- what is observed


@pytest.mark.parametrize(("scope", "inputs"), [("mlp", 2), ("attention", 2), ("all", 4)])
@pytest.mark.parametrize(("method", "kind"), [(Wanda(), InputNorm), (SparseGPT(), Gram)], ids=["norm", "gram"])
def test_a_shared_input_is_observed_once_per_batch_and_on_dense_weights_only(
    scope, inputs, method, kind, tiny_model, tokens, monkeypatch
):
    updates = []
    inner = kind.update
    monkeypatch.setattr(kind, "update", lambda stat, batch: updates.append(len(batch)) or inner(stat, batch))
    prune_model(tiny_model("llama"), tokens, method, NM(2, 4), Options(scope, batch_size=2))
    blocks, batches = 2, 3
    assert len(updates) == blocks * batches * inputs
    assert sum(updates) == blocks * len(tokens) * inputs


def test_gate_and_up_share_one_statistic(tiny_model, tokens):
    reports: list[BlockReport] = []
    prune_model(tiny_model("llama"), tokens, Wanda(), NM(2, 4), Options("all", on_block=reports.append))
    stats = {linear.role.value: linear.stat for linear in reports[0].linears}
    assert stats["gate"] is stats["up"]
    assert stats["q"] is stats["k"] is stats["v"]
    assert len({id(stat) for stat in stats.values()}) == 4
    assert {stat.sequences for stat in stats.values()} == {5}


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_every_sequence_counts_as_one_whatever_the_batch(family, tiny_model, tokens):
    """OPT joins the sequences of a batch before its MLP."""
    for batch_size in (1, 2, 5):
        reports: list[BlockReport] = []
        prune_model(
            tiny_model(family), tokens, SparseGPT(), NM(2, 4), Options("mlp", batch_size, on_block=reports.append)
        )
        assert {linear.stat.sequences for report in reports for linear in report.linears} == {5}


# --- what is reported


@pytest.mark.parametrize("scope", ["mlp", "all"])
def test_the_block_error_is_that_of_its_output_on_the_same_inputs(scope, tiny_model, tokens):
    model, reports = tiny_model("gemma2"), []
    dense = copy.deepcopy(model)
    prune_model(model, tokens, Wanda(), NM(2, 4), Options(scope, 2, on_block=reports.append, outputs=True))
    for index, report in enumerate(reports):
        expected = block_output(dense, index, tokens).double()
        dense.model.layers[index] = model.model.layers[index]  # the next block is measured on pruned inputs
        error = (block_output(model, index, tokens) - expected).norm() / expected.norm()
        assert report.error == pytest.approx(error.item(), rel=1e-4)


def test_each_block_is_reported_as_soon_as_it_is_pruned(tiny_model, tokens):
    model, zeros = tiny_model("llama"), []

    def note(report: BlockReport) -> None:
        zeros.append((report.name, [bool((block.mlp.up_proj.weight == 0).any()) for block in model.model.layers]))

    prune_model(model, tokens, Wanda(), NM(2, 4), Options(on_block=note))
    assert zeros == [("model.layers.0", [True, False]), ("model.layers.1", [True, True])]


@pytest.mark.parametrize("given", [True, False])
def test_a_method_without_statistics_runs_no_token(given, tiny_model, tokens, monkeypatch):
    model, reports = tiny_model("llama"), []
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    assert prune_model(model, tokens if given else None, Magnitude(), NM(2, 4), Options(on_block=reports.append)) == []
    assert [(report.name, report.error) for report in reports] == [("model.layers.0", None), ("model.layers.1", None)]


# --- what is left behind


@pytest.mark.parametrize("index", [0, 1])
def test_nothing_is_left_behind_by_an_error_inside_a_block(index, tiny_model, tokens, attached, monkeypatch):
    model = tiny_model("llama").train()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("inside a block")

    monkeypatch.setattr(model.model.layers[index], "forward", fail)
    before = attached(model)
    with pytest.raises(RuntimeError, match="inside a block"):
        prune_model(model, tokens, Wanda(), NM(2, 4), Options())
    assert attached(model) == before
    assert vars(model.model.layers[index])["forward"] is fail
    assert model.training


def test_nothing_is_left_behind_by_an_error_inside_a_linear_that_is_observed(tiny_model, tokens, attached):
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data = torch.ones(32, 44)
    with pytest.raises(RuntimeError):
        prune_model(model, tokens, Wanda(), NM(4, 4), Options())
    assert not attached(model).total()


def test_nothing_is_left_behind_by_an_error_inside_a_method(tiny_model, tokens, attached):
    model = tiny_model("llama").train()
    with pytest.raises(RuntimeError, match="inside a method"):
        prune_model(model, tokens, Cutless(failing=True), NM(2, 4), Options())
    assert not attached(model).total()
    assert model.training


def test_a_forward_that_was_set_on_a_block_is_run_and_stays(tiny_model, tokens):
    """Libraries that offload weights set one."""
    model = tiny_model("llama")
    block, ran = model.model.layers[0], []
    inner = block.forward

    def returns_tuple(*args: Any, **kwargs: Any) -> Any:
        ran.append(1)
        return inner(*args, **kwargs)

    block.forward = returns_tuple
    prune_model(model, tokens, Wanda(), NM(2, 4), Options(batch_size=5))
    assert vars(block)["forward"] is returns_tuple
    assert len(ran) == 3  # while capturing, dense, pruned


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_meanwhile_and_the_mode_is_restored(training, tiny_model, tokens):
    model = tiny_model("llama", attention_dropout=0.5)
    expected = own(model, tokens)
    model.train(training)
    hidden = prune_model(model, tokens, Cutless(), NM(2, 4), Options(outputs=True))
    assert model.training == training
    torch.testing.assert_close(normed(model, hidden), expected, rtol=0, atol=1e-5)


def test_the_mode_of_each_module_is_restored(tiny_model, tokens):
    """A user may hold part of a model in evaluation mode."""
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    prune_model(model, tokens, Wanda(), NM(2, 4), Options())
    assert [module.training for module in model.modules()] == before


def test_no_gradient_is_recorded(tiny_model, tokens):
    model = tiny_model("llama")
    hidden = prune_model(model, tokens, Wanda(), NM(2, 4), Options(outputs=True))
    assert hidden
    assert not any(part.requires_grad for part in hidden)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


# --- what is refused


def name_of(model: nn.Module, index: int, role: Role) -> str:
    return next(site.name for site in decoder_of(model).sites(index, "all") if site.role == role)


@pytest.mark.parametrize(("scope", "role"), [("mlp", Role.GATE), ("all", Role.Q)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_names_the_first_layer_that_meets_it(scope, role, bad, tiny_model, tokens):
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[tokens[2, 3]] = bad
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NumericalError, match="^" + re.escape(name_of(model, 0, role))):
        prune_model(model, tokens, Wanda(), NM(2, 4), Options(scope))
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in model.state_dict().items())


def test_an_input_that_is_not_finite_in_the_midst_of_a_block_names_its_linear(tiny_model, tokens):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0] = 1e38
    with pytest.raises(NumericalError, match="^" + re.escape(name_of(model, 1, DOWN))):
        prune_model(model, tokens, Wanda(), NM(2, 4), Options("mlp"))


def test_an_output_that_is_not_finite_names_the_block(tiny_model, tokens):
    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj.weight.data[0] = float("inf")
    with pytest.raises(NumericalError, match=r"^model\.layers\.0: its output"):
        prune_model(model, tokens, Wanda(), NM(2, 4), Options("attention"))


def test_a_pattern_that_fits_no_axis_names_the_layer_and_changes_nothing(tiny_model, tokens):
    model = tiny_model("llama", intermediate_size=42)
    before = copy.deepcopy(model.state_dict())
    for method in (Magnitude(), Wanda()):
        with pytest.raises(
            UserError,
            match="^" + re.escape(name_of(model, 0, DOWN)) + ": pattern 2:4: m=4 does not divide the input axis",
        ):
            prune_model(model, tokens, method, NM(2, 4), Options("all"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_method_with_statistics_needs_tokens(tiny_model):
    with pytest.raises(UserError, match="wanda needs calibration tokens"):
        prune_model(tiny_model("llama"), None, Wanda(), NM(2, 4), Options())


@pytest.mark.parametrize("shape", [(0, 12), (12,)])
def test_tokens_that_are_no_sequences_are_refused(shape, tiny_model):
    """Without a sequence every statistic would be zero, and every score a tie."""
    with pytest.raises(UserError):
        prune_model(tiny_model("llama"), torch.zeros(shape, dtype=torch.int64), Wanda(), NM(2, 4), Options())


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
        Options(**settings)


@pytest.mark.parametrize("method", ["dass", "sparsegpt"])
def test_a_model_that_accelerate_has_spread_is_pruned_the_same(method, tiny_model, tokens):
    """All of its parts on one device, but with the hooks that move activations between several."""
    plain = tiny_model("llama")
    spread = copy.deepcopy(plain)
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    dispatch_model(spread, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)
    assert hasattr(spread.model.layers[0].mlp, "_hf_hook")
    for model in (plain, spread):
        prune_model(model, tokens, method_of(method), NM(2, 4), Options("all", 2))
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), spread.parameters(), strict=True))


def test_a_model_whose_weights_lie_elsewhere_is_refused(tiny_model, tokens):
    model = tiny_model("llama")
    model.model.layers[1].to("meta")
    with pytest.raises(UserError, match=r"not all in memory .* model\.placement=stream"):
        prune_model(model, tokens, method_of("wanda"), NM(2, 4), Options("mlp", 2))


def test_factors_are_made_once_for_linears_of_one_input_and_let_go_behind_the_last(tiny_model, tokens, monkeypatch):
    made, held, factorise, prune = [], [], Gram._factorise, SparseGPT.prune_linear

    def noted(method, linear, block, pattern):
        cut = prune(method, linear, block, pattern)
        held.append(
            sum(bool(stat._factors) for stat in {id(other.stat): other.stat for other in block.linears}.values())
        )
        return cut

    monkeypatch.setattr(Gram, "_factorise", lambda gram, *rest: made.append(gram.features) or factorise(gram, *rest))
    monkeypatch.setattr(SparseGPT, "prune_linear", noted)
    prune_model(tiny_model("llama", num_hidden_layers=1), tokens, SparseGPT(), NM(2, 4), Options("all", 2))
    assert len(made) == 4  # q, k and v share an input, gate and up another
    assert held == [1] * 7  # one at a time
