"""Zero-shot tasks through lm-eval, on the model in memory. The only import of ``lm_eval``.

Offline, each task is lm-eval's own, with nothing but the place of its data replaced: a generated YAML includes the installed one.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from dass_exp.data import assets
from dass_exp.errors import UserError
from dass_exp.evaluate.loglikelihood import loglikelihoods

# lm-eval's file of each offline task, and what its data need beside another place
_INSTALLED = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
_ADAPTED: dict[str, dict[str, Any]] = {
    "boolq": {"doc_to_target": "{{answer|int}}"}
}  # its labels are booleans in this copy


@dataclass(frozen=True)
class ZeroShot:
    """Scores of the tasks.

    Args:
        tasks: by task: acc, acc_stderr, acc_norm and acc_norm_stderr where the task has them, version, split, limit, documents.
        documents: by task: for each document the outcomes (0 or 1) of acc and acc_norm, for paired tests.
    """

    tasks: dict[str, dict[str, Any]]
    documents: dict[str, dict[str, list[float]]]

    @property
    def mean_acc(self) -> float:
        """Mean of acc over the tasks."""
        return sum(task["acc"] for task in self.tasks.values()) / len(self.tasks)

    @property
    def mean_acc_norm(self) -> float:
        """Mean of acc_norm over the tasks, acc where a task has none (WinoGrande)."""
        return sum(task.get("acc_norm", task["acc"]) for task in self.tasks.values()) / len(self.tasks)


def lm_eval_version() -> str:
    """The installed version; scores of different versions can differ."""
    return version("lm_eval")


def check_tasks(tasks: Sequence[str], data: str) -> None:
    """See that the tasks exist, before a model is loaded.

    Raises:
        UserError: names the unknown task and what is allowed.
    """
    if not tasks or len(set(tasks)) != len(tasks):
        raise UserError(f"eval.zeroshot.tasks={list(tasks)}: name at least one task, and none twice")
    known: Collection[str] = list(_INSTALLED) if data == "offline" else _all_tasks()
    for task in tasks:
        if task not in known:
            choice = (
                f"one of {', '.join(known)}"
                if data == "offline"
                else "a task of lm-eval (`lm-eval ls tasks` lists them)"
            )
            raise UserError(f"eval.zeroshot.tasks: unknown task {task!r}; expected {choice}")


def zero_shot(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], limit: int | None, data: str, options: Options
) -> ZeroShot:
    """Score a model on multiple-choice tasks without examples.

    Args:
        model: a transformers causal language model, on its device.
        tokenizer: of the model.
        tasks: names of lm-eval.
        limit: the first so many documents of each task, None for all.
        data: ``offline`` (assets) or ``hub``.
        options: batch size and beginning-of-sequence token.

    Raises:
        UserError: the data cannot be had.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class Quiet(HFLM):
        """HFLM without its progress bar, with the beginning-of-sequence token where it is asked for, whatever the tokenizer adds by itself, and without
        the logits of a whole batch, of which it reads a few (Gemma's words alone made them 6 GB).
        """

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **settings: Any) -> list[int]:
            ids = super().tok_encode(string, add_special_tokens=False, **settings)
            start = [tokenizer.bos_token_id] if options.bos and add_special_tokens is not False else []
            return ids if ids[:1] == start else [*start, *ids]

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: Any, **settings: Any) -> list[tuple[float, bool]]:
            return loglikelihoods(
                model, [(context, answer) for _, context, answer in requests], options.batch_size, self.max_length
            )

    with tempfile.TemporaryDirectory() as folder, _quiet():
        if data == "offline":
            for task in tasks:
                _write_task(task, Path(folder))
            manager = TaskManager(include_path=folder, include_defaults=False)
        else:
            manager = TaskManager()
        wrapped = Quiet(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=options.batch_size,
            softmax_dtype="float32",
        )
        try:
            loaded = manager.load(list(tasks))
            for task in loaded["tasks"].values():
                task.set_config(key="num_fewshot", value=0)
            found = evaluate(wrapped, loaded, limit=limit, bootstrap_iters=1000)
        except UserError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            if data == "hub":
                reason = " ".join(str(error).split())[:300]
                raise UserError(
                    f"the zero-shot tasks cannot be scored: check the network, or set eval=zeroshot_mini ({reason})"
                ) from error
            raise
    return _collect(found, tasks, limit)


@dataclass(frozen=True)
class Options:
    """``batch_size`` requests pass through the model together; ``bos`` starts each with the beginning-of-sequence token."""

    batch_size: int = 16
    bos: bool = False


def _write_task(task: str, folder: Path) -> None:
    """A YAML beside the installed task's: the same prompt, target and metrics, other data."""
    import lm_eval

    installed = Path(lm_eval.__file__).parent / "tasks" / _INSTALLED[task]
    data_file = str(assets.fetch(assets.TASKS[task]))
    config = {
        "include": str(installed),
        "task": task,
        "dataset_path": "arrow",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": data_file}},
        "training_split": None,
        "test_split": None,
        "validation_split": "validation",
        "fewshot_split": None,
        **_ADAPTED.get(task, {}),
    }
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def _collect(found: Any, tasks: Sequence[str], limit: int | None) -> ZeroShot:
    scores: dict[str, dict[str, Any]] = {}
    documents: dict[str, dict[str, list[float]]] = {}
    for task in tasks:
        row = {key.removesuffix(",none"): value for key, value in found["results"][task].items()}
        kept = {
            key: row[key]
            for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
            if isinstance(row.get(key), float)
        }
        if "acc" not in kept:
            raise UserError(f"eval.zeroshot.tasks: {task} has no accuracy; only multiple-choice tasks can be scored")
        config = found["configs"][task]
        split = config.get("test_split") or config.get("validation_split")
        samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        scores[task] = {
            **kept,
            "version": found["versions"].get(task),
            "split": split,
            "limit": limit,
            "documents": len(samples),
        }
        documents[task] = {
            metric: [float(sample[metric]) for sample in samples] for metric in ("acc", "acc_norm") if metric in kept
        }
    return ZeroShot(scores, documents)


@functools.cache
def _all_tasks() -> frozenset[str]:
    from lm_eval.tasks import TaskManager

    return frozenset(TaskManager().all_tasks)


@contextmanager
def _quiet() -> Iterator[None]:
    """Only lm-eval's errors reach the screen while it is open."""
    logs = [logging.getLogger(name) for name in ("lm_eval", "evaluate", "datasets")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
