"""Train the models of models/tiny.py from scratch on the offline text: ``make tiny-models``."""

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from dass_exp.data import assets, texts
from dass_exp.data.tokens import encode, evaluation_windows
from dass_exp.errors import UserError
from dass_exp.evaluate.perplexity import perplexity
from dass_exp.models.tiny import TRAINING_SEEDS, VARIANTS, Recipe

log = logging.getLogger(__name__)

TRAINED_ON = (texts.OfflineText("c4"), texts.OfflineText("wikipedia", "odd"))
HELD_OUT = texts.OfflineText("wikipedia", "even")  # the articles that the mini protocol scores
_END = "<|endoftext|>"
_SAVED_EVERY = 100


def train(recipe: Recipe) -> Path:
    """Return the folder of the trained model, with ``training.json``; train it or resume its training if needed.

    Raises:
        UserError: the texts cannot be loaded, or the perplexity on the held-out articles is above the recipe's.
    """
    return assets.create_once(recipe.folder, lambda folder: _train_into(recipe, folder))


def _train_into(recipe: Recipe, folder: Path) -> None:
    start = time.perf_counter()
    documents = [document for text in TRAINED_ON for document in text.documents()]
    tokenizer = _tokenizer(recipe, documents)
    scratch = recipe.folder.with_name(f".training-{recipe.folder.name}")
    stream = encode(tokenizer, "\n\n".join(documents), "never")
    transformers.set_seed(recipe.training_seed)
    config = transformers.AutoConfig.for_model(recipe.mlp.model_type, **recipe.config())
    model = transformers.AutoModelForCausalLM.from_config(config)
    windows = stream[: len(stream) // recipe.context * recipe.context].view(-1, recipe.context)
    examples: Any = [{"input_ids": ids, "labels": ids} for ids in windows]
    trainer = transformers.Trainer(model=model, args=_training_arguments(recipe, scratch), train_dataset=examples)
    trainer.train(resume_from_checkpoint=_last_checkpoint(scratch))
    held_out = evaluation_windows(HELD_OUT, recipe.context, None, tokenizer, "never").ids
    reached = perplexity(model.eval(), held_out, batch_size=recipe.batch).value
    if not reached <= recipe.perplexity:
        problem = f"held-out perplexity {reached:.2f}, above the {recipe.perplexity} of its recipe"
        raise UserError(f"{recipe.name}, training seed {recipe.training_seed}: {problem}")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    summary = {
        "variant": recipe.variant,
        "training_seed": recipe.training_seed,
        "parameters": model.num_parameters(),
        "training_tokens": len(stream),
        "tokens_seen": recipe.steps * recipe.batch * recipe.context,
        "held_out_perplexity": reached,
        "held_out_windows": len(held_out),
        "final_training_loss": losses[-1:],
        "seconds_of_this_start": time.perf_counter() - start,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    log.info("%s, training seed %d: held-out perplexity %.2f", recipe.name, recipe.training_seed, reached)
    shutil.rmtree(scratch)


def _training_arguments(recipe: Recipe, scratch: Path) -> transformers.TrainingArguments:
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


def _last_checkpoint(scratch: Path) -> str | None:
    """Return the last complete checkpoint, and remove incomplete ones: the trainer's state is written last."""
    complete = [path.parent for path in scratch.glob("checkpoint-*/trainer_state.json")]
    for incomplete in set(scratch.glob("checkpoint-*")) - set(complete):
        shutil.rmtree(incomplete)
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def _tokenizer(recipe: Recipe, documents: Sequence[str]) -> Any:
    """Train a byte-level BPE on the training text; it is the same for all variants and seeds."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(documents, vocab_size=recipe.vocabulary, special_tokens=[_END], show_progress=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token=_END, model_max_length=recipe.context
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the requested models that are missing; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dass_exp.train", description=__doc__)
    parser.add_argument("variants", nargs="*", help=f"{', '.join(VARIANTS)}; default: all")
    parser.add_argument("--training-seeds", type=int, nargs="+", default=list(TRAINING_SEEDS), help="default: 0 1 2")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()  # those of writing shards; the trainer shows its own
    try:
        recipes = [Recipe(variant, seed) for seed in options.training_seeds for variant in options.variants or VARIANTS]
        for number, recipe in enumerate(recipes, start=1):
            log.info("%s, training seed %d (%d of %d)", recipe.name, recipe.training_seed, number, len(recipes))
            log.info("%s", train(recipe))
    except UserError as error:
        log.error("%s", error)
        return 1
    except KeyboardInterrupt:
        log.error("stopped; the same command resumes from the last checkpoint (every %d steps)", _SAVED_EVERY)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
