"""Train the tiny models of tiny.py from scratch on the offline text: ``make tiny-models``."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from dass_exp.data import assets, texts
from dass_exp.data import tokens as data
from dass_exp.errors import UserError
from dass_exp.evaluate.perplexity import perplexity
from dass_exp.models.tiny import TRAINING_SEEDS, VARIANTS, Recipe

log = logging.getLogger(__name__)

TRAINED_ON = (texts.OfflineText("c4"), texts.OfflineText("wikipedia", "odd"))
HELD_OUT = texts.OfflineText("wikipedia", "even")  # the articles that the mini protocol scores
_END = "<|endoftext|>"
_SAVED_EVERY = 100


def train(recipe: Recipe) -> Path:
    """The folder of the trained model; trained first if it is not there, from where an interrupted training stopped.

    Returns:
        A folder that ``from_pretrained`` loads, with ``training.json``: the recipe, what was reached, and how long it took.

    Raises:
        UserError: the texts cannot be had, or the perplexity on the held-out articles is above the recipe's.
    """
    return assets.made_once(recipe.folder, lambda folder: _fill(recipe, folder))


def _fill(recipe: Recipe, folder: Path) -> None:
    start = time.perf_counter()
    tokenizer = _tokenizer(recipe)
    scratch = recipe.folder.with_name(f".training-{recipe.folder.name}")
    stream = data.encode(tokenizer, _joined(TRAINED_ON), "never")
    transformers.set_seed(recipe.training_seed)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(recipe.mlp.model_type, **recipe.config())
    )
    trainer = transformers.Trainer(
        model=model, args=_arguments(recipe, scratch), train_dataset=_Windows(stream, recipe.context)
    )
    trainer.train(resume_from_checkpoint=_checkpoint(scratch))
    windows = data.evaluation_windows(HELD_OUT, recipe.context, None, tokenizer, "never")
    reached = perplexity(model.eval(), windows.ids, batch_size=recipe.batch).value
    if not reached <= recipe.perplexity:
        raise UserError(
            f"{recipe.name}, training seed {recipe.training_seed}: held-out perplexity {reached:.2f}, above the {recipe.perplexity} of its recipe"
        )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    told = {
        "variant": recipe.variant,
        "training_seed": recipe.training_seed,
        "parameters": model.num_parameters(),
        "training_tokens": len(stream),
        "tokens_seen": recipe.steps * recipe.batch * recipe.context,
        "held_out_perplexity": reached,
        "held_out_windows": len(windows.ids),
        "final_training_loss": losses[-1:],
        "seconds_of_this_start": time.perf_counter() - start,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    log.info("%s, training seed %d: held-out perplexity %.2f", recipe.name, recipe.training_seed, reached)
    shutil.rmtree(scratch)


def _arguments(recipe: Recipe, scratch: Path) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(scratch),
        use_cpu=True,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta2=0.95,
        warmup_steps=recipe.warmup,
        lr_scheduler_type="cosine",
        seed=recipe.training_seed,
        save_steps=_SAVED_EVERY,
        save_total_limit=1,
        logging_steps=_SAVED_EVERY,
        report_to="none",
        dataloader_pin_memory=False,
    )


def _checkpoint(scratch: Path) -> str | None:
    """The last checkpoint that was written to its end: the state of the trainer is the last of its files."""
    whole = [path.parent for path in scratch.glob("checkpoint-*/trainer_state.json")]
    for broken in {path for path in scratch.glob("checkpoint-*") if path not in whole}:
        shutil.rmtree(broken)
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _tokenizer(recipe: Recipe) -> Any:
    """Byte-level BPE of the training text; the same for all variants and seeds."""
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(
        _documents(TRAINED_ON), vocab_size=recipe.vocabulary, special_tokens=[_END], show_progress=False
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, eos_token=_END, model_max_length=recipe.context
    )


def _documents(sources: Sequence[texts.Text]) -> Iterator[str]:
    return (document for text in sources for document in text.documents())


def _joined(sources: Sequence[texts.Text]) -> str:
    return "\n\n".join(_documents(sources))


class _Windows:
    """Consecutive windows of a stream of tokens, each an example of the trainer."""

    def __init__(self, stream: Tensor, length: int) -> None:
        self._windows = stream[: len(stream) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._windows[index], "labels": self._windows[index]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is asked for and not there yet. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dass_exp.train", description=__doc__)
    parser.add_argument("variants", nargs="*", help=f"{', '.join(VARIANTS)}; all where none is named")
    parser.add_argument("--training-seeds", type=int, nargs="+", default=list(TRAINING_SEEDS), help="default: 0 1 2")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()  # of the writing of shards; the trainer's own stays
    try:
        recipes = [Recipe(variant, seed) for seed in asked.training_seeds for variant in asked.variants or VARIANTS]
        for number, recipe in enumerate(recipes, start=1):
            log.info("%s, training seed %d (%d of %d)", recipe.name, recipe.training_seed, number, len(recipes))
            log.info("%s", train(recipe))
    except UserError as error:
        log.error("%s", error)
        return 1
    except KeyboardInterrupt:
        log.error("stopped; the same command goes on from the last %d steps", _SAVED_EVERY)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
