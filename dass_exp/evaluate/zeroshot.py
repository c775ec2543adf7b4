"""Zero-shot tasks through lm-eval, on the model in memory. Only this file imports ``lm_eval``.

Offline tasks are lm-eval's own, read from local files: a generated YAML includes the installed one.
"""

import functools
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from dass_exp.data import assets
from dass_exp.errors import UserError
from dass_exp.evaluate.loglikelihood import loglikelihoods
from dass_exp.models.locate import quiet_loggers

# lm-eval's file of each offline task
_INSTALLED = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
# what else must change for the local data: BoolQ's labels are booleans in this copy
_OVERRIDES = {"boolq": {"doc_to_target": "{{answer|int}}"}}
_METRICS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


@dataclass(frozen=True)
class ZeroShotOptions:
    """Requests per batch; whether each request starts with the beginning-of-sequence token."""

    batch_size: int = 16
    bos: bool = False


@dataclass(frozen=True)
class ZeroShotResult:
    """Scores by task."""

    # acc and acc_stderr, acc_norm and acc_norm_stderr where the task has them, version, split, limit, documents
    tasks: dict[str, dict[str, Any]]
    # the outcome (0 or 1) of acc and acc_norm for each document, for paired tests
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
    """Return the installed version; scores of different versions can differ."""
    return version("lm_eval")


def check_tasks(tasks: Sequence[str], data: str) -> None:
    """Raise a UserError that names the first unknown task; called before a model is loaded."""
    if not tasks or len(set(tasks)) != len(tasks):
        raise UserError(f"eval.zeroshot.tasks={list(tasks)}: name at least one task, and none twice")
    known: Collection[str] = _INSTALLED if data == "offline" else _all_tasks()
    listed = "a task of lm-eval (`lm-eval ls tasks` lists them)"
    allowed = f"one of {', '.join(_INSTALLED)}" if data == "offline" else listed
    if unknown := [task for task in tasks if task not in known]:
        raise UserError(f"eval.zeroshot.tasks: unknown task {unknown[0]!r}; expected {allowed}")


def zero_shot(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], limit: int | None, data: str, options: ZeroShotOptions
) -> ZeroShotResult:
    """Score a model on multiple-choice tasks of lm-eval, without examples in the prompt.

    Uses the first ``limit`` documents of each task (None: all) from ``data``, ``offline`` (assets) or ``hub``; raises a
    UserError where they are not available.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder, quiet_loggers("lm_eval", "evaluate", "datasets"):
        if data == "offline":
            for task in tasks:
                _write_task(task, Path(folder))
            manager = TaskManager(include_path=folder, include_defaults=False)
        else:
            manager = TaskManager()
        adapter = _adapter(model, tokenizer, options)
        try:
            loaded = manager.load(list(tasks))
            for task in loaded["tasks"].values():
                task.set_config(key="num_fewshot", value=0)
            output = evaluate(adapter, loaded, limit=limit, bootstrap_iters=1000)
        except (OSError, RuntimeError, ValueError) as error:
            if data != "hub" or isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())[:300]
            advice = f"check the network, or set eval=zeroshot_mini ({reason})"
            raise UserError(f"the zero-shot tasks cannot be scored: {advice}") from error
    return _collect(output, tasks, limit)


def _adapter(model: nn.Module, tokenizer: Any, options: ZeroShotOptions) -> Any:
    """Wrap the model for lm-eval."""
    from lm_eval.models.huggingface import HFLM

    class Adapter(HFLM):
        """HFLM without progress bar, with the BOS policy of ``options``, and scored by :func:`loglikelihoods`.

        HFLM itself would materialise the logits of a whole batch, 6 GB with Gemma's vocabulary, and read a few of them.
        """

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **settings: Any) -> list[int]:
            ids = super().tok_encode(string, add_special_tokens=False, **settings)
            start = [tokenizer.bos_token_id] if options.bos and add_special_tokens is not False else []
            return ids if ids[:1] == start else [*start, *ids]

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: Any, **settings: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return loglikelihoods(model, pairs, options.batch_size, self.max_length)

    return Adapter(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=options.batch_size, softmax_dtype="float32"
    )


def _write_task(task: str, folder: Path) -> None:
    """Write a YAML that includes the installed task's (prompt, target, metrics) and replaces its data."""
    import lm_eval

    installed = Path(lm_eval.__file__).parent / "tasks" / _INSTALLED[task]
    config = {
        "include": str(installed),
        "task": task,
        "dataset_path": "arrow",
        "dataset_kwargs": {"data_files": {"validation": str(assets.fetch(assets.TASKS[task]))}},
        "validation_split": "validation",
        **dict.fromkeys(("dataset_name", "training_split", "test_split", "fewshot_split")),  # none of these
        **_OVERRIDES.get(task, {}),
    }
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def _collect(output: Any, tasks: Sequence[str], limit: int | None) -> ZeroShotResult:
    scores: dict[str, dict[str, Any]] = {}
    documents: dict[str, dict[str, list[float]]] = {}
    for task in tasks:
        row = {key.removesuffix(",none"): value for key, value in output["results"][task].items()}
        metrics = {key: row[key] for key in _METRICS if isinstance(row.get(key), float)}
        if "acc" not in metrics:
            raise UserError(f"eval.zeroshot.tasks: {task} has no accuracy; only multiple-choice tasks can be scored")
        config = output["configs"][task]
        samples = sorted(output["samples"][task], key=lambda sample: sample["doc_id"])
        scores[task] = {
            **metrics,
            "version": output["versions"].get(task),
            "split": config.get("test_split") or config.get("validation_split"),
            "limit": limit,
            "documents": len(samples),
        }
        outcomes = [metric for metric in ("acc", "acc_norm") if metric in metrics]
        documents[task] = {metric: [float(sample[metric]) for sample in samples] for metric in outcomes}
    return ZeroShotResult(scores, documents)


@functools.cache
def _all_tasks() -> frozenset[str]:
    from lm_eval.tasks import TaskManager

    return frozenset(TaskManager().all_tasks)
