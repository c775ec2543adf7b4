"""Load a model and its tokenizer; say exactly which model it is."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from dass_exp import assets, tiny
from dass_exp.decoder import decoder_of
from dass_exp.digest import folder_digest
from dass_exp.errors import UserError, one_of
from dass_exp.families import BOS_POLICIES, Family, family_of

OFFLINE = "offline:"  # a path that starts so names one of the models of assets.py
TINY = "tiny:"  # and one that starts so, one of tiny.py

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NEEDS_LICENCE = {"gemma3_270m": "the Gemma Terms of Use (https://ai.google.dev/gemma/terms)"}
_NOTES = {"smollm2_135m": "dequantised from 4-bit weights (GGUF Q4_1)", "gemma3_270m": "dequantised from 4-bit weights (GGUF Q4_K_M)"}


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
        settings: the ``model`` group of a run (:class:`dass_exp.config.ModelConfig`).

    Raises:
        UserError: no such model, no access to it, no network, an unaccepted licence, an unknown dtype or device.
    """
    device = _device(settings.device)
    one_of("model.dtype", settings.dtype, ("auto", *_DTYPES))
    one_of("model.bos", settings.bos, ("auto", *BOS_POLICIES))
    found = _found(settings)
    spec = ModelSpec(
        **found, name=settings.name, dtype=_dtype(settings.dtype, found["config"], device), device=device,
        roles=settings.roles, trust_remote_code=bool(settings.trust_remote_code),
    )  # fmt: skip
    if spec.family is None:
        decoder_of(skeleton(spec))  # what cannot be taken for a LLaMA is said before anything is loaded
    return spec


def load_tokenizer(spec: ModelSpec) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: it cannot be loaded.
    """
    with _quiet(), _explained(spec.source):
        return transformers.AutoTokenizer.from_pretrained(spec.source, revision=spec.revision, trust_remote_code=spec.trust_remote_code)


def load_model(spec: ModelSpec) -> nn.Module:
    """The model on its device, in evaluation mode. Only safetensors are read.

    Raises:
        UserError: it cannot be loaded.
    """
    with _quiet(), _explained(spec.source):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            spec.source, revision=spec.revision, trust_remote_code=spec.trust_remote_code, dtype=spec.dtype, use_safetensors=True
        )
    return model.to(spec.device).eval()


def skeleton(spec: ModelSpec) -> nn.Module:
    """The model on the meta device: its modules and shapes, no weights. For checks that must come before loading."""
    with _quiet(), _explained(spec.source), torch.device("meta"):
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
            setting = "stream" if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else "never"
    if setting != "never" and tokenizer.bos_token_id is None:
        raise UserError(f"model.bos={setting}: this tokenizer has no beginning-of-sequence token; set model.bos=never")
    return setting


def _found(settings: Any) -> dict[str, Any]:
    """Where the model lies and what it is: source, identity, config, revision, note and trained of a :class:`ModelSpec`."""
    path, trust = str(settings.path), bool(settings.trust_remote_code)
    if settings.training_seed is not None and not path.startswith(TINY):
        raise UserError(f"model.training_seed={settings.training_seed}: only the models of `make tiny-models` were trained more than once; leave it null")
    if path.startswith(TINY):
        recipe = tiny.trained(path.removeprefix(TINY), settings.training_seed)
        told = {"recipe": f"{path}@{recipe.digest}", "seed": recipe.training_seed}
        identity = f"{path}@{folder_digest(recipe.folder)}"
        return {**_local(recipe.folder, trust=False), "identity": identity, "note": "trained from scratch by make tiny-models", "trained": told}
    if path.startswith(OFFLINE):
        name = path.removeprefix(OFFLINE)
        folder = _offline(name, bool(settings.accept_license))
        return {**_local(folder, trust=False), "identity": f"{path}@{assets.MODELS[name].sha256[:16]}", "note": _NOTES[name]}
    if Path(path).is_dir():
        return {**_local(Path(path), trust), "identity": f"local:{folder_digest(Path(path))}"}
    if path.startswith(("/", ".", "~")):
        raise UserError(f"model.path={path}: there is no such folder; give a folder, a hub id such as meta-llama/Llama-2-7b-hf, or {OFFLINE}smollm2_135m")
    config = _config(path, settings.revision, trust)
    if (revision := getattr(config, "_commit_hash", None)) is None:
        raise UserError(f"model.path={path}: its commit cannot be told, so its results could not be told apart; download it and give the folder")
    return {"source": path, "revision": revision, "config": config, "identity": f"{path}@{revision}", "note": ""}


def _local(folder: Path, trust: bool) -> dict[str, Any]:
    return {"source": str(folder), "revision": None, "config": _config(str(folder), None, trust), "note": ""}


def _offline(name: str, accepted: bool) -> Path:
    if name not in assets.MODELS:
        raise UserError(f"model.path={OFFLINE}{name}: the offline models are {', '.join(assets.MODELS)}")
    if name in _NEEDS_LICENCE and not accepted:
        raise UserError(f"model {name}: read {_NEEDS_LICENCE[name]}; if you accept them, set model.accept_license=true")
    return assets.converted(name, convert_gguf)


def convert_gguf(source: Path, folder: Path) -> None:
    """Turn a GGUF file into safetensors and tokenizer files, dequantised to float32, each weight as the file holds it."""
    with _quiet():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        # transformers refuses to save a model that it believes to be quantised
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _config(source: str, revision: str | None, trust: bool) -> Any:
    with _quiet(), _explained(source):
        return transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust)


def _device(setting: str) -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if setting == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(setting)
    except RuntimeError as error:
        raise UserError(f"model.device={setting!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type != "cpu" and (accelerator is None or accelerator.type != device.type):
        raise UserError(f"model.device={setting!r}: this machine has {accelerator.type if accelerator else 'no accelerator'}; set model.device=auto")
    return device


def _dtype(setting: str, config: Any, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on a CPU, so that numbers do not depend on the processor; elsewhere what the checkpoint says."""
    if setting != "auto":
        return _DTYPES[setting]
    if device.type == "cpu":
        return torch.float32
    stored = getattr(config.get_text_config(), "dtype", None)
    return stored if isinstance(stored, torch.dtype) and stored.is_floating_point else torch.float16


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress bars, advice and retries of transformers and the hub off the screen while it is open."""
    log, hub = transformers.utils.logging, logging.getLogger("huggingface_hub")
    verbosity, hub_level, bars = log.get_verbosity(), hub.level, log.is_progress_bar_enabled()
    log.set_verbosity_error()
    hub.setLevel(logging.ERROR)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if bars:
            log.enable_progress_bar()


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn what transformers and the hub raise for a model that cannot be had into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"model.path={source}: it cannot be loaded. Check the name, log in with `hf auth login` if it is gated, and check the network; "
            f"model=smollm2_135m needs no hub. ({reason[:300]})"
        ) from error
