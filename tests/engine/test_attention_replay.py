"""The second pass leaves out what pruning has not changed, and gives the very numbers that the whole pass gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dass_exp.api import method_of
from dass_exp.engine.attention_replay import Attention
from dass_exp.engine.block_report import BlockReport
from dass_exp.engine.prune import Options, prune_model
from dass_exp.masks import NM
from dass_exp.methods.wanda import Wanda
from dass_exp.models.decoder import Decoder, decoder_of
from dass_exp.models.families import FAMILIES, PLAIN, Role


def counting(module: nn.Module) -> list[None]:
    """Grows by one at each forward that the module really computes."""
    calls: list[None] = []
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return inner(*args, **kwargs)

    module.forward = forward
    return calls


@torch.no_grad()
def plain(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """What every block gives in the model's own forward."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, args, output: seen.append(output))
        for block in decoder_of(model).blocks
    ]
    getattr(model, "base_model", model)(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [output[0] if isinstance(output, tuple) else output for output in seen]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("method", ["dass", "sparsegpt"])
def test_attention_runs_once_and_what_is_passed_on_is_bit_for_bit_the_models_own(family, method, tiny_model, tokens):
    model = tiny_model(family)
    attentions = [decoder_of(model).attention(index) for index in range(2)]
    calls = [counting(attention) for attention in attentions]
    (hidden,) = prune_model(
        model, tokens, method_of(method), NM(2, 4), Options("mlp", len(tokens), min_tokens=1, outputs=True)
    )
    assert [len(found) for found in calls] == [
        2,
        1,
    ]  # the first block runs once more while its return type is looked up
    assert torch.equal(hidden, plain(model, tokens)[-1])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_several_batches_get_their_own_outputs_back(family, tiny_model, tokens):
    model = tiny_model(family)
    hidden = prune_model(model, tokens, Wanda(), NM(2, 4), Options("mlp", 2, min_tokens=1, outputs=True))
    torch.testing.assert_close(torch.cat(hidden), plain(model, tokens)[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scope", ["attention", "all"])
def test_attention_that_is_pruned_runs_again(scope, tiny_model, tokens):
    model = tiny_model("llama")
    calls = counting(model.model.layers[1].self_attn)
    prune_model(model, tokens, Wanda(), NM(2, 4), Options(scope, len(tokens), outputs=True))
    assert len(calls) == 2


@pytest.mark.parametrize("scope", ["mlp", "attention", "all"])
def test_the_last_block_runs_once_where_nobody_asks_for_its_output(scope, tiny_model, tokens):
    model, reports = tiny_model("llama"), []
    runs = [counting(block.mlp) for block in model.model.layers]
    whole = tiny_model("llama")
    assert prune_model(model, tokens, Wanda(), NM(2, 4), Options(scope, len(tokens), on_block=reports.append)) == []
    assert [len(found) for found in runs] == [3, 1]
    assert (reports[0].error > 0, reports[1].error) == (True, None)
    prune_model(whole, tokens, Wanda(), NM(2, 4), Options(scope, len(tokens), outputs=True))
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_attention_of_every_family_holds_no_linear_of_its_mlp(tiny_model):
    for family in FAMILIES:
        decoder = decoder_of(tiny_model(family))
        for index in range(2):
            inside = {id(parameter) for parameter in decoder.attention(index).parameters()}
            for scope, within in (("attention", True), ("mlp", False)):
                assert {id(site.matrix.parameter) in inside for site in decoder.sites(index, scope)} == {within}, family


class Backwards(nn.Module):
    """A block whose attention reads what its MLP gave."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.mix = nn.Module()
        for role in "qkvo":
            self.mix.add_module(role, nn.Linear(width, width, bias=False))
        self.mix.forward = lambda x: self.mix.o(self.mix.q(x).tanh() * self.mix.k(x) + self.mix.v(x))
        self.gate, self.up, self.down = (
            nn.Linear(width, 16, bias=False),
            nn.Linear(width, 16, bias=False),
            nn.Linear(16, width, bias=False),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.down(self.gate(hidden).tanh() * self.up(hidden))
        return hidden + self.mix(hidden)


class Twice(Backwards):
    """A block that calls its attention twice, before its MLP."""

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.mix(self.mix(hidden))
        return hidden + self.down(self.gate(hidden).tanh() * self.up(hidden))


class Model(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(model_type="novel")
        self.embed, self.blocks = nn.Embedding(64, 8), nn.ModuleList([block(), block(), block()])

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return SimpleNamespace(last_hidden_state=hidden)


ROLES = {
    **{role.value: (f"mix.{role.value}" if role.value in "qkvo" else role.value) for role in Role if role not in PLAIN},
    "blocks": "blocks",
}


@pytest.mark.parametrize("block", [Backwards, Twice])
def test_attention_that_may_depend_on_the_mlp_is_computed_again(block, tokens):
    model, reports = Model(block), list[BlockReport]()
    assert decoder_of(model, ROLES).attention(0) is model.blocks[0].mix
    hidden = prune_model(model, tokens, Wanda(), NM(2, 4), Options("mlp", 2, ROLES, reports.append, outputs=True))
    torch.testing.assert_close(torch.cat(hidden), model(tokens, use_cache=False).last_hidden_state, rtol=0, atol=1e-6)
    assert min(report.error for report in reports) > 0


class Writes(Backwards):
    """A block that adds to what its attention gave, in place."""

    def forward(self, hidden: Tensor) -> Tensor:
        mixed = self.mix(hidden)
        mixed += hidden
        return mixed + self.down(self.gate(mixed).tanh() * self.up(mixed))


class Hybrid(Backwards):
    """A block whose attention may be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + (self.mix(hidden) if hasattr(self, "mix") else self.norm(hidden))
        return hidden + self.down(self.gate(hidden).tanh() * self.up(hidden))


def test_attention_whose_output_is_written_into_is_computed_again(tokens):
    model = Model(Writes)
    hidden = prune_model(model, tokens, Wanda(), NM(2, 4), Options("mlp", 2, ROLES, outputs=True))
    torch.testing.assert_close(torch.cat(hidden), model(tokens, use_cache=False).last_hidden_state, rtol=0, atol=1e-6)


def test_a_block_without_attention_among_others_runs_whole(tokens):
    model = Model(Hybrid)
    del model.blocks[1].mix
    hidden = prune_model(model, tokens, Wanda(), NM(2, 4), Options("mlp", 2, ROLES, outputs=True))
    torch.testing.assert_close(torch.cat(hidden), model(tokens, use_cache=False).last_hidden_state, rtol=0, atol=1e-6)


def test_a_hook_of_the_users_does_not_run_twice_over_one_output(tiny_model, tokens):
    model = tiny_model("llama")
    for block in model.model.layers:
        block.self_attn.register_forward_hook(lambda module, args, output: (output[0] * 1.5, *output[1:]))
    (hidden,) = prune_model(model, tokens, Wanda(), NM(2, 4), Options("mlp", len(tokens), outputs=True))
    assert torch.equal(hidden, plain(model, tokens)[-1])


def test_attention_weights_are_not_kept(tiny_model, tokens):
    """Gemma 2 gives them, [sequences, heads, tokens, tokens]."""
    model = tiny_model("gemma2", attn_implementation="eager")
    attention = Attention(model.model.layers[0].self_attn, {})
    with attention.noting(), torch.no_grad():
        model(tokens)
    held, behind = attention._outputs[0]
    assert (held.get().shape, behind) == ((*tokens.shape, model.config.hidden_size), 1)


def test_a_block_without_an_attention_module_runs_whole(tokens):
    flat = {**{role.value: f"{role.value}_proj" for role in Role if role not in PLAIN}, "blocks": "blocks"}
    decoder = decoder_of(Model(Backwards), flat)
    assert isinstance(decoder, Decoder)
    assert decoder.attention(0) is None
