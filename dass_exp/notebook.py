"""The Python interface beside loading and pruning: run as the command does, evaluate, save, read, compare."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.errors import HydraException
from torch import Tensor, nn

from dass_exp.api import Pruned
from dass_exp.config.arguments import completed, misread_choice
from dass_exp.config.components import admitted_packages, build, choice
from dass_exp.config.compose import composing, settings_of
from dass_exp.config.settings import CalibrationConfig, RunConfig
from dass_exp.data import tokens
from dass_exp.data.texts import Text
from dass_exp.errors import UserError
from dass_exp.evaluate.generation import PROMPT, Generation, generate
from dass_exp.evaluate.perplexity import last_hidden_states, perplexity
from dass_exp.evaluate.zeroshot import ZeroShotOptions, zero_shot
from dass_exp.models.families import family_of
from dass_exp.models.load import bos_policy
from dass_exp.models.save import is_saved, save_checkpoint
from dass_exp.report.compare import comparison
from dass_exp.report.frame import records_frame
from dass_exp.report.progress import TerminalReporter
from dass_exp.runs.context import RunContext
from dass_exp.runs.run import run as execute_run
from dass_exp.storage.durable import now
from dass_exp.storage.mask_file import PackedMask
from dass_exp.storage.records import Record
from dass_exp.storage.tensor_file import tensors_digest


def run(*overrides: str) -> Record:
    """Run one cell as ``dass-exp`` does with these overrides, or find its record.

    Example: ``run("method=wanda", "pattern=4of8", "eval=ppl_mini")``.

    Returns:
        the record, as results/README.md describes it; ``record["metrics"]`` holds the scores.

    Raises:
        UserError: a setting is wrong; the message names it.
        NumericalError, VerificationError: the method failed in the named layer.
    """
    config = _settings(overrides)
    if config.plan:
        raise UserError("plan=true: run() returns a record and would have none; the command dass-exp prints the plan")
    return execute_run(config, RunContext(TerminalReporter())).record


def _settings(overrides: Sequence[str]) -> RunConfig:
    for override in overrides:
        if not isinstance(override, str):
            raise UserError(f"{override!r}: expected overrides as texts, such as run('method=wanda', 'pattern=4of8')")
    try:
        with composing():
            overrides = completed(overrides)
            return settings_of(overrides, admitted_packages(overrides))
    except UserError:
        raise
    except (HydraException, ValueError) as error:
        if misread := next(filter(None, map(misread_choice, overrides)), None):
            raise UserError(misread) from error
        raise UserError(" ".join(str(error).partition("Config search path")[0].split())) from error


def records(results: str | Path = "results", *where: str) -> pd.DataFrame:
    """Return the records of a results folder as a frame: one row a record, with its scores and settings.

    Args:
        results: the folder.
        where: filters such as ``method=dass`` or ``calibration.num_samples=16``.

    Raises:
        UserError: a filter is wrong.
    """
    return records_frame(results, where)


def compare(*compared: Record) -> pd.DataFrame:
    """Return a table of records, best perplexity first, as a sweep prints it at its end.

    Raises:
        UserError: something else was given.
    """
    for record in compared:
        if not isinstance(record, Mapping):
            advice = "expected records, as run() returns them; `dass-report compare KEY KEY` compares two by their keys"
            raise UserError(f"compare({record!r}): {advice}")
    return comparison(list(compared))


def calibration_tokens(
    tokenizer: Any,
    num_samples: int = 16,
    seq_len: int = 512,
    text: str | Text = "c4_mini",
    seed: int = 0,
    bos: str = "never",
) -> Tensor:
    """Draw calibration sequences as a run does.

    Args:
        tokenizer: of the model.
        num_samples: sequences.
        seq_len: tokens of each.
        text: a name of conf/calibration, or a :class:`dass_exp.data.texts.Text`.
        seed: of the sample.
        bos: ``never``, ``stream`` or ``window`` (Gemma).

    Returns:
        int64 [num_samples, seq_len].

    Raises:
        UserError: the text is unknown or too short.
    """
    source = build(choice("calibration", text)["text"], Text, "text") if isinstance(text, str) else text
    config = CalibrationConfig("own", num_samples=num_samples, seq_len=seq_len)
    return tokens.calibration_tokens(source, config, tokenizer, bos, seed).ids


def dense_states(model: nn.Module, tokenizer: Any, evaluation: str = "ppl_mini") -> dict[str, Tensor]:
    """Keep what :func:`evaluate` needs of a dense model to say later how far its pruned version is from it.

    Returns:
        last hidden states, [windows, tokens, features] on the CPU, by name of the set of windows; and under
        ``generation``, where the evaluation generates, int64 [prompts, tokens].

    Raises:
        UserError: the evaluation is unknown, or its text cannot be loaded.
    """
    config = _settings([f"eval={evaluation}"])
    windows = _windows(config, model, tokenizer)
    states = {name: last_hidden_states(model, ids) for name, ids in windows.items()}
    return states | _generated(config, model, windows)


def evaluate(
    model: nn.Module, tokenizer: Any, evaluation: str = "mini", dense: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Score a model that is in memory as a run with ``eval=NAME`` scores its.

    Args:
        model: a transformers causal language model of a known family.
        tokenizer: its tokenizer.
        evaluation: a name of conf/eval: mini, ppl_mini, zeroshot_mini, ...
        dense: :func:`dense_states` of the dense model.

    Returns:
        by flat name: ``perplexity/wikipedia_mini``, ``kl/wikipedia_mini``, ``piqa/acc``, ``mean_acc``,
        ``generation/distinct_4``.

    Raises:
        UserError: the evaluation is unknown, or its data cannot be loaded.
        NumericalError: a likelihood is not finite.
    """
    config, scores = _settings([f"eval={evaluation}"]), dict[str, float]()
    windows = _windows(config, model, tokenizer)
    for name, ids in windows.items():
        found = perplexity(model, ids, config.eval.batch_size, (dense or {}).get(name))
        scores[f"perplexity/{name}"] = found.value
        if found.kl is not None and found.agreement is not None:
            scores |= {f"kl/{name}": found.kl, f"agreement/{name}": found.agreement}
    for name, generated in _generated(config, model, windows).items():
        check = Generation.of(generated, (dense or {}).get(name, generated))
        scores[f"{name}/distinct_4"] = check.distinct_4
        if dense is not None and name in dense:
            scores[f"{name}/equal"] = check.equal
    if (tasks := config.eval.zeroshot) is not None:
        with_bos = _bos(model, tokenizer) != "never"
        options = ZeroShotOptions(4 * config.eval.batch_size, with_bos, tasks.num_fewshot, tasks.include_path)
        result = zero_shot(model, tokenizer, tasks.tasks, tasks.limit, tasks.data, options)
        numbers = {"acc", "acc_norm", "exact_match", "bits_per_byte", "ece"}
        for name, task in result.tasks.items():
            scores |= {f"{name}/{number}": task[number] for number in sorted(numbers & task.keys())}
        scores |= {"mean_acc": result.mean_acc, "mean_acc_norm": result.mean_acc_norm}
    return scores


def _generated(config: RunConfig, model: nn.Module, windows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the model generates, under one name; empty where the evaluation does not ask for it."""
    if (check := config.eval.generation) is None:
        return {}
    prompts = next(iter(windows.values()))[: check.prompts, :PROMPT]
    return {"generation": generate(model, prompts, check.tokens)}


def _windows(config: RunConfig, model: nn.Module, tokenizer: Any) -> dict[str, Tensor]:
    bos, windows = _bos(model, tokenizer), dict[str, Tensor]()
    for name, (setting, scored) in config.eval.perplexity_sets.items():
        text, size = build(scored.text, Text, f"{setting}.text"), (scored.context, scored.max_windows)
        windows[name] = tokens.evaluation_windows(text, *size, tokenizer, bos, f"{setting}.context").ids
    return windows


def _bos(model: Any, tokenizer: Any) -> str:
    config = model.config.get_text_config()
    return bos_policy("auto", family_of(str(config.model_type)), tokenizer, getattr(model, "name_or_path", ""))


def save(model: nn.Module, tokenizer: Any, folder: str | Path, pruned: Pruned | None = None) -> Path:
    """Save a model and its masks as a run with ``save=FOLDER`` does; return the folder.

    ``dass_exp.load(folder)`` loads it again, and ``from_pretrained`` does.

    Args:
        model: pruned.
        tokenizer: its tokenizer.
        folder: an empty or new one, or one that holds the same model.
        pruned: what :func:`dass_exp.prune` returned; None to save no masks.

    Raises:
        UserError: the folder holds something else.
        OSError: the disk is full; nothing is left behind.
    """
    masks = {} if pruned is None else {name: PackedMask.pack(keep) for name, keep in pruned.masks.items()}
    digest = tensors_digest({name: mask.bits for name, mask in masks.items()}, {})
    sparsity = 0.0 if pruned is None else pruned.sparsity
    key = f"python {digest}"
    manifest = {
        "key": key,
        "told": f"pruned from Python, {100 * sparsity:.1f} % of the pruned linears are zero",
        "created": now(),
        "sparsity": {"scope": sparsity},
    }
    is_saved(folder, key)
    return save_checkpoint(folder, model, tokenizer, masks, manifest)
