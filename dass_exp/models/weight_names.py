"""How a checkpoint holds a model: under which names, and in how many pieces each tensor lies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
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


@dataclass(frozen=True)
class JoinedTensors:
    """Stored tensors out of which transformers makes others: the experts of a mixture, one by one in the checkpoint and in one tensor in the model.

    Args:
        names: the model's own, of what is made.
        stored: of the pieces, in the order in which they are joined.
        patterns: of each piece, the part that it plays.
        first: the name that the converter knows the result by.
        converter: of transformers.
    """

    names: tuple[str, ...]
    stored: tuple[str, ...]
    patterns: tuple[str, ...]
    first: str
    converter: WeightConverter

    def made(self, pieces: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """The model's tensors out of the pieces, by the model's own names."""
        return _converted(
            self.converter,
            self.first,
            [(name, pattern, pieces[name]) for name, pattern in zip(self.stored, self.patterns, strict=True)],
            model,
        )


class WeightNames:
    """How one checkpoint holds the tensors of one model, as transformers translates between the two.

    Args:
        model: a transformers causal language model; on the meta device is enough.
        shards: of the checkpoint.
        dtype: that the model computes in; some models keep some tensors in float32 all the same.

    Raises:
        UserError: a tensor is not there, or is stored in a way that cannot be read a part at a time.
    """

    def __init__(self, model: Any, shards: Shards, dtype: torch.dtype) -> None:
        self._model, self._shards = model, shards
        self._dtypes = _dtypes(model, dtype)
        transforms, state = get_model_conversion_mapping(model), model.state_dict()
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._plain: dict[str, str] = {}
        self._shapes: dict[str, list[int]] = {}
        parts: dict[str, list[tuple[str, str]]] = {}
        for stored in sorted(shards.names, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
            if name in state and pattern is None:
                self._plain[name] = stored
                self._shapes[name] = shards.shape(stored)
            elif name in state:
                parts.setdefault(name, []).append((stored, str(pattern)))
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        self._joined = [self._group(name, pieces, by_pattern[pieces[0][1]]) for name, pieces in parts.items()]
        model._weight_conversions = [
            transform for transform in transforms if transform.was_used()
        ]  # what from_pretrained notes, for the way back
        self._check(state)

    @property
    def names(self) -> set[str]:
        """The model's own names of all tensors that the checkpoint holds; of tied ones it holds one."""
        return {*self._plain, *(name for group in self._joined for name in group.names)}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors of the model, by its own names, in memory of their own and the dtype that transformers would load them in.

        Raises:
            UserError: a file is missing or damaged; the message names it.
        """
        wanted, found = set(names), dict[str, Tensor]()
        for dtype in {self._dtypes[name] for name in wanted if name in self._plain}:
            plain = {name: self._plain[name] for name in wanted if self._dtypes[name] == dtype and name in self._plain}
            read = self._shards.read(plain.values(), dtype)
            found |= {name: read[stored] for name, stored in plain.items()}
            del read
        for group in self._joined:  # one after the other: pieces and what is made of them are in memory together
            if wanted.intersection(group.names):
                found |= group.made(self._shards.read(group.stored, self._dtypes[group.names[0]]), self._model)
        return found

    def stored(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the model as the checkpoint holds them, by the names there."""
        made = {name for group in self._joined for name in group.names}
        found = {self._plain[name]: tensor for name, tensor in weights.items() if name in self._plain}
        return found | (
            revert_weight_conversion(self._model, {name: weights[name] for name in weights if name in made})
            if made
            else {}
        )

    def _group(self, first: str, pieces: list[tuple[str, str]], converter: WeightConverter) -> JoinedTensors:
        """Which tensors come of these pieces is tried on their shapes."""
        shapes = [
            (stored, pattern, torch.empty(self._shards.shape(stored), device="meta")) for stored, pattern in pieces
        ]
        try:
            made = _converted(converter, first, shapes, self._model)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise UserError(
                f"model.placement=stream: the checkpoint {self._shards.folder} holds {first} in pieces that do not fit together "
                f"({' '.join(str(error).split())}); set model.placement=resident"
            ) from error
        self._shapes |= {name: list(tensor.shape) for name, tensor in made.items()}
        return JoinedTensors(
            tuple(made),
            tuple(stored for stored, _ in pieces),
            tuple(pattern for _, pattern in pieces),
            first,
            converter,
        )

    def _check(self, state: Mapping[str, Tensor]) -> None:
        tied, held = getattr(self._model, "all_tied_weights_keys", {}), self.names
        refused, told = f"model.placement=stream: the checkpoint {self._shards.folder}", "set model.placement=resident"
        if getattr(self._model.config, "quantization_config", None) is not None or self._shards.quantised:
            raise UserError(f"{refused} is quantised, which only transformers itself can undo; {told}")
        for name in [name for name in tied if name in held and tied[name] in held]:
            if not self._shards.equal(self._plain[name], self._plain[tied[name]]):
                raise UserError(
                    f"{refused} stores {name} with other values than those of {tied[name]}, to which it is tied; {told}"
                )
            del self._plain[name]  # stored twice
        if missing := [name for name in state if name not in held and name not in tied]:
            raise UserError(f"{refused} has no tensor {missing[0]} as the model has it; {told}")
        for name, shape in self._shapes.items():
            if shape != list(state[name].shape):
                raise UserError(
                    f"{refused} gives {name} the shape {shape}, and its config.json {list(state[name].shape)}; fetch it again"
                )


def _dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Of each tensor of a model, as transformers loads it."""
    plan = {re.compile(part.replace("*", ".*")): kind for part, kind in model._get_dtype_plan(dtype).items()}
    return {
        name: next((kind for part, kind in plan.items() if part.search(name)), tensor.dtype)
        for name, tensor in model.state_dict().items()
    }


def _converted(
    converter: WeightConverter, first: str, pieces: Iterable[tuple[str, str, Tensor]], model: Any
) -> dict[str, Tensor]:
    fresh = deepcopy(converter)  # it collects what it is given
    for stored, pattern, tensor in pieces:
        fresh.add_tensor(first, stored, pattern, tensor)  # type: ignore[arg-type]  # it takes tensors too, as it does on the way back
    made = fresh.convert(first, model=model, config=model.config)
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}
