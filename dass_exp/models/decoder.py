"""The decoder blocks of a model, with the weight matrices in them by role: where a family's table meets its modules."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dass_exp.errors import UserError
from dass_exp.models.families import (
    ATTENTION,
    DOWN,
    GATE,
    GLU,
    INPUT_OF,
    SCOPES,
    UP,
    Experts,
    Family,
    Role,
    assumed_family,
    family_of,
    unknown_family,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinearSite:
    """One weight matrix of a block.

    Args:
        name: full name of its module; of a fused linear or an expert with the role behind it.
        role: what it does.
        matrix: the weight.
        source: its input; matrices of one source see the same tensor.
        unit: the block, or the expert: what is pruned together.
    """

    name: str
    role: Role
    matrix: Matrix
    source: str
    unit: str


@dataclass(frozen=True)
class Decoder:
    """The decoder blocks of one model."""

    family: Family
    config: Any = field(repr=False)
    blocks: nn.ModuleList = field(repr=False)
    names: list[str] = field(repr=False)

    @property
    def size(self) -> int:
        """Weights of all matrices in the blocks, whatever their role (a router's too); norms and biases are none."""
        return sum(parameter.numel() for parameter in self.blocks.parameters() if parameter.ndim > 1)

    def sites(self, index: int, scope: str) -> Iterator[LinearSite]:
        """The matrices of block ``index`` that lie in ``scope``, in the order of the roles, experts one after the other.

        Raises:
            UserError: a role's path leads to no linear.
        """
        name, experts = self.names[index], self.experts(index)
        for role, place in self.family.places.items():
            if role not in SCOPES[scope] or (experts is not None and role in GLU):
                continue
            module = self._module(index, role, place.path)
            rows = place.rows(self.config) if place.rows else None
            matrix = Matrix(module, module.weight, transposed=isinstance(module, Conv1D), rows=rows)  # type: ignore[arg-type]
            yield LinearSite(
                f"{name}.{place.path}" + (f".{role.value}" if rows is not None else ""),
                role,
                matrix,
                INPUT_OF[role],
                name,
            )
        if experts is not None and SCOPES[scope] & GLU:
            yield from self._expert_sites(f"{name}.{self._table().path}", experts)

    def attention(self, index: int) -> nn.Module | None:
        """The module that holds the attention of block ``index`` and nothing of its MLP; None where there is no such module."""
        parents = {role: place.path.rpartition(".")[0] for role, place in self.family.places.items()}
        parent, *others = {path for role, path in parents.items() if role in ATTENTION}
        if (
            others
            or not parent
            or any(f"{path}.".startswith(f"{parent}.") for role, path in parents.items() if role not in ATTENTION)
        ):
            return None
        try:
            return self.blocks[index].get_submodule(parent)
        except AttributeError:
            return None  # a hybrid mixes its tokens otherwise in some blocks

    def experts(self, index: int) -> nn.Module | None:
        """The module that holds the experts of block ``index``; None for a block without."""
        if self.family.experts is None:
            return None
        try:
            return self.blocks[index].get_submodule(self.family.experts.path)
        except AttributeError:
            return None  # some mixtures keep a plain MLP in some blocks

    def _expert_sites(self, path: str, module: nn.Module) -> Iterator[LinearSite]:
        table = self._table()
        fused, down = getattr(module, table.gate_up), getattr(module, table.down)
        width = down.shape[-1]
        for number in range(len(down)):
            unit = f"{path}.{number}"
            halves = {
                GATE: Matrix(module, fused, number, rows=slice(0, width)),
                UP: Matrix(module, fused, number, rows=slice(width, 2 * width)),
            }
            for role, matrix in {**halves, DOWN: Matrix(module, down, number)}.items():
                yield LinearSite(f"{unit}.{role.value}", role, matrix, f"expert {number} {INPUT_OF[role]}", unit)

    def _table(self) -> Experts:
        if self.family.experts is None:
            raise LookupError("this family has no experts")
        return self.family.experts

    def _module(self, index: int, role: Role, path: str) -> nn.Module:
        name = f"{self.names[index]}.{path}"
        try:
            module = self.blocks[index].get_submodule(path)
        except AttributeError as error:
            raise UserError(f"role {role.value}: the model has no module {name}; set model.roles") from error
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise UserError(f"role {role.value}: {name} is a {type(module).__name__}; only a linear can be pruned")
        return module


def decoder_of(model: nn.Module, roles: Mapping[str, str] | None = None) -> Decoder:
    """Find the decoder blocks of a causal language model.

    A model of a family that is in no table is taken for a LLaMA if its modules are called so; a warning says what was assumed.

    Raises:
        UserError: the family is unknown, or its blocks are not where the table says.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    model_type = str(getattr(config, "model_type", type(model).__name__))
    known = family_of(model_type, roles)
    family = known or assumed_family()
    try:
        blocks = model.get_submodule(family.blocks)
    except AttributeError as error:
        raise (
            UserError(f"the model has no blocks at {family.blocks}; set model.roles.blocks")
            if known
            else unknown_family(model_type)
        ) from error
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise (
            UserError(f"{family.blocks} is no list of decoder blocks; set model.roles.blocks")
            if known
            else unknown_family(model_type)
        )
    decoder = Decoder(family, config, blocks, [f"{family.blocks}.{index}" for index in range(len(blocks))])
    if known is None:
        _assume(decoder, model_type)
    return decoder


def _assume(decoder: Decoder, model_type: str) -> None:
    try:
        for index in range(len(decoder.blocks)):
            list(decoder.sites(index, "all"))
    except UserError as error:
        raise unknown_family(model_type) from error
    told = ", ".join(f"{role.value}: {place.path}" for role, place in decoder.family.places.items())
    log.warning(
        "model family %r is in no table: it is taken for a LLaMA, with blocks: %s, %s; its BOS as its tokenizer does",
        model_type,
        decoder.family.blocks,
        told,
    )


@dataclass(frozen=True)
class Matrix:
    """A weight [out_features, in_features] inside a module.

    Args:
        module: what is called with the matrix's input.
        parameter: the tensor that holds it, of one linear or of several.
        expert: its place along the first of three dimensions, None for a tensor of two.
        transposed: the tensor is [in_features, out_features] (GPT-2's Conv1D).
        rows: the output features of a fused linear that are its own, None for all.
    """

    module: nn.Module
    parameter: Tensor
    expert: int | None = None
    transposed: bool = False
    rows: slice | Sequence[int] | None = None

    @classmethod
    def of(cls, linear: nn.Linear) -> Matrix:
        """The whole weight of a linear."""
        return cls(linear, linear.weight)

    @property
    def in_features(self) -> int:
        """Columns."""
        return self.parameter.shape[-2 if self.transposed else -1]

    @property
    def out_features(self) -> int:
        """Rows."""
        whole = self.parameter.shape[-1 if self.transposed else -2]
        return (
            whole
            if self.rows is None
            else len(range(whole)[self.rows])
            if isinstance(self.rows, slice)
            else len(self.rows)
        )

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], in the model's dtype; not to be changed in place: it may be a copy."""
        whole = self._whole()
        return whole if self.rows is None else whole[self._index()]

    def zero(self, keep: Tensor) -> None:
        """Set the weights to zero where ``keep`` (bool [out, in]) is False; the others stay as they are, bit for bit."""
        if self.rows is None or isinstance(self.rows, slice):
            self.weight.masked_fill_(~keep, 0)
        else:
            self.write(self.weight.masked_fill(~keep, 0))

    def write(self, weight: Tensor) -> None:
        """Replace the matrix by ``weight`` [out, in], rounded to the model's dtype."""
        whole = self._whole()
        if self.rows is None:
            whole.copy_(weight)
        else:
            whole[self._index()] = weight.to(whole.dtype)

    def _whole(self) -> Tensor:
        tensor = self.parameter.detach()  # shares the model's memory
        tensor = tensor if self.expert is None else tensor[self.expert]
        return tensor.T if self.transposed else tensor

    def _index(self) -> slice | Tensor:
        return self.rows if isinstance(self.rows, slice) else torch.tensor(self.rows, device=self.parameter.device)
