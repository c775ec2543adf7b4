"""The second pass leaves out what pruning has not changed, and gives the very numbers of a whole pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_support import CALIBRATED, FLAT_ROLES, assert_same_state, block_outputs, prune_blocks
from torch import Tensor, nn

from dass_exp.engine.attention_replay import AttentionReplay
from dass_exp.methods.wanda import Wanda
from dass_exp.models.decoder import decoder_of
from dass_exp.models.families import FAMILIES

each_family = pytest.mark.parametrize("family", sorted(FAMILIES))


def counting(module: nn.Module) -> list[None]:
    """Grows by one at each forward that the module really computes."""
    calls: list[None] = []
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return inner(*args, **kwargs)

    module.forward = forward
    return calls


@pytest.mark.thorough
@each_family
@pytest.mark.parametrize("method", CALIBRATED, ids=repr)
def test_attention_runs_once_and_what_is_passed_on_is_bit_for_bit_the_models_own(family, method, tiny_model, tokens):
    model = tiny_model(family)
    calls = [counting(decoder_of(model).attention(index)) for index in range(2)]
    (hidden,) = prune_blocks(model, tokens, method, batch_size=len(tokens), min_tokens=1, return_hidden=True).hidden
    assert [len(runs) for runs in calls] == [2, 1]  # the first block runs once more to see what it returns
    assert torch.equal(hidden, block_outputs(model, tokens)[-1])


@each_family
def test_several_batches_get_their_own_outputs_back(family, tiny_model, tokens):
    model = tiny_model(family)
    hidden = prune_blocks(model, tokens, Wanda(), batch_size=2, min_tokens=1, return_hidden=True).hidden
    torch.testing.assert_close(torch.cat(hidden), block_outputs(model, tokens)[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scope", ["attention", "all"])
def test_attention_that_is_pruned_runs_again(scope, tiny_model, tokens):
    model = tiny_model("llama")
    calls = counting(model.model.layers[1].self_attn)
    prune_blocks(model, tokens, Wanda(), scope=scope, batch_size=len(tokens), return_hidden=True)
    assert len(calls) == 2


@pytest.mark.parametrize("scope", ["mlp", "attention", "all"])
def test_the_last_block_runs_once_where_nobody_asks_for_its_output(scope, tiny_model, tokens):
    model, whole = tiny_model("llama"), tiny_model("llama")
    runs = [counting(block.mlp) for block in model.model.layers]
    pruning = prune_blocks(model, tokens, Wanda(), scope=scope, batch_size=len(tokens))
    assert pruning.hidden == []
    assert [len(calls) for calls in runs] == [3, 1]
    assert (pruning.reports[0].error > 0, pruning.reports[1].error) == (True, None)
    prune_blocks(whole, tokens, Wanda(), scope=scope, batch_size=len(tokens), return_hidden=True)
    assert_same_state(model, whole.state_dict())


@each_family
def test_the_attention_of_every_family_holds_no_linear_of_its_mlp(family, tiny_model):
    decoder = decoder_of(tiny_model(family))
    for index in range(2):
        inside = {id(parameter) for parameter in decoder.attention(index).parameters()}
        for scope, within in (("attention", True), ("mlp", False)):
            assert {id(site.matrix.parameter) in inside for site in decoder.sites(index, scope)} == {within}


# --- blocks of another kind


class Backwards(nn.Module):
    """A block whose attention reads the output of its MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Module()
        for role in "qkvo":
            self.mix.add_module(role, nn.Linear(8, 8, bias=False))
        self.mix.forward = lambda x: self.mix.o(self.mix.q(x).tanh() * self.mix.k(x) + self.mix.v(x))
        self.gate, self.up, self.down = (nn.Linear(*shape, bias=False) for shape in ((8, 16), (8, 16), (16, 8)))

    def mlp(self, hidden: Tensor) -> Tensor:
        return self.down(self.gate(hidden).tanh() * self.up(hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.mlp(hidden)
        return hidden + self.mix(hidden)


class Twice(Backwards):
    """A block that calls its attention twice, before its MLP."""

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.mix(self.mix(hidden))
        return hidden + self.mlp(hidden)


class InPlace(Backwards):
    """A block that adds to the output of its attention in place."""

    def forward(self, hidden: Tensor) -> Tensor:
        mixed = self.mix(hidden)
        mixed += hidden
        return mixed + self.mlp(mixed)


class Hybrid(Backwards):
    """A block whose attention may be missing."""

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + (self.mix(hidden) if hasattr(self, "mix") else hidden.tanh())
        return hidden + self.mlp(hidden)


class Model(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(model_type="novel")
        self.embed, self.blocks = nn.Embedding(64, 8), nn.ModuleList([block(), block(), block()])

    def forward(self, input_ids: Tensor, use_cache: bool) -> None:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)


ROLES = {**FLAT_ROLES, **{role: f"mix.{role}" for role in "qkvo"}}


@pytest.mark.parametrize("block", [Backwards, Twice, InPlace, Hybrid])
def test_attention_that_may_depend_on_the_mlp_is_computed_again(block, tokens):
    model = Model(block)
    assert decoder_of(model, ROLES).attention(1) is model.blocks[1].mix
    if block is Hybrid:
        del model.blocks[1].mix
    pruning = prune_blocks(model, tokens, Wanda(), batch_size=2, roles=ROLES, return_hidden=True)
    expected = block_outputs(model, tokens, ROLES)[-1]
    torch.testing.assert_close(torch.cat(pruning.hidden), expected, rtol=0, atol=1e-6)
    assert min(report.error for report in pruning.reports) > 0


def test_a_hook_of_the_users_does_not_run_twice_over_one_output(tiny_model, tokens):
    model = tiny_model("llama")
    for block in model.model.layers:
        block.self_attn.register_forward_hook(lambda module, args, output: (output[0] * 1.5, *output[1:]))
    (hidden,) = prune_blocks(model, tokens, Wanda(), batch_size=len(tokens), return_hidden=True).hidden
    assert torch.equal(hidden, block_outputs(model, tokens)[-1])


@torch.no_grad()
def test_attention_weights_are_not_kept(tiny_model, tokens):
    """Gemma 2 returns them, [sequences, heads, tokens, tokens]."""
    model = tiny_model("gemma2", attn_implementation="eager")
    attention = model.model.layers[0].self_attn
    replay = AttentionReplay(attention, {})
    with replay.recording():
        model(tokens)
    replay.batch_done()
    with replay.replaying():
        output, weights = attention()
    assert (output.shape, weights) == ((*tokens.shape, model.config.hidden_size), None)


def test_a_block_without_an_attention_module_has_none_to_replay():
    assert decoder_of(Model(Backwards), FLAT_ROLES).attention(0) is None
