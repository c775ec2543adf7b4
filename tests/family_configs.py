"""Sizes of the random two-layer models of every family."""

from __future__ import annotations

from typing import Any

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
HEAD = {"head_dim": 16}  # not hidden_size / num_attention_heads
SLIDING = {"sliding_window": 4}  # shorter than the sequences of the tests, so that it shows
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
GEMMA = {**HEAD, **SLIDING, "query_pre_attn_scalar": 16}
OWN: dict[str, dict[str, Any]] = {
    "llama": HEAD,
    "mistral": {**HEAD, **SLIDING},
    "qwen2": {**SLIDING, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": HEAD,
    "gemma": HEAD,
    "gemma2": {**GEMMA, "final_logit_softcapping": 2.0},
    "olmo2": {},
    "phi3": {**SLIDING, "pad_token_id": 0},
    "mixtral": {**HEAD, **SLIDING, "num_local_experts": 4},
    "qwen3_moe": {**HEAD, **EXPERTS, "moe_intermediate_size": 16, "mlp_only_layers": [1]},
    "olmoe": {**EXPERTS, "pad_token_id": 0},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_inner": 48},
    "arcee": HEAD,
    "gpt_neox": {"num_key_value_heads": None},
    "phi": {"num_key_value_heads": 4},
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
}
