"""Model families: which module plays which role. The only place that knows the names of a model's modules.

A role is what a linear does in its block. Methods ask for roles and never for names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from torch import nn

from dass_exp.errors import UserError, one_of


class Role(StrEnum):
    """What a linear does in a decoder block."""

    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741 - the field's letter for the output projection
    GATE = "gate"
    UP = "up"
    DOWN = "down"


Q, K, V, O, GATE, UP, DOWN = Role  # noqa: E741

SCOPES: dict[str, frozenset[Role]] = {
    "mlp": frozenset({GATE, UP, DOWN}),
    "attention": frozenset({Q, K, V, O}),
    "all": frozenset(Role),
}

# Linears whose roles share an input see the very same tensor, so it is observed once.
INPUT_OF: dict[Role, str] = {Q: "attention", K: "attention", V: "attention", O: "heads", GATE: "mlp", UP: "mlp", DOWN: "intermediate"}

BOS_POLICIES = ("never", "stream", "window")


@dataclass(frozen=True)
class Family:
    """The roles of one architecture.

    Args:
        linears: path of each role's linear inside a block.
        blocks: path of the list of decoder blocks.
        bos: ``tokenizer``, once at the head of a text where the tokenizer itself adds it (the Wanda code), or ``window``,
            at the start of each window (Gemma, which gives no sensible figure without it).
    """

    linears: Mapping[Role, str]
    blocks: str = "model.layers"
    bos: str = "tokenizer"


_LLAMA_LINEARS: Mapping[Role, str] = {
    Q: "self_attn.q_proj",
    K: "self_attn.k_proj",
    V: "self_attn.v_proj",
    O: "self_attn.o_proj",
    GATE: "mlp.gate_proj",
    UP: "mlp.up_proj",
    DOWN: "mlp.down_proj",
}
_LLAMA = Family(_LLAMA_LINEARS)
_GEMMA = Family(_LLAMA_LINEARS, bos="window")

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
}


def family_of(model_type: str, roles: Mapping[str, str] | None = None) -> Family:
    """The family of a ``config.model_type``, or the one that the setting ``model.roles`` describes.

    Args:
        model_type: as in the model's config.json.
        roles: path of each role's linear inside a block, and ``blocks``: the path of the list of blocks.

    Raises:
        UserError: the family is unknown and no roles were given, or the roles are incomplete.
    """
    if roles is not None:
        if not isinstance(roles, Mapping) or not all(isinstance(path, str) for path in roles.values()):
            raise UserError(f"model.roles={roles!r}: expected a path for each of blocks, {', '.join(Role)}")
        given = {one_of("model.roles", key, ("blocks", *Role)): path for key, path in roles.items()}
        missing = [role.value for role in Role if role not in given]
        if missing:
            raise UserError(f"model.roles: missing {', '.join(missing)}; give the path inside a block of each of {', '.join(Role)}")
        base = FAMILIES.get(model_type, _LLAMA)
        return Family({role: given[role] for role in Role}, given.get("blocks", base.blocks), base.bos)
    if model_type not in FAMILIES:
        raise UserError(
            f"model family {model_type!r} is not known; known: {', '.join(sorted(FAMILIES))}. "
            f"A model with a GLU MLP can be described by model.roles={{blocks: ..., {': ..., '.join(Role)}: ...}}"
        )
    return FAMILIES[model_type]


@dataclass(frozen=True)
class Decoder:
    """The decoder blocks of one model, with their linears by role."""

    family: Family
    blocks: nn.ModuleList
    names: list[str] = field(repr=False)

    @property
    def size(self) -> int:
        """Weights of all linears in the blocks, whatever their role."""
        return sum(module.weight.numel() for module in self.blocks.modules() if isinstance(module, nn.Linear))

    def linears(self, index: int, scope: str) -> Iterator[tuple[str, Role, nn.Linear]]:
        """Full name, role and module of the linears of block ``index`` that lie in ``scope``, in the order of the roles.

        Raises:
            UserError: a role's path leads to no ``nn.Linear``.
        """
        for role, path in self.family.linears.items():
            if role not in SCOPES[scope]:
                continue
            name = f"{self.names[index]}.{path}"
            try:
                module = self.blocks[index].get_submodule(path)
            except AttributeError as error:
                raise UserError(f"role {role.value}: the model has no module {name}; set model.roles") from error
            if not isinstance(module, nn.Linear):
                raise UserError(f"role {role.value}: {name} is a {type(module).__name__}; only nn.Linear can be pruned")
            yield name, role, module


def decoder_of(model: nn.Module, roles: Mapping[str, str] | None = None) -> Decoder:
    """Find the decoder blocks of a causal language model.

    Raises:
        UserError: the family is unknown, or its blocks are not where the table says.
    """
    config = getattr(model, "config", None)
    family = family_of(str(getattr(config, "model_type", type(model).__name__)), roles)
    try:
        blocks = model.get_submodule(family.blocks)
    except AttributeError as error:
        raise UserError(f"the model has no blocks at {family.blocks}; set model.roles.blocks") from error
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise UserError(f"{family.blocks} is no list of decoder blocks; set model.roles.blocks")
    return Decoder(family, blocks, [f"{family.blocks}.{index}" for index in range(len(blocks))])
