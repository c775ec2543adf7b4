"""Shared by the tests: a tiny model folder, composing and running in this process, the command in its own process."""

from __future__ import annotations

import functools
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before a library reads it: no test here may touch a network
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the device is part of a key, and numbers here are those of a CPU

import pytest
import torch
import transformers
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dass_exp.config.components import admitted_packages
from dass_exp.config.settings import RunConfig, register, validate
from dass_exp.engine.callbacks import BlockReport, Callback
from dass_exp.paths import project_root
from dass_exp.runs.context import RunContext
from dass_exp.runs.resolved_run import Components
from dass_exp.runs.run import Outcome, run

ROOT = project_root()
CONF = ROOT / "conf"
torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

# One decoder block of the tiny model by hand: 4 query heads and 2 key-value heads of 8 features, MLP of 64.
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 32, 64, 2, 512
OUT, IN = 12, 40  # of the layer in conftest.py that stages are tried on
MLP_SIZE = LAYERS * 3 * HIDDEN * INTERMEDIATE
DECODER_SIZE = MLP_SIZE + LAYERS * (2 * HIDDEN * HIDDEN + 2 * 16 * HIDDEN)
MODEL_SIZE = DECODER_SIZE + 2 * VOCABULARY * HIDDEN + LAYERS * 2 * HIDDEN + HIDDEN  # embedding, head, norms

SHORT = ["calibration.num_samples=4", "calibration.seq_len=32"]  # settings that make a run of the tiny model short
SHORT += ["eval.perplexity.context=32", "eval.perplexity.max_windows=4"]

_CORPUS = [
    "The cat sat on the mat and looked at the other cat, which sat on another mat.",
    "One-shot pruning removes weights of a language model without training it again.",
    "A river runs from the mountains to the sea; a road follows the river.",
    "In 1903 two brothers flew for the first time. It took 12 seconds.",
    "What is the answer to the question? The answer is not in the text.",
] * 4


def compose(*overrides: str) -> DictConfig:
    """Compose conf/ and these overrides in this process."""
    return composed_with_choices(*overrides)[0]


def composed_with_hydra(*overrides: str) -> DictConfig:
    """What Hydra composes, its own settings included."""
    os.environ.setdefault("DASS_EXP_ROOT", str(ROOT))
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("config", list(overrides), return_hydra_config=True)


@functools.cache
def _composed_once(*overrides: str) -> tuple[bytes, dict[str, str]]:
    """What Hydra composes and chooses, once in a process: composing takes as long as a run of the tiny model."""
    composed = composed_with_hydra(*overrides)
    with open_dict(composed):
        choices = dict(composed.pop("hydra").runtime.choices)
    return pickle.dumps(composed), choices


def composed_with_choices(*overrides: str) -> tuple[DictConfig, dict[str, str]]:
    """What Hydra composes, and the file chosen in each group."""
    given = Counter(override.partition("=")[0] for override in overrides)
    late = r"(results_dir|model\.path|save)=/[\w/.-]+"
    paths = [each for each in overrides if re.fullmatch(late, each) and given[each.partition("=")[0]] == 1]
    content, choices = _composed_once(*(override for override in overrides if override not in paths))
    composed = pickle.loads(content)
    for name, _, path in (override.partition("=") for override in paths):  # every test has its own
        OmegaConf.update(composed, name, path)
    return composed, dict(choices)


def settings_of(*overrides: str) -> RunConfig:
    """The validated settings of a run with these overrides."""
    composed, choices = composed_with_choices(*overrides)
    return validate(composed, admitted_packages(overrides), choices)


def components_of(*overrides: str) -> Components:
    """The objects that the settings of a run with these overrides describe."""
    return Components.of(settings_of(*overrides))


def run_with(*overrides: str, context: RunContext | None = None) -> Outcome:
    """Do a run, or find its record, in this process."""
    return run(settings_of(*overrides), context)


class Phases:
    """A progress reporter that keeps the names of the phases of all runs that it is given to."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def phase(self, name: str, steps: int | None = None) -> AbstractContextManager[Callable[[], None]]:
        """Note the phase, which is then one of ``names``."""
        del steps
        self.names.append(name)
        return nullcontext(lambda: None)

    def count(self, *words: str) -> list[int]:
        """How many phases began with each of these words."""
        return [sum(name.startswith(word) for name in self.names) for word in words]


class FixedMemory(RunContext):
    """A context in which so many bytes are free."""

    def __init__(self, free: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.free = free

    def available_memory(self, device: torch.device) -> int:
        """The same on every device."""
        del device
        return self.free


def tiny_overrides(folder: Path, results: Path) -> list[str]:
    """A run of the tiny model that takes a fraction of a second: DaSS 2:4, four short sequences, four short windows."""
    model = [f"model.path={folder}", "model.name=tiny", "tracker=none", f"results_dir={results}"]
    return [*model, "eval=ppl_mini", *SHORT]


def without(overrides: Sequence[str], *prefixes: str) -> list[str]:
    """The overrides whose setting starts with none of the prefixes."""
    return [override for override in overrides if not override.startswith(prefixes)]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command in its own process: this checkout first on the path, with these changes."""
    modules = [str(ROOT), changes.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, modules))
    return {**os.environ, "DASS_EXP_ROOT": str(ROOT), "OMP_NUM_THREADS": "2", **changes, "PYTHONPATH": path}


def command(*arguments: str, folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the command in ``folder``, in its own process, with these changes to the environment."""
    call, env = [sys.executable, "-m", "dass_exp", *arguments], environment(**changes)
    return subprocess.run(call, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)


def tiny_tokenizer(bos: str | None = "<s>") -> Any:
    """A byte-level BPE tokenizer, trained here; it has a beginning-of-sequence token but does not add it by itself."""
    tokenizer, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    size, special = {"vocab_size": VOCABULARY, "initial_alphabet": alphabet}, ["<s>", "</s>", "<pad>"]
    tokenizer.train_from_iterator(_CORPUS, trainers.BpeTrainer(**size, special_tokens=special, show_progress=False))
    tokens = {"bos_token": bos, "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def tiny_config(**changes: Any) -> transformers.LlamaConfig:
    """Two LLaMA blocks."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    sizes |= {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
    others = {"max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return transformers.LlamaConfig(**{**sizes, **others, "tie_word_embeddings": False, **changes})


def save_tiny(folder: Path, config: Any = None, bos: str | None = "<s>") -> Path:
    """Save a model with random weights (always the same) and its tokenizer, as ``from_pretrained`` loads them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config or tiny_config(), dtype=torch.float32)
        for parameter in model.parameters():  # wide enough that pruning shows in the perplexity
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tiny_tokenizer(bos).save_pretrained(folder)
    return folder


def bare_record(key: str, **changes: Any) -> dict[str, Any]:
    """The smallest valid record: dense, nothing scored."""
    config = {"model": {"name": "tiny"}, "method": {"name": "dense"}, "eval": {"name": "none"}}
    config |= dict.fromkeys(("pattern", "scope", "seed", "calibration"))
    record = {
        "schema": 1,
        "key": key,
        "created": "2026-01-01T00:00:00+00:00",
        "config": config,
        "identity": {"model": "local:0"},
        "protocol": {"bos": "never", "dtype": "float32", "device": "cpu", "model_note": ""},
        "calibration": None,
        "sparsity": {"scope": 0.0, "decoder": 0.0, "model": 0.0, "layers": []},
        "metrics": {},
        "cost": {"load_s": 1.0, "prune_s": 0.0, "eval_s": 0.0, "peak_rss_bytes": 1, "peak_gpu_bytes": None},
        "solver": {},
        "environment": {},
    }
    return record | changes


def files_under(folder: Path) -> list[str]:
    """Relative paths of all files below ``folder``, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contains(message: str, words: Sequence[str]) -> bool:
    """Whether the message is one line that contains every word."""
    return "\n" not in message and all(word in message for word in words)


class Killed(BaseException):
    """Stands for a kill: no error handling catches it."""


class KillAfter(Callback):
    """Ends a run as a kill would, once the state behind a block is on disk."""

    def __init__(self, block: int) -> None:
        self._block = block

    def on_block_end(self, report: BlockReport) -> None:
        if report.index == self._block:
            raise Killed


def killed_after_block(block: int, *overrides: str) -> None:
    """Start a run and end it as a kill would, once the state behind a block is on disk."""
    with pytest.raises(Killed):
        run_with(*overrides, context=RunContext(callbacks=[KillAfter(block)]))


def listening(**calls: Callable[..., Any]) -> RunContext:
    """A context whose run calls functions at points of its loop: ``listening(on_block_end=lambda report: ...)``."""
    callback = Callback()
    vars(callback).update(calls)
    return RunContext(callbacks=[callback])
