"""What the tests share: they run offline, on one thread, on random two-layer models of every family."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

# Libraries read these when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import functools
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from support import save_tiny, tiny_overrides
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dass_exp.data.texts import OfflineText

settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.load_profile("fixed")

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
WINDOW = 4  # of sliding attention: shorter than the sequences of the tests, so that it shows
OWN: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "mistral": {"head_dim": 16, "sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW, "final_logit_softcapping": 2.0},
    "olmo2": {},
    "phi3": {"pad_token_id": 0, "sliding_window": WINDOW},
    "mixtral": {"head_dim": 16, "num_local_experts": 4, "sliding_window": WINDOW},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [1],
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_inner": 48},
    "arcee": {"head_dim": 16},
    "gpt_neox": {"num_key_value_heads": None},
    "phi": {"num_key_value_heads": 4},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Threads that wait for each other over tiny matrices make the tests ten times slower on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_model() -> Callable[..., nn.Module]:
    """A factory: ``tiny_model(family, **settings)`` is a random model of the family, the same at each call.

    A family that is missing in ``OWN`` raises, so a test that runs over ``FAMILIES`` fails until it has a tiny model.
    """

    def make(family: str, **changes: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(family, **{**SHAPE, **OWN[family], **changes})
            )
            for parameter in model.parameters():
                if (
                    parameter.ndim == 1
                ):  # norms and biases start out as ones and zeros, which would hide that they were skipped
                    nn.init.normal_(parameter, mean=0.5, std=0.2)
        return model.eval()

    return make


@pytest.fixture
def tokens() -> Tensor:
    """int64 [5, 12]: five sequences, so that batches of 2 and 3 leave a smaller one at the end."""
    return torch.randint(SHAPE["vocab_size"], (5, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def attached() -> Callable[[nn.Module], Counter[str]]:
    """A function that counts what is attached to a model: forward hooks, and forwards set on an instance."""

    def count(model: nn.Module) -> Counter[str]:
        found: Counter[str] = Counter()
        for module in model.modules():
            found["hooks"] += len(module._forward_pre_hooks) + len(module._forward_hooks)
            found["forwards"] += "forward" in vars(module)
        return found

    return count


@pytest.fixture(scope="session", name="tiny")
def tiny_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder, made once for all files; not to be changed."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(name="results")
def results_fixture(tmp_path: Path) -> Path:
    """A results folder of the test's own."""
    return tmp_path / "results"


@pytest.fixture(name="cell")
def cell_fixture(tiny: Path, results: Path) -> list[str]:
    """The overrides of a quick run of the tiny model into a folder of the test's own."""
    return tiny_overrides(tiny, results)


@pytest.fixture(name="short_texts")
def short_texts_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first documents of the real texts only: the tiny tokenizer is slow on megabytes."""
    whole = functools.cache(OfflineText.documents)
    monkeypatch.setattr(OfflineText, "documents", lambda text: whole(text)[:20])
