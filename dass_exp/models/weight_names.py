"""Translate between the tensors of a model and those of its checkpoint: other names, and fused tensors in pieces."""

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from dass_exp.errors import UserError
from dass_exp.models.shards import Shards

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
# scales, zero points and packed integers, as the formats of quantised checkpoints name them beside a weight
_OF_QUANTISED = re.compile(r"(.+)\.(?:SCB|scales|qweight|qzeros|g_idx|input_scale|weight[_.].+)")


@dataclass(frozen=True)
class JoinedTensors:
    """Stored tensors that transformers fuses, such as experts: several in the checkpoint, one tensor in the model."""

    first: str  # name of the result in the converter
    pieces: dict[str, str]  # by stored name, in the order in which they are joined: the pattern that each matches
    converter: WeightConverter
    names: tuple[str, ...] = ()  # of the fused tensors in the model

    def join(self, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """Fuse the pieces, by stored name, into the model's tensors, by the model's names."""
        converter = deepcopy(self.converter)  # it keeps what is added
        for stored, pattern in self.pieces.items():
            converter.add_tensor(self.first, stored, pattern, tensors[stored])  # type: ignore[arg-type]
        joined = converter.convert(self.first, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in joined.items()}


class WeightNames:
    """How one checkpoint stores the tensors of one model, as transformers translates between the two.

    Args:
        model: a transformers causal language model; the meta device is enough.
        shards: of the checkpoint.
        dtype: in which the model computes; some models keep some tensors in float32 regardless.

    Raises:
        UserError: a tensor is missing, a file is damaged, or the checkpoint cannot be read in parts.
    """

    def __init__(self, model: Any, shards: Shards, dtype: torch.dtype) -> None:
        self._model, self._shards = model, shards
        self._dtypes = _dtypes(model, dtype)
        transforms, state = get_model_conversion_mapping(model), model.state_dict()
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._plain: dict[str, str] = {}
        self._shapes: dict[str, list[int]] = {}
        fused: dict[str, dict[str, str]] = {}
        for stored, name, pattern in _renamed(model, shards, transforms, state):
            if name in state and pattern is None:
                self._plain[name] = stored
                self._shapes[name] = shards.shape(stored)
            elif name in state:
                fused.setdefault(name, {})[stored] = str(pattern)
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        self._joined = [self._group(name, pieces, by_pattern) for name, pieces in fused.items()]
        # what from_pretrained notes too, for revert_weight_conversion
        model._weight_conversions = [transform for transform in transforms if transform.was_used()]
        self._check(state)

    @property
    def names(self) -> set[str]:
        """The model's names of all tensors in the checkpoint, which holds one of several tied ones."""
        return {*self._plain, *(name for group in self._joined for name in group.names)}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors by the model's names, in the dtype in which transformers would load them."""
        wanted, tensors = set(names), dict[str, Tensor]()
        for dtype in {self._dtypes[name] for name in wanted if name in self._plain}:
            plain = {name: self._plain[name] for name in wanted if self._dtypes[name] == dtype and name in self._plain}
            by_stored_name = self._shards.read(plain.values(), dtype)
            tensors |= {name: by_stored_name[stored] for name, stored in plain.items()}
            del by_stored_name
        for group in self._joined:  # one after the other: pieces and fused tensors are in memory together
            if wanted.intersection(group.names):
                tensors |= group.join(self._shards.read(group.pieces, self._dtypes[group.names[0]]), self._model)
        return tensors

    def to_checkpoint(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert tensors of the model, by the model's names, to those that the checkpoint stores, by its names."""
        plain = {self._plain[name]: tensor for name, tensor in weights.items() if name in self._plain}
        names = {name for group in self._joined for name in group.names}
        joined = {name: tensor for name, tensor in weights.items() if name in names}
        return plain | revert_weight_conversion(self._model, joined) if names else plain

    def _group(self, first: str, pieces: dict[str, str], by_pattern: Mapping[str, WeightConverter]) -> JoinedTensors:
        """Convert empty tensors of the pieces' shapes to see which tensors result."""
        group = JoinedTensors(first, pieces, by_pattern[next(iter(pieces.values()))])
        empty = {stored: torch.empty(self._shards.shape(stored), device="meta") for stored in pieces}
        try:
            joined = group.join(empty, self._model)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise UserError(
                f"model.placement=stream: the checkpoint {self._shards.folder} holds {first} in pieces that do not fit "
                f"together ({' '.join(str(error).split())}); set model.placement=resident"
            ) from error
        self._shapes |= {name: list(tensor.shape) for name, tensor in joined.items()}
        return replace(group, names=tuple(joined))

    def _check(self, state: Mapping[str, Tensor]) -> None:
        checkpoint = f"model.placement=stream: the checkpoint {self._shards.folder}"
        advice = "set model.placement=resident"
        if getattr(self._model.config, "quantization_config", None) is not None:
            raise UserError(f"{checkpoint} is quantised, which only transformers itself can undo; {advice}")
        tied, names = getattr(self._model, "all_tied_weights_keys", {}), self.names
        for name in [name for name in tied if name in names and tied[name] in names]:
            other = tied[name]
            if not self._shards.equal(self._plain[name], self._plain[other]):
                problem = f"stores {name} with other values than those of {other}, to which it is tied"
                raise UserError(f"{checkpoint} {problem}; {advice}")
            del self._plain[name]  # stored twice
        if missing := [name for name in state if name not in names and name not in tied]:
            raise UserError(f"{checkpoint} has no tensor {missing[0]} as the model has it; {advice}")
        for name, shape in self._shapes.items():
            if shape != (expected := list(state[name].shape)):
                problem = f"gives {name} the shape {shape}, and its config.json {expected}"
                raise UserError(f"{checkpoint} {problem}; fetch it again")


def check_unquantised(model: Any, shards: Shards) -> None:
    """Raise a UserError if a checkpoint that is read as it is stores weights as other than plain floats.

    Args:
        model: its modules and shapes; the meta device is enough.
        shards: of its checkpoint.
    """
    state = model.state_dict()
    for stored, name, _ in _renamed(model, shards, get_model_conversion_mapping(model), state):
        scale, dtype = _OF_QUANTISED.fullmatch(name), shards.dtype(stored)
        if name in state and state[name].is_floating_point() and dtype not in _FLOATS:
            problem = f"its tensor {stored} is stored as {dtype}"
        elif name not in state and scale is not None and f"{scale[1]}.weight" in state:
            problem = f"it holds {stored}, which belongs to a quantised weight"
        else:
            continue
        raise UserError(
            f"model.path={shards.folder}: {problem}, and its config.json has no quantization_config that can be used; "
            "take a checkpoint in float32, bfloat16 or float16"
        )


def _renamed(
    model: Any, shards: Shards, transforms: list[Any], state: dict[str, Tensor]
) -> Iterator[tuple[str, str, str | None]]:
    """Yield each stored name, the model's name of its tensor, and the pattern of the converter that fuses it."""
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    for stored in sorted(shards.names, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        yield stored, name, pattern


def _dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype in which transformers loads each tensor."""
    plan = {re.compile(part.replace("*", ".*")): kind for part, kind in model._get_dtype_plan(dtype).items()}
    return {
        name: next((kind for part, kind in plan.items() if part.search(name)), tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
