"""Where a model lies and what it is: on a hub, in a folder, among the offline or the tiny models."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.utils.hub import cached_file, extract_commit_hash

from dass_exp.data import assets
from dass_exp.data.assets import file_sha256
from dass_exp.errors import UserError
from dass_exp.models import tiny
from dass_exp.storage.mask_file import MASKS

OFFLINE = "offline:"  # a path that starts so names one of the models of assets.py
TINY = "tiny:"  # and one that starts so, one of tiny.py

_NEEDS_LICENCE = {"gemma3_270m": "the Gemma Terms of Use (https://ai.google.dev/gemma/terms)"}
_NOTES = {
    "smollm2_135m": "dequantised from 4-bit weights (GGUF Q4_1)",
    "gemma3_270m": "dequantised from 4-bit weights (GGUF Q4_K_M)",
}


def locate(settings: Any) -> dict[str, Any]:
    """Where the model lies and what it is: source, identity, config, revision, note and trained of a :class:`ModelSpec`."""
    path, trust = str(settings.path), bool(settings.trust_remote_code)
    if settings.training_seed is not None and not path.startswith(TINY):
        raise UserError(
            f"model.training_seed={settings.training_seed}: only the models of `make tiny-models` were trained more than once; leave it null"
        )
    if path.startswith(TINY):
        recipe = tiny.trained(path.removeprefix(TINY), settings.training_seed)
        told = {"recipe": f"{path}@{recipe.digest}", "seed": recipe.training_seed}
        identity = f"{path}@{folder_digest(recipe.folder)}"
        return {
            **_local(recipe.folder, trust=False),
            "identity": identity,
            "note": "trained from scratch by make tiny-models",
            "trained": told,
        }
    if path.startswith(OFFLINE):
        name = path.removeprefix(OFFLINE)
        folder = _offline(name, bool(settings.accept_license))
        return {
            **_local(folder, trust=False),
            "identity": f"{path}@{assets.MODELS[name].sha256[:16]}",
            "note": _NOTES[name],
        }
    if Path(path).is_dir():
        made = manifest_of(Path(path))
        note = f"pruned by dass_exp: {made['told']}, record {made['key']}" if made else ""
        return {**_local(Path(path), trust), "identity": f"local:{folder_digest(Path(path))}", "note": note}
    if path.startswith(("/", ".", "~")):
        raise UserError(
            f"model.path={path}: there is no such folder; give a folder, a hub id such as meta-llama/Llama-2-7b-hf, or {OFFLINE}smollm2_135m"
        )
    with quiet(), explained(path):
        revision = extract_commit_hash(str(cached_file(path, "config.json", revision=settings.revision)), None)
    if revision is None:
        raise UserError(
            f"model.path={path}: its commit cannot be told, so its results could not be told apart; download it and give the folder"
        )
    return {
        "source": path,
        "revision": revision,
        "config": read_config(path, revision, trust),
        "identity": f"{path}@{revision}",
        "note": "",
    }


def _local(folder: Path, trust: bool) -> dict[str, Any]:
    return {"source": str(folder), "revision": None, "config": read_config(str(folder), None, trust), "note": ""}


def _offline(name: str, accepted: bool) -> Path:
    if name not in assets.MODELS:
        raise UserError(f"model.path={OFFLINE}{name}: the offline models are {', '.join(assets.MODELS)}")
    if name in _NEEDS_LICENCE and not accepted:
        raise UserError(f"model {name}: read {_NEEDS_LICENCE[name]}; if you accept them, set model.accept_license=true")
    return assets.converted(name, convert_gguf)


def convert_gguf(source: Path, folder: Path) -> None:
    """Turn a GGUF file into safetensors and tokenizer files, dequantised to float32, each weight as the file holds it."""
    with quiet():
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        # transformers refuses to save a model that it believes to be quantised
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def folder_of(source: str, revision: str | None) -> Path:
    """The folder of a model's files; those of a hub model are fetched into the hub's cache first."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=revision, allow_patterns=["*.safetensors", "*.json"]))


def read_config(source: str, revision: str | None, trust: bool) -> Any:
    """The transformers config of a model; no weight is loaded."""
    with quiet(), explained(source):
        return transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust)


@contextmanager
def quiet() -> Iterator[None]:
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
def explained(source: str) -> Iterator[None]:
    """Turn what transformers and the hub raise for a model that cannot be had into one line."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"model.path={source}: one of its files is damaged ({' '.join(str(error).split())}); fetch it again"
        ) from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"model.path={source}: it cannot be loaded. Check the name, log in with `hf auth login` if it is gated, and check the network; "
            f"model=smollm2_135m needs no hub. ({reason[:300]})"
        ) from error


MANIFEST = "dass_exp.json"

_IDENTIFYING = {"config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"}  # beside the weights


def folder_digest(folder: Path) -> str:
    """16 hex digits over the weights, the config and the tokenizer of a model folder.

    Raises:
        UserError: it holds no safetensors.
    """
    files = sorted(
        file
        for file in folder.iterdir()
        if (file.suffix == ".safetensors" and file.name != MASKS) or file.name in _IDENTIFYING
    )
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"model.path={folder}: the folder holds no .safetensors file; other formats are not read")
    return _digest(tuple((file.absolute(), file.stat().st_mtime_ns, file.stat().st_size) for file in files))


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that this project saved (:mod:`dass_exp.models.save`); empty for another folder."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return (
        found
        if isinstance(found, dict) and isinstance(found.get("key"), str) and isinstance(found.get("told"), str)
        else {}
    )


@functools.lru_cache(maxsize=64)
def _digest(stamped: tuple[tuple[Path, int, int], ...]) -> str:
    """One digest over files; the time stamps make a sweep in one process hash an unchanged folder once."""
    whole = hashlib.sha256()
    for file, _, _ in stamped:
        whole.update(f"{file.name}:{file_sha256(file)};".encode())
    return whole.hexdigest()[:16]
