"""Find and identify a model on the hub, in a folder, among the offline models or the tiny ones."""

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils.hub import cached_file, extract_commit_hash

from dass_exp.config.settings import ModelConfig
from dass_exp.data import assets
from dass_exp.errors import UserError, naming
from dass_exp.models import tiny
from dass_exp.models.folder import check_files, folder_digest, manifest_of

OFFLINE = "offline:"  # prefix of a path that names a model of assets.py
TINY = "tiny:"  # prefix of a path that names a model of tiny.py

_LICENCES = {"gemma3_270m": "the Gemma Terms of Use (https://ai.google.dev/gemma/terms)"}
_NOTES = {
    "smollm2_135m": "dequantised from 4-bit weights (GGUF Q4_1)",
    "gemma3_270m": "dequantised from 4-bit weights (GGUF Q4_K_M)",
}


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where the files of a model are, and which model they are."""

    source: str  # hub id or folder
    revision: str | None = None  # resolved commit of a hub model
    identity: str  # of its weights, wherever they are stored: hub id and commit, or a digest
    config: Any = field(repr=False)  # of transformers
    note: str = ""  # remark on the weights for readers of its results
    trained: Mapping[str, Any] = field(default_factory=dict)  # recipe and seed, if its recipe was trained several times


def locate(config: ModelConfig) -> ModelSource:
    """Find the files of a model; an offline one is downloaded and converted. Raises as :func:`load.identify`."""
    path, trust = str(config.path), bool(config.trust_remote_code)
    if path.startswith(TINY):
        return _tiny_source(path, config.training_seed)
    if config.training_seed is not None:
        problem = "only the models of `make tiny-models` were trained more than once; leave it null"
        raise UserError(f"model.training_seed={config.training_seed}: {problem}")
    if path.startswith(OFFLINE):
        return _offline_source(path, bool(config.accept_license))
    if Path(path).is_dir():
        folder, manifest = Path(path), manifest_of(Path(path))
        with readable_errors(path):
            identity = f"local:{folder_digest(folder)}"  # first: transformers would wait for ever to read a pipe
            check_files(folder, manifest)
        return ModelSource(
            source=str(folder),
            config=_read_config(str(folder), trust=trust),
            identity=identity,
            note=f"pruned by dass_exp: {manifest['told']}, record {manifest['key']}" if manifest else "",
        )
    if path.startswith(("/", ".", "~")):
        advice = f"give a folder, a hub id such as meta-llama/Llama-2-7b-hf, or {OFFLINE}smollm2_135m"
        raise UserError(f"model.path={path}: there is no such folder; {advice}")
    with quiet_libraries(), readable_errors(path):
        revision = extract_commit_hash(str(cached_file(path, "config.json", revision=config.revision)), None)
    if revision is None:
        problem = "its commit cannot be determined, so results of different versions would share a record"
        raise UserError(f"model.path={path}: {problem}; download it and give the folder")
    model_config = _read_config(path, revision, trust)
    return ModelSource(source=path, revision=revision, config=model_config, identity=f"{path}@{revision}")


def _tiny_source(path: str, training_seed: int | None) -> ModelSource:
    recipe = tiny.trained_recipe(path.removeprefix(TINY), training_seed)
    return ModelSource(
        source=str(recipe.folder),
        config=_read_config(str(recipe.folder)),
        identity=f"{path}@{folder_digest(recipe.folder)}",
        note="trained from scratch by make tiny-models",
        trained={"recipe": f"{path}@{recipe.digest}", "seed": recipe.training_seed},
    )


def _offline_source(path: str, accepted: bool) -> ModelSource:
    name = path.removeprefix(OFFLINE)
    if name not in assets.MODELS:
        raise UserError(f"model.path={path}: the offline models are {', '.join(assets.MODELS)}")
    if name in _LICENCES and not accepted:
        raise UserError(f"model {name}: read {_LICENCES[name]}; if you accept them, set model.accept_license=true")
    folder = str(offline_folder(name))
    identity = f"{path}@{assets.MODELS[name].sha256[:16]}"
    return ModelSource(source=folder, config=_read_config(folder), identity=identity, note=_NOTES[name])


def _read_config(source: str, revision: str | None = None, trust: bool = False) -> Any:
    with quiet_libraries(), readable_errors(source):
        return transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust)


def offline_folder(name: str) -> Path:
    """Return the folder of an offline model, converted on first use; raises as ``fetch``, or if that needs an extra."""
    folder = assets.model_folder(name)
    if not assets.is_complete(folder) and importlib.util.find_spec("gguf") is None:
        advice = "pip install 'dass_exp[offline]' (in a checkout: pip install -e '.[offline]')"
        damage = f"{found}; " if (found := assets.damage_in(folder)) else ""
        problem = f"{damage}it is a GGUF file, and the package that converts it is an extra"
        raise UserError(f"model {name}: {problem}; {advice}")
    return assets.convert_once(name, _convert_gguf)


def _convert_gguf(source: Path, folder: Path) -> None:
    """Convert a GGUF file to safetensors and tokenizer files, its weights dequantised to float32."""
    with quiet_libraries():
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


def files_of(source: str, revision: str | None) -> Path:
    """Return the folder of a model's files; those of a hub model are downloaded to the hub's cache first."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=revision, allow_patterns=["*.safetensors", "*.json"]))


@contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Silence everything below errors in these loggers inside the context."""
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence progress bars, advice and retries of transformers and the hub inside the context."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with quiet_loggers("transformers", "huggingface_hub"):
            yield
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()


def readable_errors(source: str) -> AbstractContextManager[None]:
    """Turn whatever transformers and the hub raise for a model that cannot be loaded into a one-line UserError."""
    advice = (
        "check its files, or fetch it again"
        if Path(source).is_dir()
        else "check the name, log in with `hf auth login` if it is gated, and check the network; model=smollm2_135m "
        "needs no hub"
    )
    return naming(f"model.path={source}: it cannot be loaded; {advice}")
