"""Model families: which module has which role in a decoder block. Only this file knows the names of modules."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dass_exp.config.choices import SCOPES
from dass_exp.errors import UserError, one_of


class Role(StrEnum):
    """What a linear does in a decoder block."""

    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    FC1 = "fc1"
    FC2 = "fc2"


Q, K, V, O, GATE, UP, DOWN, FC1, FC2 = Role  # noqa: E741

ATTENTION, GLU, PLAIN = frozenset({Q, K, V, O}), frozenset({GATE, UP, DOWN}), frozenset({FC1, FC2})

ROLES_IN_SCOPE = dict(zip(SCOPES, (GLU | PLAIN, ATTENTION, frozenset(Role)), strict=True))

# Roles with the same entry read the very same tensor, so it is observed once.
INPUT_OF: dict[Role, str] = {
    **dict.fromkeys((Q, K, V), "attention"),
    O: "heads",
    **dict.fromkeys((GATE, UP, FC1), "mlp"),
    **dict.fromkeys((DOWN, FC2), "intermediate"),
}

# The linear of an MLP that reads the outputs of this one, through the activation.
READER_OF: dict[Role, Role] = {GATE: DOWN, UP: DOWN, FC1: FC2}

READERS = frozenset({O, *READER_OF.values()})  # roles whose inputs other linears of the same block have computed

Rows = slice | Sequence[int]


@dataclass(frozen=True)
class WeightLocation:
    """Where a block keeps the weight of a role."""

    path: str  # of the module inside the block
    rows: Callable[[Any], Rows] | None = None  # its output features by the model's config, if roles share one linear


@dataclass(frozen=True)
class Experts:
    """Where a mixture-of-experts block keeps its experts: tensors [expert, out, in] of a module. Routers stay dense."""

    path: str = "mlp.experts"  # of that module inside the block
    gate_up: str = "gate_up_proj"  # gate and up, stacked along the output features
    down: str = "down_proj"


@dataclass(frozen=True)
class Family:
    """The roles of one architecture."""

    locations: Mapping[Role, WeightLocation]  # of each role's linear inside a block
    mlp: str = "GLU"  # kind of MLP, for tables
    blocks: str = "model.layers"  # path of the list of decoder blocks
    # tokenizer: once at the start of a text if the tokenizer adds it by itself, as in the Wanda code;
    # window: at the start of each window (Gemma, whose perplexity is meaningless without it)
    bos: str = "tokenizer"
    experts: Experts | None = None  # replace gate, up and down in the blocks that have them
    tested_on: str = ""  # real models that this project has pruned; empty: only random ones, in the tests


def _locations(**paths: str | WeightLocation) -> dict[Role, WeightLocation]:
    return {Role(role): WeightLocation(path) if isinstance(path, str) else path for role, path in paths.items()}


def _fused_qkv(path: str, rows: Callable[[int], Callable[[Any], Rows]]) -> dict[str, str | WeightLocation]:
    return {role: WeightLocation(path, rows(part)) for part, role in enumerate("qkv")}


def _equal_part(part: int, size: str = "hidden_size") -> Callable[[Any], Rows]:
    return lambda config: slice(part * getattr(config, size), (part + 1) * getattr(config, size))


def _phi3_qkv(part: int) -> Callable[[Any], Rows]:
    """Phi-3: all heads of q, then the (fewer) heads of k, then those of v."""

    def rows(config: Any) -> Rows:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        bounds = (0, queries, queries + keys, queries + 2 * keys)
        return slice(bounds[part], bounds[part + 1])

    return rows


def _neox_qkv(part: int) -> Callable[[Any], Rows]:
    """GPT-NeoX: head by head, q, k and v of each."""

    def rows(config: Any) -> Rows:
        heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        return tuple((3 * head + part) * head_dim + feature for head in range(heads) for feature in range(head_dim))

    return rows


_ATTENTION = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
_LLAMA = _locations(**_ATTENTION, gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
_PHI3 = _locations(
    **_fused_qkv("self_attn.qkv_proj", _phi3_qkv),
    o="self_attn.o_proj",
    gate=WeightLocation("mlp.gate_up_proj", _equal_part(0, "intermediate_size")),
    up=WeightLocation("mlp.gate_up_proj", _equal_part(1, "intermediate_size")),
    down="mlp.down_proj",
)
_OPT = _locations(**_ATTENTION | {"o": "self_attn.out_proj"}, fc1="fc1", fc2="fc2")
_GPT2 = _locations(**_fused_qkv("attn.c_attn", _equal_part), o="attn.c_proj", fc1="mlp.c_fc", fc2="mlp.c_proj")
_NEOX_MLP = {"fc1": "mlp.dense_h_to_4h", "fc2": "mlp.dense_4h_to_h"}
_NEOX = _locations(**_fused_qkv("attention.query_key_value", _neox_qkv), o="attention.dense", **_NEOX_MLP)
_ARCEE = _locations(**_ATTENTION, fc1="mlp.up_proj", fc2="mlp.down_proj")
_PHI = _locations(**_ATTENTION | {"o": "self_attn.dense"}, fc1="mlp.fc1", fc2="mlp.fc2")
ASSUMED = _SWIGLU = Family(_LLAMA, "SwiGLU")  # what a model of an unknown family is assumed to be
_GEMMA = Family(_LLAMA, "GeGLU", bos="window")
_MIXTURE = Family(_LLAMA, "SwiGLU experts", experts=Experts())

FAMILIES: dict[str, Family] = {
    "llama": Family(_LLAMA, "SwiGLU (ReGLU in ReluLLaMA)", tested_on="SmolLM2-135M; tiny models, trained here"),
    **dict.fromkeys(("mistral", "qwen2", "qwen3", "olmo2"), _SWIGLU),
    **dict.fromkeys(("gemma", "gemma2"), _GEMMA),
    "gemma3_text": Family(_LLAMA, "GeGLU", bos="window", tested_on="Gemma-3-270M"),
    "phi3": Family(_PHI3, "SwiGLU"),
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe"), _MIXTURE),
    "opt": Family(_OPT, "ReLU, no GLU", blocks="model.decoder.layers"),
    "gpt2": Family(_GPT2, "GELU, no GLU", blocks="transformer.h"),
    "gpt_neox": Family(_NEOX, "GELU, no GLU", blocks="gpt_neox.layers"),
    "arcee": Family(_ARCEE, "any activation, no GLU", tested_on="tiny models, trained here"),
    "phi": Family(_PHI, "GELU, no GLU"),
}


def markdown_table() -> str:
    """Return the table of supported families in docs/models.md, which a test compares with it."""
    lines = ["| `model_type` | MLP | weights of the roles | BOS | pruned for real here |", "|---|---|---|---|---|"]
    for name, family in FAMILIES.items():
        fused = [role.value for role, location in family.locations.items() if location.rows is not None]
        layout = [f"{', '.join(fused)} fused"] if fused else []
        layout += ["one matrix per expert, router not pruned"] if family.experts else []
        bos = "at the start of every window" if family.bos == "window" else "if the tokenizer adds it"
        tested = family.tested_on or "no (random two-layer models in tests)"
        lines.append(f"| {name} | {family.mlp} | {'; '.join(layout) or 'separate linears'} | {bos} | {tested} |")
    return "\n".join(lines) + "\n"


def family_of(model_type: str, roles: Mapping[str, str] | None = None) -> Family | None:
    """Return the family of a ``config.model_type`` (None if unknown), or the one that ``model.roles`` describes.

    Args:
        model_type: as in the model's config.json.
        roles: path of each role's linear inside a block and, as ``blocks``, of the list of blocks.
    """
    if roles is None:
        return FAMILIES.get(model_type)
    if not isinstance(roles, Mapping) or not all(isinstance(path, str) for path in roles.values()):
        raise UserError(f"model.roles={roles!r}: expected a path for each of blocks, {', '.join(Role)}")
    paths = {one_of("model.roles", key, ("blocks", *Role)): path for key, path in roles.items()}
    mlp = PLAIN if PLAIN & paths.keys() and not GLU & paths.keys() else GLU
    needed = [role for role in Role if role in ATTENTION | mlp]
    missing = [role.value for role in needed if role not in paths]
    if missing or len(paths.keys() - {"blocks"}) > len(needed):
        both = "an MLP has gate, up and down, or fc1 and fc2, not both"
        problem = f"missing {', '.join(missing)}" if missing else both
        raise UserError(f"model.roles: {problem}; give the path inside a block of each of {', '.join(needed)}")
    base, locations = FAMILIES.get(model_type, ASSUMED), {role: WeightLocation(paths[role]) for role in needed}
    return Family(locations, "as model.roles says", paths.get("blocks", base.blocks), base.bos)


def unknown_family(model_type: str) -> UserError:
    """Return the error for a family that is in no table and whose modules are not named like LLaMA's."""
    roles = ", ".join(f"{role}: PATH" for role in ("blocks", *(role for role in Role if role not in PLAIN)))
    return UserError(
        f"model family {model_type!r} is not known, and its modules are not called like LLaMA's; "
        f"known: {', '.join(sorted(FAMILIES))}. Describe it in a file conf/model/NAME.yaml: name: NAME, "
        f"path: its hub id or folder, roles: {{{roles}}} (without a GLU: fc1 and fc2)"
    )
