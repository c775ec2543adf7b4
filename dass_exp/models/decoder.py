"""The decoder blocks of a model and their weight matrices by role: finds the modules that a family's table names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from dass_exp.errors import UserError
from dass_exp.models import families
from dass_exp.models.families import (
    ATTENTION,
    DOWN,
    GATE,
    GLU,
    INPUT_OF,
    READER_OF,
    ROLES_IN_SCOPE,
    UP,
    Experts,
    Family,
    Role,
    Rows,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unit:
    """What is pruned together: the matrices of a block or of an expert that are in the scope."""

    matrices: Mapping[Role, Matrix]
    config: Any = field(repr=False)  # of the model

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The activation function of the MLP; a UserError if the model's config names none that transformers knows."""
        fields = ("hidden_activation", "hidden_act", "activation_function")
        name = next(filter(None, (getattr(self.config, name, None) for name in fields)), None)
        if name not in ACT2FN:
            raise UserError(f"the model's config names no activation of its MLP that transformers knows: {name!r}")
        activation: Callable[[Tensor], Tensor] = ACT2FN[name]
        return activation

    def apply(self, role: Role, inputs: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return what the linear with this role gives for float32 inputs [tokens, in_features], in float32.

        ``weight``, float32 [out_features, in_features], replaces the model's.
        """
        matrix = self.matrices[role]
        weight = matrix.weight.float() if weight is None else weight
        return linear(inputs, weight, None if matrix.bias is None else matrix.bias.float())

    def mlp(self, inputs: Tensor, weights: Mapping[Role, Tensor]) -> Tensor:
        """Return what the MLP gives for float32 inputs [tokens, features], without the bias of its last linear.

        Args:
            inputs: of the MLP.
            weights: float32 [out, in] by role, instead of the model's: of all linears of the MLP.
        """
        outputs = {role: self.apply(role, inputs, weights[role]) for role in weights if role in READER_OF}
        if Role.FC1 in outputs:
            return self.activation(outputs[Role.FC1]) @ weights[Role.FC2].T
        return (self.activation(outputs[Role.GATE]) * outputs[Role.UP]) @ weights[Role.DOWN].T


@dataclass(frozen=True)
class LinearSite:
    """One weight matrix of a block."""

    name: str  # full name of its module; for a part of a fused linear or of an expert, followed by the role
    role: Role
    matrix: Matrix
    source: str  # name of its input; matrices with the same source read the same tensor
    unit: str  # the block, or the expert: what is pruned together


@dataclass(frozen=True)
class Decoder:
    """The decoder blocks of one model."""

    family: Family
    config: Any = field(repr=False)
    blocks: nn.ModuleList = field(repr=False)
    names: list[str] = field(repr=False)

    @property
    def size(self) -> int:
        """Number of weights in all matrices of the blocks, routers included, norms and biases not."""
        return sum(parameter.numel() for parameter in self.blocks.parameters() if parameter.ndim > 1)

    def sites(self, index: int, scope: str) -> Iterator[LinearSite]:
        """Yield the matrices of block ``index`` in ``scope``, by role, then by expert.

        Raises:
            UserError: the module of a role is missing or no linear.
        """
        name, experts, layout = self.names[index], self.experts(index), self.family.experts
        for role, location in self.family.locations.items():
            if role not in ROLES_IN_SCOPE[scope] or (experts is not None and role in GLU):
                continue
            module, path = self._linear(index, role, location.path), f"{name}.{location.path}"
            rows = location.rows(self.config) if location.rows else None
            transposed = isinstance(module, Conv1D)
            matrix = Matrix(module, module.weight, transposed=transposed, rows=rows)  # type: ignore[arg-type]
            yield LinearSite(path if rows is None else f"{path}.{role.value}", role, matrix, INPUT_OF[role], name)
        if experts is not None and layout is not None and ROLES_IN_SCOPE[scope] & GLU:
            yield from _expert_sites(f"{name}.{layout.path}", experts, layout)

    def units(self, index: int, scope: str) -> dict[str, Unit]:
        """Return what is pruned together in block ``index``, by name."""
        matrices: dict[str, dict[Role, Matrix]] = {}
        for site in self.sites(index, scope):
            matrices.setdefault(site.unit, {})[site.role] = site.matrix
        return {name: Unit(parts, self.config) for name, parts in matrices.items()}

    def attention(self, index: int) -> nn.Module | None:
        """Return the module of block ``index`` that holds its attention and nothing of its MLP; None without one."""
        parents = {role: location.path.rpartition(".")[0] for role, location in self.family.locations.items()}
        parent, *others = {path for role, path in parents.items() if role in ATTENTION}
        rest = [f"{path}." for role, path in parents.items() if role not in ATTENTION]
        if others or not parent or any(path.startswith(f"{parent}.") for path in rest):
            return None
        return _submodule(self.blocks[index], parent)  # None: some blocks of a hybrid model have no attention

    def experts(self, index: int) -> nn.Module | None:
        """Return the module that holds the experts of block ``index``; None for a block with a plain MLP."""
        layout = self.family.experts
        return None if layout is None else _submodule(self.blocks[index], layout.path)

    def _linear(self, index: int, role: Role, path: str) -> nn.Module:
        name, module = f"{self.names[index]}.{path}", _submodule(self.blocks[index], path)
        if module is None:
            raise UserError(f"role {role.value}: the model has no module {name}; set model.roles")
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise UserError(f"role {role.value}: {name} is a {type(module).__name__}; only a linear can be pruned")
        return module


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _expert_sites(path: str, module: nn.Module, layout: Experts) -> Iterator[LinearSite]:
    fused, down = getattr(module, layout.gate_up), getattr(module, layout.down)
    width = down.shape[-1]
    for expert in range(len(down)):
        unit = f"{path}.{expert}"
        matrices = {
            GATE: Matrix(module, fused, expert, rows=slice(0, width)),
            UP: Matrix(module, fused, expert, rows=slice(width, 2 * width)),
            DOWN: Matrix(module, down, expert),
        }
        for role, matrix in matrices.items():
            yield LinearSite(f"{unit}.{role.value}", role, matrix, f"expert {expert} {INPUT_OF[role]}", unit)


def decoder_of(model: nn.Module, roles: Mapping[str, str] | None = None) -> Decoder:
    """Find the decoder blocks of a causal language model.

    A model of an unknown family is treated as LLaMA, with a warning, if its modules have LLaMA's names.

    Raises:
        UserError: the family is unknown, or its blocks are not where the table says.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    model_type = str(getattr(config, "model_type", type(model).__name__))
    known = families.family_of(model_type, roles)
    family = known or families.ASSUMED
    blocks = _submodule(model, family.blocks)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        if known is None:
            raise families.unknown_family(model_type)
        path = family.blocks
        problem = f"the model has no blocks at {path}" if blocks is None else f"{path} is no list of decoder blocks"
        raise UserError(f"{problem}; set model.roles.blocks")
    decoder = Decoder(family, config, blocks, [f"{family.blocks}.{index}" for index in range(len(blocks))])
    if known is None:
        _check_assumption(decoder, model_type)
    return decoder


def _check_assumption(decoder: Decoder, model_type: str) -> None:
    try:
        for index in range(len(decoder.blocks)):
            list(decoder.sites(index, "all"))
    except UserError as error:
        raise families.unknown_family(model_type) from error
    log.warning(
        "model family %r is in no table: it is taken for a LLaMA, with blocks: %s, %s; its BOS as its tokenizer does",
        model_type,
        decoder.family.blocks,
        ", ".join(f"{role.value}: {location.path}" for role, location in decoder.family.locations.items()),
    )


@dataclass(frozen=True)
class Matrix:
    """A weight [out_features, in_features] inside a module."""

    module: nn.Module  # the module that receives the matrix's input
    parameter: Tensor  # the tensor that holds it, of one linear or of several
    expert: int | None = None  # index along the first of three dimensions; None for a tensor of two
    transposed: bool = False  # the tensor is [in_features, out_features] (GPT-2's Conv1D)
    rows: Rows | None = None  # its output features in a fused linear; None for all

    @classmethod
    def of(cls, linear: nn.Linear) -> Matrix:
        """Return the whole weight of a linear."""
        return cls(linear, linear.weight)

    @property
    def in_features(self) -> int:
        return self.parameter.shape[-2 if self.transposed else -1]

    @property
    def out_features(self) -> int:
        total = self.parameter.shape[-1 if self.transposed else -2]
        if isinstance(self.rows, slice):
            return len(range(total)[self.rows])
        return total if self.rows is None else len(self.rows)

    @property
    def weight(self) -> Tensor:
        """The weight, [out_features, in_features], in the model's dtype; not to be modified: it may be a copy."""
        whole = self._whole()
        return whole if self.rows is None else whole[self._index()]

    def zero(self, keep: Tensor) -> None:
        """Zero the weights where ``keep`` (bool [out, in]) is False; leave the others unchanged, bit for bit."""
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

    @property
    def bias(self) -> Tensor | None:
        """The bias of these output features, [out_features], sharing the model's memory if they are a slice."""
        whole = self._whole_bias()
        return whole if whole is None or self.rows is None else whole[self._index()]

    def reorder_outputs(self, order: Tensor) -> None:
        """Put the output features, with their bias, into another order: i becomes the former ``order[i]``."""
        self.write(self.weight[order])
        if (bias := self._whole_bias()) is not None:
            index = self._index()
            bias[index] = bias[index][order]

    def reorder_inputs(self, order: Tensor) -> None:
        """Put the input features into another order: j becomes the former ``order[j]``."""
        self.write(self.weight[:, order])

    def _whole_bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) and self.expert is None else None

    def _whole(self) -> Tensor:
        tensor = self.parameter.detach()  # shares the model's memory
        tensor = tensor if self.expert is None else tensor[self.expert]
        return tensor.T if self.transposed else tensor

    def _index(self) -> slice | Tensor:
        if self.rows is None:
            return slice(None)
        return self.rows if isinstance(self.rows, slice) else _index_on(tuple(self.rows), self.parameter.device)


@lru_cache(maxsize=16)
def _index_on(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Return an index on its device, to which it is copied once: a GPU would be waited for at each use."""
    return torch.tensor(rows, device=device)
