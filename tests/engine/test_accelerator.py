"""Every method, stage and family on a pretended GPU: the numbers of the CPU, and how often the host waits."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from engine_support import PRUNING, UNLIKE, prune_blocks, sites_of
from pretend_accelerator import PretendAccelerator, PretendTensor, host_of
from test_stages import ACTIVE, is_served, stages_of
from torch import Tensor, nn

from dass_exp import masks
from dass_exp.api import perplexity
from dass_exp.engine.activation_cache import ActivationCache
from dass_exp.engine.callbacks import Callback, Stopwatch
from dass_exp.engine.prune import EngineOptions, prune_model
from dass_exp.engine.verify import Verification
from dass_exp.evaluate.generation import generate
from dass_exp.evaluate.loglikelihood import loglikelihoods
from dass_exp.masks import NM, Budget, Pattern, TransposableNM, Unstructured
from dass_exp.methods.base import Pruner
from dass_exp.methods.dass import Dass
from dass_exp.methods.magnitude import Magnitude
from dass_exp.methods.sparsegpt import SparseGPT
from dass_exp.methods.wanda import Wanda
from dass_exp.models.families import FAMILIES

GPU = "cuda:0"


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: host_of(tensor) for name, tensor in model.state_dict().items()}


def assert_same_weights(ours: nn.Module, theirs: nn.Module, method: Pruner) -> None:
    """The two models are equal, wherever they lie: bit for bit, but up to rounding by SparseGPT, which solves there."""
    first, second = weights_of(ours), weights_of(theirs)
    assert first.keys() == second.keys()
    for name in first:
        if method.name == "sparsegpt":
            assert torch.equal(first[name] == 0, second[name] == 0), name
            torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=0)
        else:
            assert torch.equal(first[name], second[name]), name


def both(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model on the CPU, and a copy of it on the accelerator."""
    return model, copy.deepcopy(model).to(GPU)


# --- the pretended device itself


def test_two_devices_in_one_operation_are_refused(accelerator):
    here, there, other = torch.ones(3), torch.ones(3, device=GPU), torch.ones(3, device="cuda:1")
    for wrong in (
        lambda: here + there,
        lambda: there @ other,
        lambda: torch.cat([here, there]),
        lambda: here[there > 0],
    ):
        with pytest.raises(RuntimeError, match="expected one device"):
            wrong()
    assert (there + torch.tensor(1.0)).tolist() == [2.0] * 3  # a number on the host may be one of the operands
    assert there[torch.tensor([0, 2])].tolist() == [1.0] * 2  # and so may an index
    with pytest.raises(TypeError, match="copy it to the host first"):
        there.numpy()


def test_launches_and_waits_are_counted(accelerator):
    there = torch.arange(4.0, device=GPU)
    accelerator.reset()
    doubled = there * 2  # one launch
    view = doubled.view(2, 2).T  # none
    assert (sum(accelerator.launches.values()), sum(accelerator.waits.values())) == (1, 0)
    assert isinstance(view, PretendTensor)
    for wait in (there.sum().item, there.tolist, there.cpu, lambda: there[there > 1], lambda: bool(there[0] > 1)):
        accelerator.reset()
        wait()
        assert sum(accelerator.waits.values()) == 1, wait
    accelerator.reset()
    there[there > 1] = 0  # becomes masked_fill
    there[1] = 5.0
    assert sum(accelerator.waits.values()) == 0
    assert there.tolist() == [0.0, 5.0, 0.0, 0.0]


# --- masks and weights


def cases():
    """Every family x method; make test leaves out what differs from its cases in one of them only."""
    for family, method in itertools.product(sorted(FAMILIES), PRUNING):
        fast = family == "llama" or isinstance(method, Dass)
        yield pytest.param(family, method, id=f"{family}-{method.name}", marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("family", "method"), cases())
def test_weights_are_those_of_the_cpu(family, method, tiny_model, tokens, accelerator):
    cpu, gpu = both(tiny_model(family))
    for model in (cpu, gpu):
        pruning = prune_blocks(model, tokens, method, scope="all", batch_size=2, return_hidden=True)
    assert_same_weights(cpu, gpu, method)
    assert all(mask.device == torch.device(GPU) for mask in pruning.masks.values())


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(4, 8), NM(8, 16), TransposableNM(2, 4)], ids=str)
@pytest.mark.parametrize("method", [Dass(), SparseGPT(), Magnitude()], ids=str)
def test_patterns(pattern, method, tiny_model, tokens, accelerator):
    if isinstance(pattern, TransposableNM) and isinstance(method, SparseGPT):
        return  # refused on every device
    cpu, gpu = both(tiny_model("llama"))
    for model in (cpu, gpu):
        prune_blocks(model, tokens, method, pattern)
    assert_same_weights(cpu, gpu, method)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("family", "method"), [*((family, Dass()) for family in UNLIKE), ("llama", SparseGPT())], ids=str
)
def test_half_precision(family, method, dtype, tiny_model, tokens, accelerator):
    cpu, gpu = both(tiny_model(family).to(dtype))
    for model in (cpu, gpu):
        prune_blocks(model, tokens, method, scope="all", batch_size=2)
    assert_same_weights(cpu, gpu, method)


def stage_cases():
    """Every stage x three families; make test takes llama, and all but swaps elsewhere: their launches are many."""
    for chosen, family in itertools.product(ACTIVE, ["llama", "mixtral", "opt"]):
        fast = family == "llama" or chosen[1] != "swaps"
        yield pytest.param(chosen, family, id=f"{family}-{'='.join(chosen)}", marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("chosen", "family"), stage_cases())
def test_stages(chosen, family, tiny_model, tokens, accelerator):
    stages, pattern = stages_of(chosen), Unstructured(0.5) if chosen[0] == "allocation" else NM(2, 4)
    method = Dass() if is_served(stages, Dass(), pattern, "all") else SparseGPT()
    if not is_served(stages, method, pattern, "all"):
        return
    cpu, gpu = both(tiny_model(family))
    for model in (cpu, gpu):
        prune_blocks(model, tokens, method, pattern, scope="all", batch_size=2, stages=stages, min_tokens=1)
    assert_same_weights(cpu, gpu, method)


@pytest.mark.parametrize("method", [Dass(), SparseGPT()], ids=str)
def test_a_model_spread_over_two_devices(method, tiny_model, tokens, accelerator):
    cpu = tiny_model("llama")
    spread = copy.deepcopy(cpu)
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict(zip(parts, ["cuda:0", "cuda:0", "cuda:1", "cuda:1", "cuda:0", "cuda:1"], strict=True))
    dispatch_model(spread, places, main_device="cuda:0", force_hooks=True)
    for model in (cpu, spread):
        prune_blocks(model, tokens, method, scope="all", batch_size=2)
    assert {str(site.matrix.weight.device) for site in sites_of(spread, "all")} == {"cuda:0", "cuda:1"}
    assert_same_weights(cpu, spread, method)
    expected = perplexity(cpu, tokens, context=12)
    assert perplexity(spread, tokens, context=12) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("cache", ["cpu", "disk"])
def test_activations_that_wait_elsewhere(cache, tiny_model, tokens, accelerator, tmp_path):
    cpu, gpu = both(tiny_model("llama"))
    for model in (cpu, gpu):
        prune_blocks(model, tokens, Dass(), batch_size=2, cache=ActivationCache(cache, tmp_path))
    assert_same_weights(cpu, gpu, Dass())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_scores(family, tiny_model, tokens, accelerator):
    cpu, gpu = both(tiny_model(family))
    assert perplexity(gpu, tokens, context=12) == perplexity(cpu, tokens, context=12)
    assert torch.equal(generate(gpu, tokens[:2, :4], 5), generate(cpu, tokens[:2, :4], 5))


@pytest.mark.parametrize("limit", [1, 1 << 16])
@pytest.mark.parametrize("pairs", [1, 1 << 30])
def test_masks_of_an_accelerator_are_those_of_the_cpu(limit, pairs, accelerator, monkeypatch):
    """Each way of ranking, ties included: the limits choose among them."""
    monkeypatch.setattr(masks, "_LONG_GROUP", limit)
    monkeypatch.setattr(masks, "_MANY_PAIRS", pairs)
    scores = torch.randint(9, (48, 96), generator=torch.Generator().manual_seed(0)).float()
    for pattern in (Unstructured(0.5), Unstructured(0.3), NM(2, 4), NM(3, 8), NM(8, 16), NM(12, 24)):
        for dim in (0, 1, None):
            if dim is None or scores.shape[dim] % getattr(pattern, "m", 1) == 0:
                there = pattern.keep(scores.to(GPU), dim)
                assert torch.equal(host_of(there), pattern.keep(scores, dim)), (pattern, dim)
                assert int(pattern.violations(there, dim)) == 0


# --- budgets


Counts = tuple[Counter[str], Counter[str]]


def counts_of_a_block(
    accelerator: PretendAccelerator,
    model: nn.Module,
    method: Pruner,
    tokens: Tensor,
    scope: str,
    pattern: Pattern | None = None,
) -> Counts:
    """Launches and waits of one more block: those of a model of three blocks without those of one of two."""
    found = []
    for blocks in (3, 2):
        shorter = copy.deepcopy(model)
        shorter.model.layers = shorter.model.layers[:blocks]
        shorter.config.num_hidden_layers = blocks
        shorter.to(GPU)
        accelerator.reset()
        prune_model(
            shorter, tokens, method, pattern or NM(2, 4), EngineOptions(scope=scope, batch_size=1), [Verification()]
        )
        found.append((Counter(accelerator.launches), Counter(accelerator.waits)))
    (launches, waits), (fewer_launches, fewer_waits) = found
    return launches - fewer_launches, waits - fewer_waits


# not the solvers that ask for convergence or for the size of a mask
@pytest.mark.parametrize("scope", ["mlp", "all"])
@pytest.mark.parametrize("method", [one for one in PRUNING if one.name not in ("alps", "thanos", "admm")], ids=str)
def test_the_host_waits_seldom(method, scope, tiny_model, tokens, accelerator):
    """Three times a block: statistics, the error of its output, verification; SparseGPT once more per factorisation."""
    model = tiny_model("llama", num_hidden_layers=3)
    _, waits = counts_of_a_block(accelerator, model, method, tokens, scope)
    inputs = 2 if scope == "mlp" else 4  # linears that share one share its factorisation
    allowed = 3 + (inputs if method.name == "sparsegpt" else 0)
    assert 1 <= sum(waits.values()) <= allowed, waits


def launches_of_a_block(
    accelerator: PretendAccelerator, method: Pruner, pattern: Pattern, tiny_model: Any, tokens: Tensor
) -> int:
    """What choosing the masks and weights of an MLP of 128 + 128 + 256 columns launches."""
    model = tiny_model("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    launches, _ = counts_of_a_block(accelerator, model, method, tokens[:1], "mlp", pattern)
    solving = ("methods/", "masks.py", "hessian.py")
    return sum(number for line, number in launches.items() if line.startswith(solving))


@pytest.mark.parametrize("name", ["dass", "wanda", "glu_wanda", "ria"])
def test_launches_of_a_method_that_scores(name, tiny_model, tokens, accelerator):
    """What docs/performance.md states, as below."""
    (method,) = (method for method in PRUNING if method.name == name)
    assert launches_of_a_block(accelerator, method, NM(2, 4), tiny_model, tokens) <= 40 * 3


@pytest.mark.parametrize(("pattern", "a_column"), [(NM(2, 4), 5), (NM(4, 8), 3), (Unstructured(0.5), 0.7)], ids=str)
def test_launches_of_sparsegpt(pattern, a_column, tiny_model, tokens, accelerator):
    count = launches_of_a_block(accelerator, SparseGPT(), pattern, tiny_model, tokens)
    assert 0.5 * a_column * 512 < count <= a_column * 512


@pytest.mark.parametrize(("pattern", "waits"), [(TransposableNM(2, 4), 1), (Budget(0.37), 0), (NM(2, 4), 0)], ids=str)
def test_waits_of_a_mask(pattern, waits, accelerator):
    scores = torch.randn(64, 48)
    there = scores.to(GPU)
    accelerator.reset()
    mask = pattern.keep(there, 1)
    assert sum(accelerator.waits.values()) == waits, accelerator.waits
    assert torch.equal(host_of(mask), pattern.keep(scores, 1))


def test_a_batch_of_answers_is_waited_for_once(tiny_model, tokens, accelerator):
    requests = [(row[:8].tolist(), row[8:].tolist()) for row in tokens]
    cpu, gpu = both(tiny_model("llama"))
    expected = loglikelihoods(cpu, requests, len(requests), 64)
    accelerator.reset()
    assert loglikelihoods(gpu, requests, len(requests), 64) == expected
    waits = sum(number for line, number in accelerator.waits.items() if line.startswith("evaluate/loglikelihood"))
    assert waits == 2, accelerator.waits  # the tokens to the device, the scores from it


@pytest.mark.parametrize("own", ["none", "tf32"])
def test_float32_products_are_exact_while_a_model_is_pruned(own, tiny_model, tokens):
    products: Any = torch.backends.cuda.matmul

    class Asks(Callback):
        def on_block_end(self, report):
            assert products.fp32_precision == "ieee"

    before = products.fp32_precision
    try:
        products.fp32_precision = own  # by either interface of torch
        prune_model(tiny_model("llama"), tokens, Wanda(), NM(2, 4), EngineOptions(), [Asks()])
        assert products.fp32_precision == own
    finally:
        products.fp32_precision = before


def test_more_sequences_add_no_wait(tiny_model, tokens, accelerator):
    model = tiny_model("llama", num_hidden_layers=3)
    few, many = (counts_of_a_block(accelerator, model, Wanda(), part, "all")[1] for part in (tokens[:1], tokens))
    assert few == many


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "phi3"])
def test_fused_linears_add_no_wait(family, tiny_model, tokens, accelerator):
    """GPT-NeoX has the rows of q, k and v in turn, which takes an index."""
    model = tiny_model(family, num_hidden_layers=2).to(GPU)
    prune_model(model, tokens, Wanda(), NM(2, 4), EngineOptions(scope="all", batch_size=1), [Verification()])
    accelerator.reset()
    prune_model(model, tokens, Wanda(), NM(2, 4), EngineOptions(scope="all", batch_size=1), [Verification()])
    waits = {line: number for line, number in accelerator.waits.items() if line.startswith("models/decoder")}
    assert not waits


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=str)
def test_activations_in_host_memory_add_no_wait(method, tiny_model, tokens, accelerator):
    """They are copied to and from page-locked memory while the host goes on."""
    model, waits = tiny_model("llama", num_hidden_layers=3), []
    for kind in ("device", "cpu"):
        copied = copy.deepcopy(model).to(GPU)
        accelerator.reset()
        prune_blocks(copied, tokens, method, batch_size=1, cache=ActivationCache(kind))
        waits.append(sum(accelerator.waits.values()))
    assert waits[0] == waits[1], accelerator.waits


def test_host_memory_that_cannot_be_locked_is_used_as_it_is(tiny_model, tokens, accelerator, monkeypatch):
    refused, empty = [], torch.empty

    def refuse(*args, pin_memory=False, **kwargs):
        if pin_memory:
            refused.append(args)
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refuse)
    cpu, gpu = both(tiny_model("llama"))
    for model in (cpu, gpu):
        prune_blocks(model, tokens, Dass(), batch_size=2, cache=ActivationCache("cpu"))
    assert refused
    assert_same_weights(cpu, gpu, Dass())


def test_what_waits_in_host_memory_is_complete_when_the_host_reads_it(accelerator, monkeypatch):
    """Only the host has to wait: the device works in the order in which it was asked."""
    asked = []
    event = type(
        "Event", (), {"record": lambda *_: asked.append("record"), "synchronize": lambda _: asked.append("wait")}
    )
    monkeypatch.setattr(torch.cuda, "Event", event)
    cached = ActivationCache("cpu").store(torch.arange(4.0, device=GPU))
    assert cached.load().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert asked == ["record"]
    assert cached.stored().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert asked == ["record", "wait"]


def test_a_mixture_of_experts_adds_one_wait_a_batch(tiny_model, tokens, accelerator):
    model = tiny_model("mixtral", num_hidden_layers=3)
    _, waits = counts_of_a_block(accelerator, model, Wanda(), tokens, "all")
    assert sum(waits.values()) <= 3 + len(tokens), waits


def test_a_stopwatch_waits_for_the_card_that_works(accelerator, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    with Stopwatch(torch.device("cuda", 1)).measure("dense"):
        assert waited == [torch.device("cuda", 1)]
    assert waited == [torch.device("cuda", 1)] * 2
    with Stopwatch(torch.device("cpu")).measure("dense"):
        pass
    assert len(waited) == 2
