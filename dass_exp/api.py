"""The Python interface: load, prune and score without Hydra."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dass_exp.config.components import build, choice
from dass_exp.config.settings import STAGE_GROUPS, ModelConfig
from dass_exp.data import assets
from dass_exp.engine.callbacks import BlockReport, Callback
from dass_exp.engine.prune import EngineOptions, prune_model
from dass_exp.engine.stages import Stages, build_stages
from dass_exp.engine.verify import Layer, Verification
from dass_exp.errors import UserError, one_of, whole_number
from dass_exp.evaluate.perplexity import perplexity as score
from dass_exp.masks import NM, Pattern, TransposableNM, Unstructured
from dass_exp.methods.base import Pruner
from dass_exp.models.load import identify, load_model, load_tokenizer
from dass_exp.models.locate import OFFLINE
from dass_exp.storage.mask_file import PackedMask, load_masks

__all__ = ["Pruned", "load", "load_masks", "perplexity", "prune"]


@dataclass(frozen=True)
class Pruned:
    """The masks of a model pruned by :func:`prune`, and what was verified.

    Args:
        masks: bool [out_features, in_features] by name of the linear, True where the weight is kept; they are kept
            on the CPU, one bit a weight, and unpacked when they are read.
        layers: one verified entry per linear: zeros, axis, excess, score range, error of its block.
    """

    masks: Mapping[str, Tensor]
    layers: list[Layer]

    def __repr__(self) -> str:
        return f"<Pruned: {len(self.layers)} linears, {100 * self.sparsity:.1f} % zeros>"

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over the pruned linears."""
        size = sum(layer.size for layer in self.layers)
        return sum(layer.zeros for layer in self.layers) / size if size else 0.0


def load(path: str = "offline:smollm2_135m", **settings: Any) -> tuple[nn.Module, Any]:
    """Load a causal language model and its tokenizer; the model is in evaluation mode.

    Args:
        path: hub id, folder, or an offline model: ``smollm2_135m`` or ``gemma3_270m``.
        settings: other fields of :class:`dass_exp.config.settings.ModelConfig`, such as revision, dtype and device.

    Raises:
        UserError: the model cannot be found or loaded.
    """
    path = OFFLINE + path if path in assets.MODELS else path
    spec = identify(ModelConfig(name=path.rsplit("/", 1)[-1], path=path, **settings))
    return load_model(spec), load_tokenizer(spec)


def prune(
    model: nn.Module,
    tokens: Tensor | None = None,
    method: Pruner | type[Pruner] | str | Mapping[str, Any] = "dass",
    pattern: Pattern | str | float = "2:4",
    scope: str = "mlp",
    batch_size: int = 4,
    roles: Mapping[str, str] | None = None,
) -> Pruned:
    """Prune a causal language model in place, and verify the result.

    Args:
        model: a transformers causal language model of a known family.
        tokens: int64 [sequences, tokens], calibration; magnitude and dense need none.
        method: a name of conf/method such as dass or sparsegpt, a class, or an instance such as ``Dass(alpha=0.25)``;
            or method and stages by config group, ``{"method": "dass", "repair": "least_squares"}``.
        pattern: ``2:4``, ``4:8``, any ``n:m`` (n kept), ``2:4 transposable``, ``50%``, 0.5, or an instance.
        scope: mlp, attention or all.
        batch_size: sequences that pass through a block together; on a CPU it changes no number.
        roles: for a family that the table does not know: ``blocks``, and the path of each role's linear inside a block.

    Raises:
        UserError: a setting does not fit the model.
        NumericalError, VerificationError: the method failed in the named layer.
    """
    (chosen, stages), shape = _method_and_stages(method), pattern_of(pattern)
    if tokens is not None:
        _check_tokens(model, tokens)
        _check_length(model, tokens)
    if not chosen.prunes:
        return Pruned({}, [])
    verification, masks = Verification(), _CollectMasks()
    options = EngineOptions(scope=scope, batch_size=batch_size, roles=roles, stages=stages)
    prune_model(model, tokens, chosen, shape, options, [verification, masks])
    return Pruned(masks, verification.layers)


class _CollectMasks(Callback, Mapping[str, Tensor]):
    """Keep the masks of all blocks, packed; a mapping that unpacks the one that is read."""

    def __init__(self) -> None:
        self._packed: dict[str, PackedMask] = {}

    def on_block_end(self, report: BlockReport) -> None:
        self._packed.update({name: PackedMask.pack(result.keep) for name, result in report.results.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._packed[name].unpack()

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __repr__(self) -> str:
        return f"<masks of {len(self)} linears>"


def perplexity(model: nn.Module, tokens: Tensor, context: int | None = None, batch_size: int = 4) -> float:
    """Compute perplexity over consecutive windows, each scored on its own; an incomplete last window is dropped.

    Args:
        model: a transformers causal language model.
        tokens: int64 [tokens], a stream that is cut into windows of ``context``; or [windows, tokens].
        context: tokens of a window, needed for a stream.
        batch_size: windows that pass through the model together.

    Raises:
        UserError: the stream is shorter than one window, or no context was given for it.
    """
    _check_tokens(model, tokens)
    whole_number("batch_size", batch_size, least=1)
    if context is not None:
        whole_number("context", context, least=2)
        stream = tokens.reshape(-1)
        count = len(stream) // context
        if not count:
            raise UserError(f"context={context}: expected at least 2 and at most the {len(stream)} tokens given")
        tokens = stream[: count * context].view(count, context)
    _check_length(model, tokens)
    return score(model, tokens, batch_size).value


def _check_tokens(model: Any, tokens: Any) -> None:
    """Raise a UserError unless ``tokens`` holds ids of the model's vocabulary."""
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == bool:
        kind = f"{type(tokens).__name__} {getattr(tokens, 'dtype', '')}".strip()
        raise UserError(f"tokens: expected a tensor of token ids, got {kind}")
    size = model.get_input_embeddings().weight.shape[0]
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        raise UserError(f"tokens: ids from {int(tokens.min())} to {int(tokens.max())}; the vocabulary has {size}")


def _check_length(model: Any, tokens: Tensor) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens.ndim and tokens.shape[-1] > limit:
        raise UserError(f"tokens: sequences of {tokens.shape[-1]}; this model has {limit} positions")


def method_of(method: Pruner | type[Pruner] | str) -> Pruner:
    """Build a method from the name of its file in conf/method, or from its class, with its defaults.

    An instance is returned unchanged.

    Raises:
        UserError: the name is unknown.
    """
    if isinstance(method, Pruner):
        return method
    if isinstance(method, type):
        if not issubclass(method, Pruner):
            raise UserError(f"method={method.__name__}: expected a subclass of dass_exp.methods.base.Pruner")
        return method()
    return build(choice("method", method), Pruner, "method")


def _method_and_stages(chosen: Pruner | type[Pruner] | str | Mapping[str, Any]) -> tuple[Pruner, Stages]:
    """Build a method and the stages around it from names or instances, by config group."""
    parts = dict(chosen) if isinstance(chosen, Mapping) else {"method": chosen}
    for group in parts:
        one_of("method", group, ("method", *STAGE_GROUPS))
    method = method_of(parts.pop("method", "dass"))
    return method, build_stages(
        {group: choice(group, part) if isinstance(part, str) else part for group, part in parts.items()}
    )


def pattern_of(pattern: Pattern | str | float) -> Pattern:
    """Build a pattern from ``2:4``, ``2of4``, ``50%``, 0.5 or ``unstructured``; return an instance unchanged.

    Raises:
        UserError: the text describes no pattern.
    """
    if isinstance(pattern, Pattern):
        return pattern
    if isinstance(pattern, float):
        return Unstructured(pattern)
    text = str(pattern).replace("of", ":")
    try:
        if text == "unstructured":
            return Unstructured()
        if text.endswith("%"):
            return Unstructured(float(text[:-1]) / 100)
        kept, group = map(int, text.removesuffix("transposable").rstrip("_ ").split(":"))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"pattern={pattern!r}: expected 2:4, 4:8, any n:m, 50%, or an instance of a Pattern") from error
    return (TransposableNM if text.endswith("transposable") else NM)(kept, group)
