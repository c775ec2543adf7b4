"""Model families: which module plays which role. The only place that knows the names of a model's modules.

A role is what a linear does in its block. Methods ask for roles and never for names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dass_exp.errors import UserError, one_of


class Role(StrEnum):
    """What a linear does in a decoder block."""

    Q = "q"
    K = "k"
    V = "v"
    O = "o"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    FC1 = "fc1"
    FC2 = "fc2"


Q, K, V, O, GATE, UP, DOWN, FC1, FC2 = Role

ATTENTION, GLU, PLAIN = frozenset({Q, K, V, O}), frozenset({GATE, UP, DOWN}), frozenset({FC1, FC2})

SCOPES: dict[str, frozenset[Role]] = {"mlp": GLU | PLAIN, "attention": ATTENTION, "all": frozenset(Role)}

# Linears whose roles share an input see the very same tensor, so it is observed once.
INPUT_OF: dict[Role, str] = {
    Q: "attention",
    K: "attention",
    V: "attention",
    O: "heads",
    GATE: "mlp",
    UP: "mlp",
    DOWN: "intermediate",
    FC1: "mlp",
    FC2: "intermediate",
}

# Which linear of an MLP reads the neurons that this one makes.
READER_OF: dict[Role, Role] = {GATE: DOWN, UP: DOWN, FC1: FC2}

BOS_POLICIES = ("never", "stream", "window")

Rows = slice | Sequence[int]


@dataclass(frozen=True)
class Place:
    """Where a block keeps a role's weight.

    Args:
        path: of the module inside the block.
        rows: which of its output features, from the model's config, where several roles are fused in one linear.
    """

    path: str
    rows: Callable[[Any], Rows] | None = None


@dataclass(frozen=True)
class Experts:
    """Where a block of a mixture of experts keeps them, as [expert, out, in] tensors of one module; the router is never pruned.

    Args:
        path: of the experts' module inside the block.
        gate_up: the tensor of gate and up, one over the other.
        down: the tensor of down.
    """

    path: str = "mlp.experts"
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class Family:
    """The roles of one architecture.

    Args:
        places: of each role's linear inside a block.
        mlp: the form of its MLP, for tables.
        blocks: path of the list of decoder blocks.
        bos: ``tokenizer``, once at the head of a text where the tokenizer itself adds it (the Wanda code), or ``window``,
            at the start of each window (Gemma, which gives no sensible figure without it).
        experts: in blocks that have them they stand in the place of gate, up and down.
        seen: the model of it that this project has pruned for real; empty where only random ones were, in the tests.
    """

    places: Mapping[Role, Place]
    mlp: str = "GLU"
    blocks: str = "model.layers"
    bos: str = "tokenizer"
    experts: Experts | None = None
    seen: str = ""


def _places(**paths: str | Place) -> dict[Role, Place]:
    return {Role(role): Place(path) if isinstance(path, str) else path for role, path in paths.items()}


def _third(number: int) -> Callable[[Any], Rows]:
    return lambda config: slice(number * config.hidden_size, (number + 1) * config.hidden_size)


def _half(number: int) -> Callable[[Any], Rows]:
    return lambda config: slice(number * config.intermediate_size, (number + 1) * config.intermediate_size)


def _phi3_heads(role: Role) -> Callable[[Any], Rows]:
    """Phi-3: the heads of q, then those of k, then those of v, with fewer of k and v."""

    def rows(config: Any) -> Rows:
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
        return {Q: slice(0, queries), K: slice(queries, queries + keys), V: slice(queries + keys, queries + 2 * keys)}[
            role
        ]

    return rows


def _neox_heads(number: int) -> Callable[[Any], Rows]:
    """GPT-NeoX: head by head, q, k and v of each."""

    def rows(config: Any) -> Rows:
        size = config.hidden_size // config.num_attention_heads
        return [
            (3 * head + number) * size + feature
            for head in range(config.num_attention_heads)
            for feature in range(size)
        ]

    return rows


_ATTENTION = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
_GLU = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
_LLAMA = Family(_places(**_ATTENTION, **_GLU))
_GEMMA = Family(_LLAMA.places, "GeGLU", bos="window")
_MIXTURE = Family(_LLAMA.places, "SwiGLU experts", experts=Experts())

FAMILIES: dict[str, Family] = {
    "llama": Family(_LLAMA.places, "SwiGLU (ReGLU in ReluLLaMA)", seen="SmolLM2-135M; tiny models, trained here"),
    "mistral": Family(_LLAMA.places, "SwiGLU"),
    "qwen2": Family(_LLAMA.places, "SwiGLU"),
    "qwen3": Family(_LLAMA.places, "SwiGLU"),
    "olmo2": Family(_LLAMA.places, "SwiGLU"),
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": Family(_LLAMA.places, "GeGLU", bos="window", seen="Gemma-3-270M"),
    "phi3": Family(
        _places(
            **{role.value: Place("self_attn.qkv_proj", _phi3_heads(role)) for role in (Q, K, V)},
            o="self_attn.o_proj",
            gate=Place("mlp.gate_up_proj", _half(0)),
            up=Place("mlp.gate_up_proj", _half(1)),
            down="mlp.down_proj",
        ),
        "SwiGLU",
    ),
    "mixtral": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "olmoe": _MIXTURE,
    "opt": Family(
        _places(**{**_ATTENTION, "o": "self_attn.out_proj"}, fc1="fc1", fc2="fc2"),
        "ReLU, no GLU",
        blocks="model.decoder.layers",
    ),
    "gpt2": Family(
        _places(
            **{role.value: Place("attn.c_attn", _third(number)) for number, role in enumerate((Q, K, V))},
            o="attn.c_proj",
            fc1="mlp.c_fc",
            fc2="mlp.c_proj",
        ),
        "GELU, no GLU",
        blocks="transformer.h",
    ),
    "gpt_neox": Family(
        _places(
            **{
                role.value: Place("attention.query_key_value", _neox_heads(number))
                for number, role in enumerate((Q, K, V))
            },
            o="attention.dense",
            fc1="mlp.dense_h_to_4h",
            fc2="mlp.dense_4h_to_h",
        ),
        "GELU, no GLU",
        blocks="gpt_neox.layers",
    ),
    "arcee": Family(
        _places(**_ATTENTION, fc1="mlp.up_proj", fc2="mlp.down_proj"),
        "any activation, no GLU",
        seen="tiny models, trained here",
    ),
    "phi": Family(_places(**{**_ATTENTION, "o": "self_attn.dense"}, fc1="mlp.fc1", fc2="mlp.fc2"), "GELU, no GLU"),
}


def table() -> str:
    """The families as README.md lists them, Markdown."""
    lines = ["| `model_type` | MLP | where the roles lie | BOS | run for real here |", "|---|---|---|---|---|"]
    for name, family in FAMILIES.items():
        fused = [role.value for role, place in family.places.items() if place.rows is not None]
        told = [f"{', '.join(fused)} fused"] if fused else []
        told += ["each expert by its own tokens, router dense"] if family.experts else []
        bos = "in every window" if family.bos == "window" else "as its tokenizer does"
        lines.append(
            f"| {name} | {family.mlp} | {'; '.join(told) or 'each its own linear'} | {bos} | {family.seen or 'no: random two-layer models in the tests'} |"
        )
    return "\n".join(lines) + "\n"


def family_of(model_type: str, roles: Mapping[str, str] | None = None) -> Family | None:
    """The family of a ``config.model_type``, the one that the setting ``model.roles`` describes, or None for one that is in neither.

    Args:
        model_type: as in the model's config.json.
        roles: path of each role's linear inside a block, and ``blocks``: the path of the list of blocks.

    Raises:
        UserError: roles were given and are incomplete.
    """
    if roles is None:
        return FAMILIES.get(model_type)
    if not isinstance(roles, Mapping) or not all(isinstance(path, str) for path in roles.values()):
        raise UserError(f"model.roles={roles!r}: expected a path for each of blocks, {', '.join(Role)}")
    given = {one_of("model.roles", key, ("blocks", *Role)): path for key, path in roles.items()}
    mlp = PLAIN if PLAIN & given.keys() and not GLU & given.keys() else GLU
    needed = [role for role in Role if role in ATTENTION | mlp]
    missing = [role.value for role in needed if role not in given]
    if missing or len(given.keys() - {"blocks"}) > len(needed):
        told = f"missing {', '.join(missing)}" if missing else "an MLP has gate, up and down, or fc1 and fc2, not both"
        raise UserError(f"model.roles: {told}; give the path inside a block of each of {', '.join(needed)}")
    base = FAMILIES.get(model_type, _LLAMA)
    return Family(
        {role: Place(given[role]) for role in needed}, "as model.roles says", given.get("blocks", base.blocks), base.bos
    )


def assumed_family() -> Family:
    """What a model of an unknown family is tried as: the names that LLaMA and most of its successors use."""
    return _LLAMA


def unknown_family(model_type: str) -> UserError:
    """What to tell of a family that is in no table and does not look like LLaMA."""
    roles = ", ".join(f"{role}: PATH" for role in ("blocks", *(role for role in Role if role not in PLAIN)))
    return UserError(
        f"model family {model_type!r} is not known, and its modules are not called like LLaMA's; known: {', '.join(sorted(FAMILIES))}. "
        f"Describe it in a file conf/model/NAME.yaml: name: NAME, path: its hub id or folder, roles: {{{roles}}} (without a GLU: fc1 and fc2)"
    )
