"""Load a model and its tokenizer; say exactly which model it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from dass_exp.errors import UserError, one_of
from dass_exp.models.decoder import decoder_of
from dass_exp.models.families import BOS_POLICIES, Family, family_of
from dass_exp.models.locate import explained, folder_of, locate, quiet
from dass_exp.models.shards import Shards
from dass_exp.models.streamed import StreamedBlocks, empty_model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSpec:
    """A model that was found and identified; its weights are not in memory yet.

    Args:
        name: for tables.
        source: hub id or folder.
        revision: resolved commit of a hub model.
        identity: what its weights are, wherever they lie: hub id and commit, or a digest.
        config: of transformers.
        dtype, device: resolved.
        note: what a reader of its numbers must know, or an empty string.
        trained: for a model that was trained several times: ``recipe``, equal for all of them, and ``seed`` of this training; else empty.
    """

    name: str
    source: str
    revision: str | None
    identity: str
    config: Any = field(repr=False)
    dtype: torch.dtype
    device: torch.device
    roles: Mapping[str, str] | None
    trust_remote_code: bool
    note: str
    trained: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> Family | None:
        """The roles of its modules; None if its family is in no table."""
        return family_of(self.config.get_text_config().model_type, self.roles)

    @property
    def positions(self) -> int | None:
        """The longest sequence that its position embedding allows, None where its config says nothing."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def dtype_name(self) -> str:
        """``float32``, ``bfloat16`` or ``float16``."""
        return str(self.dtype).removeprefix("torch.")


def identify(settings: Any) -> ModelSpec:
    """Find the model, fetch its config, and fix its identity, dtype and device; no weight is loaded.

    Args:
        settings: the ``model`` group of a run (:class:`dass_exp.config.settings.ModelConfig`).

    Raises:
        UserError: no such model, no access to it, no network, an unaccepted licence, an unknown dtype or device.
    """
    device = _device(settings.device)
    one_of("model.dtype", settings.dtype, ("auto", *_DTYPES))
    one_of("model.bos", settings.bos, ("auto", *BOS_POLICIES))
    one_of("model.placement", settings.placement, ("auto", "resident", "stream"))
    found = locate(settings)
    spec = ModelSpec(
        **found,
        name=settings.name,
        dtype=_dtype(settings.dtype, found["config"], device),
        device=device,
        roles=settings.roles,
        trust_remote_code=bool(settings.trust_remote_code),
    )
    if spec.family is None:
        decoder_of(skeleton(spec))  # what cannot be taken for a LLaMA is said before anything is loaded
    return spec


def load_tokenizer(spec: ModelSpec) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: it cannot be loaded.
    """
    with quiet(), explained(spec.source):
        return transformers.AutoTokenizer.from_pretrained(
            spec.source, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )


def load_model(spec: ModelSpec) -> nn.Module:
    """The model on its device, in evaluation mode. Only safetensors are read.

    Raises:
        UserError: it cannot be loaded.
    """
    with quiet(), explained(spec.source):
        if Path(spec.source).is_dir():
            Shards(Path(spec.source))  # what is missing or damaged is named: transformers fails in many ways
        try:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                spec.source,
                revision=spec.revision,
                trust_remote_code=spec.trust_remote_code,
                dtype=spec.dtype,
                use_safetensors=True,
                output_loading_info=True,
            )
        except RuntimeError as error:
            raise UserError(
                f"model.path={spec.source}: its weights do not fit its config.json ({' '.join(str(error).split())[:300]}); fetch it again"
            ) from error
        model, told = loaded
        if missing := sorted(told["missing_keys"]):  # transformers would make them up
            raise UserError(
                f"model.path={spec.source}: its checkpoint has no {missing[0]} ({len(missing)} tensors are missing); fetch it again"
            )
    return model.to(spec.device).eval()


def load_streamed(spec: ModelSpec) -> tuple[nn.Module, StreamedBlocks]:
    """The model without its blocks, and where those come from, one after the other.

    Raises:
        UserError: a file of it is missing or damaged, or it is stored otherwise than the model holds it.
    """
    with quiet(), explained(spec.source):
        shards = Shards(folder_of(spec.source, spec.revision))

        def build() -> Any:
            return transformers.AutoModelForCausalLM.from_config(
                spec.config, dtype=spec.dtype, trust_remote_code=spec.trust_remote_code
            )

        model, layout = empty_model(build, shards, spec.device, spec.dtype, spec.roles)
        if (shards.folder / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(shards.folder)
    return model, StreamedBlocks(model, layout, spec.device, roles=spec.roles)


def skeleton(spec: ModelSpec) -> nn.Module:
    """The model on the meta device: its modules and shapes, no weights. For checks that must come before loading."""
    with quiet(), explained(spec.source), torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(spec.config, trust_remote_code=spec.trust_remote_code)


def bos_policy(setting: str, spec: ModelSpec, tokenizer: Any) -> str:
    """Where the beginning-of-sequence token stands: ``never``, ``stream`` (once at the head of a text) or ``window``.

    ``auto`` is the family's policy: ``window`` for Gemma; for the others ``stream`` if the tokenizer adds the token by itself, else ``never``.

    Raises:
        UserError: the policy asks for a token that the tokenizer does not have.
    """
    if setting == "auto":
        if spec.family is not None and spec.family.bos == "window":
            setting = "window"
        else:
            ids = tokenizer("a")["input_ids"]
            setting = (
                "stream" if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else "never"
            )
    if setting != "never" and tokenizer.bos_token_id is None:
        raise UserError(f"model.bos={setting}: this tokenizer has no beginning-of-sequence token; set model.bos=never")
    return setting


def _device(setting: str) -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if setting == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(setting)
    except RuntimeError as error:
        raise UserError(f"model.device={setting!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type != "cpu" and (accelerator is None or accelerator.type != device.type):
        raise UserError(
            f"model.device={setting!r}: this machine has {accelerator.type if accelerator else 'no accelerator'}; set model.device=auto"
        )
    return device


def _dtype(setting: str, config: Any, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on a CPU, so that numbers do not depend on the processor; elsewhere what the checkpoint says."""
    if setting != "auto":
        return _DTYPES[setting]
    if device.type == "cpu":
        return torch.float32
    stored = getattr(config.get_text_config(), "dtype", None)
    return stored if isinstance(stored, torch.dtype) and stored.is_floating_point else torch.float16
