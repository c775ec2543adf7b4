"""Identify a model, and load it and its tokenizer."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils.hub import cached_file

from dass_exp.config.settings import ModelConfig
from dass_exp.errors import UserError
from dass_exp.models.decoder import decoder_of
from dass_exp.models.families import Family, family_of
from dass_exp.models.locate import ModelSource, files_of, locate, quiet_libraries, readable_errors
from dass_exp.models.shards import INDEX, SINGLE, Shards
from dass_exp.models.streamed import StreamedBlocks, empty_model
from dass_exp.models.weight_names import check_unquantised


@dataclass(frozen=True, kw_only=True)
class ModelSpec(ModelSource):
    """An identified model whose weights are not in memory yet."""

    name: str  # for tables
    dtype: torch.dtype  # resolved, like the device: never auto
    device: torch.device
    roles: Mapping[str, str] | None  # of a family that the table does not know
    trust_remote_code: bool  # allow transformers to run code from the model's repository

    @property
    def family(self) -> Family | None:
        """The roles of its modules; None for an unknown family."""
        return family_of(self.config.get_text_config().model_type, self.roles)

    @property
    def positions(self) -> int | None:
        """Maximum sequence length of its position embedding; None if its config does not say."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def vocabulary(self) -> int:
        """Number of tokens in its embedding."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def hub_options(self) -> dict[str, Any]:
        """Keyword arguments for ``from_pretrained``."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @property
    def dtype_name(self) -> str:
        """``float32``, ``bfloat16`` or ``float16``."""
        return str(self.dtype).removeprefix("torch.")


def identify(config: ModelConfig, planning: bool = False) -> ModelSpec:
    """Find the model, fetch its config, and resolve identity, dtype and device; no weight is loaded.

    Args:
        config: names the model.
        planning: whether the device may be missing here: a login node has no GPU.

    Raises:
        UserError: no such model, no access to it, no network, an unaccepted licence, an unknown dtype or device.
    """
    device = _device(config.device, planning)
    source = locate(config)
    spec = ModelSpec(
        **vars(source),
        name=config.name,
        dtype=_dtype(config.dtype, source.config, device),
        device=device,
        roles=config.roles,
        trust_remote_code=bool(config.trust_remote_code),
    )
    if spec.family is None:
        decoder_of(skeleton(spec))  # raises before anything is loaded if it does not look like LLaMA
    return spec


def load_tokenizer(spec: ModelSpec) -> Any:
    """Load the model's tokenizer, or raise a UserError."""
    with quiet_libraries(), readable_errors(spec.source):
        return transformers.AutoTokenizer.from_pretrained(spec.source, **spec.hub_options)


def load_model(spec: ModelSpec) -> nn.Module:
    """Load the model from safetensors onto its device, in evaluation mode, or raise a UserError."""
    with quiet_libraries(), readable_errors(spec.source):
        if Path(spec.source).is_dir():
            check_weights(spec, skeleton(spec))  # names a missing or damaged file; transformers fails in many ways
        try:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                spec.source, **spec.hub_options, dtype=spec.dtype, use_safetensors=True, output_loading_info=True
            )
        except RuntimeError as error:
            problem = f"its weights do not fit its config.json ({' '.join(str(error).split())[:300]})"
            raise UserError(f"model.path={spec.source}: {problem}; fetch it again") from error
        model, loading_info = loaded
        if missing := sorted(loading_info["missing_keys"]):  # transformers would initialise them at random
            tensors = f"{missing[0]} ({len(missing)} tensors are missing)"
            raise UserError(f"model.path={spec.source}: its checkpoint has no {tensors}; fetch it again")
        if getattr(model, "hf_quantizer", None) is None:  # transformers ignores a quantisation that it does not know
            _check_numbers(spec, model)
    model.config.return_dict = True  # whatever its file says: outputs are read by name
    _check_finite(model, spec)
    return model.to(spec.device).eval()


def load_streamed(spec: ModelSpec) -> tuple[nn.Module, StreamedBlocks]:
    """Load the model without its blocks, and a loader that reads those one by one, or raise a UserError."""
    build = functools.partial(_from_config, spec, dtype=spec.dtype)
    with quiet_libraries(), readable_errors(spec.source):
        shards = Shards(files_of(spec.source, spec.revision))
        if getattr(spec.config, "quantization_config", None) is None:  # else refused in other words
            check_unquantised(skeleton(spec), shards)
        model, weight_names = empty_model(build, shards, spec.device, spec.dtype, spec.roles)
        if (shards.folder / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(shards.folder)
    model.config.return_dict = True
    _check_finite(model, spec)
    return model, StreamedBlocks(model, weight_names, spec.device, roles=spec.roles)


def skeleton(spec: ModelSpec) -> nn.Module:
    """Build the model on the meta device: its modules and shapes without weights, for checks before loading."""
    with quiet_libraries(), readable_errors(spec.source):
        if spec.config.get_text_config().hidden_size < 1:
            raise UserError(f"model.path={spec.source}: its config.json says that hidden_size is 0; fetch it again")
        if Path(spec.source).is_dir():
            layers, stored = spec.config.get_text_config().num_hidden_layers, len(Shards(Path(spec.source)).names)
            if not 0 < layers <= stored:  # building millions of them would take all memory
                problem = f"its config.json says {layers} layers, and its checkpoint holds {stored} tensors"
                raise UserError(f"model.path={spec.source}: {problem}; fetch it again")
        with torch.device("meta"):
            return _from_config(spec)


def check_weights(spec: ModelSpec, model: nn.Module) -> None:
    """Check the headers of a local model's files; raise a UserError that names what is missing or is no plain weight.

    ``model`` has its modules and shapes; the meta device is enough.
    """
    shards = Shards(Path(spec.source))
    if getattr(spec.config, "quantization_config", None) is None:
        check_unquantised(model, shards)


def _check_numbers(spec: ModelSpec, model: nn.Module) -> None:
    """Raise a UserError if what transformers has loaded as plain weights is stored as other than plain floats."""
    folder = Path(spec.source)
    if not folder.is_dir():
        folder = Path(str(cached_file(spec.source, "config.json", revision=spec.revision))).parent
    if (folder / SINGLE).exists() or (folder / INDEX).exists():  # else the hub converted what another branch holds
        check_unquantised(model, Shards(folder))


def _check_finite(model: nn.Module, spec: ModelSpec) -> None:
    """Raise a UserError if the embedding, the final norm or the head holds a number that is not finite."""
    blocks = tuple(f"{name}." for name in decoder_of(model, spec.roles).names)
    for name, parameter in model.named_parameters():
        if not name.startswith(blocks) and not bool(torch.isfinite(parameter).all()):
            problem = f"{name} holds NaN or infinite numbers in {spec.dtype_name}"
            raise UserError(f"model.path={spec.source}: {problem}; fetch it again, or choose another model.dtype")


def _from_config(spec: ModelSpec, **settings: Any) -> Any:
    trust = spec.trust_remote_code
    return transformers.AutoModelForCausalLM.from_config(spec.config, trust_remote_code=trust, **settings)


def bos_policy(setting: str, family: Family | None, tokenizer: Any, source: str) -> str:
    """Resolve where the beginning-of-sequence token goes: ``never``, ``stream`` (once per text) or ``window``.

    ``auto`` is ``window`` for Gemma; for others ``stream`` if the tokenizer adds the token by itself, else ``never``.

    ``source`` is where the model comes from, for messages; ``family`` is None for one that the table does not know.

    Raises:
        UserError: the tokenizer does not have the token that the policy needs.
    """
    with readable_errors(source):
        bos = tokenizer.bos_token_id
        adds_bos = setting == "auto" and bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    if setting == "auto" and family is not None and family.bos == "window":
        setting = "window"
    elif setting == "auto":
        setting = "stream" if adds_bos else "never"
    if setting != "never" and bos is None:
        raise UserError(f"model.bos={setting}: this tokenizer has no beginning-of-sequence token; set model.bos=never")
    return setting


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def is_present(device: torch.device) -> bool:
    """Check whether this machine has a device of this type."""
    accelerator = _accelerator()
    return device.type == "cpu" or (accelerator is not None and accelerator.type == device.type)


def _device(setting: str, planning: bool) -> torch.device:
    accelerator = _accelerator()
    if setting == "auto":
        return accelerator if accelerator is not None and accelerator.type != "mps" else torch.device("cpu")
    try:
        device = torch.device(setting)
    except RuntimeError as error:
        raise UserError(f"model.device={setting!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "mps":
        raise UserError(f"model.device={setting!r}: scores are summed in float64, which MPS has not; set it to cpu")
    if not is_present(device):
        if planning:
            return device
        available = accelerator.type if accelerator else "no accelerator"
        raise UserError(f"model.device={setting!r}: this machine has {available}; set model.device=auto")
    if device.type != "cpu" and (device.index or 0) >= (count := torch.accelerator.device_count()):
        found = ", ".join(f"{device.type}:{number}" for number in range(count))
        raise UserError(f"model.device={setting!r}: this machine has {found}; choose one of them, or model.device=auto")
    return device


def _dtype(setting: str, config: Any, device: torch.device) -> torch.dtype:
    """Resolve ``auto``: float32 on a CPU, so that numbers do not depend on it; else the checkpoint's dtype."""
    if setting != "auto":
        return getattr(torch, setting)
    if device.type == "cpu":
        return torch.float32
    stored = getattr(config.get_text_config(), "dtype", None)
    if not isinstance(stored, torch.dtype) or not stored.is_floating_point:
        return torch.float16
    has_no_bfloat16 = (
        device.type == "cuda" and is_present(device) and not torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return torch.float16 if stored == torch.bfloat16 and has_no_bfloat16 else stored
