"""Zero- and few-shot tasks through lm-eval, on the model in memory. Only this file imports ``lm_eval``."""

import functools
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dass_exp.errors import NumericalError, UserError, one_line
from dass_exp.evaluate import offline_tasks
from dass_exp.evaluate.loglikelihood import loglikelihoods
from dass_exp.evaluate.task_scores import ACCURACIES, ZeroShotResult, collect
from dass_exp.models.locate import quiet_loggers

# what lm-eval scores a task by that lists no metrics
_DEFAULT_METRICS = {"multiple_choice": ("acc",), "loglikelihood": ("acc",), "generate_until": ("exact_match",)}
_FEWSHOT_SEED = 1234  # lm-eval's own, of the examples that it draws


Phase = Callable[[int], AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True)
class ZeroShotOptions:
    """How tasks are scored.

    Args:
        batch_size: requests per batch.
        bos: whether each request starts with the beginning-of-sequence token.
        num_fewshot: examples before each question.
        include_path: folder of own tasks.
        phase: opens a phase of so many batches, and yields a function to call after each.
    """

    batch_size: int = 16
    bos: bool = False
    num_fewshot: int = 0
    include_path: str | None = None
    phase: Phase = field(default=lambda steps: nullcontext(lambda: None), repr=False)


def lm_eval_version() -> str:
    """Return the installed version; scores of different versions can differ."""
    return version("lm_eval")


def check_tasks(tasks: Sequence[str], data: str, num_fewshot: int = 0, include_path: str | None = None) -> None:
    """Check everything about tasks that can be checked before a model is loaded.

    Raises:
        UserError: names the first task that is unknown, or cannot be scored.
    """
    if not tasks or len(set(tasks)) != len(tasks):
        raise UserError(f"eval.zeroshot.tasks={list(tasks)}: name at least one task, and none twice")
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"eval.zeroshot.include_path={include_path!r}: expected a folder of task files (YAML)")
    offline = data == "offline"
    index = {} if offline and include_path is None else _own_manager(offline, include_path).task_index
    counts: Counter[str] = Counter()
    for task in tasks:
        if task in index:
            counts.update(_checked(index, task))
        elif offline and task in offline_tasks.NAMES:
            counts.update(offline_tasks.members([task]))
            _check_examples(task, num_fewshot)
        else:
            listed = "a task of lm-eval (`lm-eval ls tasks` lists them)"
            allowed = f"one of {', '.join(offline_tasks.NAMES[:15])}, or a subject of it" if offline else listed
            raise UserError(f"eval.zeroshot.tasks: unknown task {task!r}; expected {allowed}")
    if twice := [task for task, count in counts.items() if count > 1]:
        raise UserError(f"eval.zeroshot.tasks={list(tasks)}: {twice[0]} is in two of them; leave one out")


def _check_examples(task: str, num_fewshot: int) -> None:
    if num_fewshot > offline_tasks.EXAMPLES and task.startswith("mmlu"):
        most = f"{task} has {offline_tasks.EXAMPLES} examples; set at most that"
        raise UserError(f"eval.zeroshot.num_fewshot={num_fewshot}: {most}")


def _checked(index: Mapping[str, Any], task: str) -> list[str]:
    """Return the names of the tasks behind a name, or refuse what has no accuracy and no exact match."""
    entry, leaves = index[task], dict(_leaves(index, task))
    expected = f"expected a task scored by {', '.join(ACCURACIES)}"
    if entry.kind.name == "TAG":
        raise UserError(f"eval.zeroshot.tasks: {task} is a label of several tasks; name them: {', '.join(leaves)}")
    if entry.kind.name == "GROUP":
        means = [mean.get("metric") for mean in _listed(entry.cfg.get("aggregate_metric_list"))]
        if not set(means) & set(ACCURACIES):
            raise UserError(
                f"eval.zeroshot.tasks: {task} is a group without a mean; name its tasks: {', '.join(leaves)}"
            )
    for name, config in leaves.items():
        default = [
            {"metric": metric} for metric in _DEFAULT_METRICS.get(config.get("output_type", "generate_until"), ())
        ]
        listed = _listed(config.get("metric_list") or ([] if "class" in config else default))
        metrics = [str(each.get("metric")) for each in listed]
        if not set(metrics) & set(ACCURACIES):
            how = ", ".join(metrics) or "code of its own"
            raise UserError(f"eval.zeroshot.tasks: {name} is scored by {how}; {expected}")
    return list(leaves)


def _listed(value: Any) -> list[dict[str, Any]]:
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, dict)]


def _leaves(index: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield name and settings of every task behind the name of a task, a group or a label."""
    if (entry := index.get(name)) is None:
        return
    if entry.kind.name not in ("TAG", "GROUP"):
        yield name, entry.cfg
        return
    for member in sorted(entry.tags) if entry.kind.name == "TAG" else entry.cfg.get("task", ()):
        inner = member.get("task", member.get("group")) if isinstance(member, dict) else member
        for child in inner if isinstance(inner, list) else [inner]:
            yield from _leaves(index, str(child))


def zero_shot(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], limit: int | None, data: str, options: ZeroShotOptions
) -> ZeroShotResult:
    """Score a model on tasks of lm-eval: multiple choice, or an exact match of what it generates.

    Uses the first ``limit`` documents of each task (None: all) from ``data``, ``offline`` (assets) or ``hub``; raises a
    UserError where they are not available.
    """
    from lm_eval.evaluator import evaluate

    with tempfile.TemporaryDirectory() as folder, quiet_loggers("lm_eval", "evaluate", "datasets"):
        manager = _manager(tasks, data, options.include_path, Path(folder))
        adapter = _adapter_class()(model, tokenizer, options)
        try:
            loaded = manager.load(list(tasks))
            for task in loaded["tasks"].values():
                # as in lm-eval, a task whose own file says 0 keeps that: examples are part of its prompt
                if options.num_fewshot == 0 or task.get_config("num_fewshot") != 0:
                    task.set_config(key="num_fewshot", value=options.num_fewshot)
                task.set_fewshot_seed(seed=_FEWSHOT_SEED)
            output = evaluate(adapter, loaded, limit=limit, bootstrap_iters=1000)
        except (OSError, RuntimeError, ValueError, AssertionError) as error:
            foreign = data == "hub" or options.include_path is not None or isinstance(error, AssertionError)
            if not foreign or isinstance(error, (UserError, NumericalError, torch.OutOfMemoryError)):
                raise
            advice = "check the network, or set eval=zeroshot_mini" if data == "hub" else "choose other tasks"
            raise UserError(f"the zero-shot tasks cannot be scored: {advice} ({one_line(error)})") from error
    return collect(output, loaded, tasks, limit)


def _manager(tasks: Sequence[str], data: str, include_path: str | None, folder: Path) -> Any:
    """Return what loads the tasks; those of offline data are written into ``folder`` first."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    if data != "offline":
        return _own_manager(False, include_path)
    known = [task for task in tasks if task in offline_tasks.NAMES]
    offline_tasks.write_tasks(known, folder, Path(lm_eval.__file__).parent / "tasks")
    own = [] if include_path is None else [include_path]
    return TaskManager(include_path=[str(folder), *own], include_defaults=False)


@functools.cache
def _adapter_class() -> Any:
    """Return the class that wraps a model for lm-eval. It refers to no model: a class outlives its last instance."""
    from lm_eval.models.huggingface import HFLM

    class Adapter(HFLM):
        """HFLM without progress bar, with the BOS policy of ``options``, and scored by :func:`loglikelihoods`.

        HFLM itself would materialise the logits of a whole batch, 6 GB with Gemma's vocabulary, and read a few of them.
        """

        def __init__(self, model: nn.Module, tokenizer: Any, options: ZeroShotOptions) -> None:
            self._options = options
            size, dtype = options.batch_size, "float32"
            super().__init__(
                pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=size, softmax_dtype=dtype
            )

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **settings: Any) -> list[int]:
            ids = super().tok_encode(string, add_special_tokens=False, **settings)
            start = [self.tokenizer.bos_token_id] if self._options.bos and add_special_tokens is not False else []
            return ids if ids[:1] == start else [*start, *ids]

        def tok_batch_encode(
            self, strings: Sequence[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            rows = [self.tok_encode(string)[-(left_truncate_len or 0) :] for string in strings]
            encoded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
            return encoded["input_ids"], encoded["attention_mask"]

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: Any, **settings: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            size = self._options.batch_size
            with self._options.phase(math.ceil(len(pairs) / size)) as advance:
                return loglikelihoods(self.model, pairs, size, self.max_length, advance)

    return Adapter


def _own_manager(offline: bool, include_path: str | None) -> Any:
    """Return lm-eval's manager of its own tasks (not if ``offline``) and of those in ``include_path``."""
    files = () if include_path is None else Path(include_path).rglob("*")
    stamp = tuple(sorted((str(file), file.stat().st_mtime_ns) for file in files if file.is_file()))
    return _manager_of(offline, include_path, stamp)


@functools.lru_cache(maxsize=4)
def _manager_of(offline: bool, include_path: str | None, stamp: tuple[tuple[str, int], ...]) -> Any:
    """Create that manager, once until a file is edited: reading the files of all tasks takes seconds."""
    from lm_eval.tasks import TaskManager

    del stamp
    with quiet_loggers("lm_eval"):
        return TaskManager(include_path=include_path, include_defaults=not offline)
