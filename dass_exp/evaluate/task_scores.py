"""Scores of zero- and few-shot tasks: what lm-eval returns, turned into numbers by task, by group and by document."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dass_exp.errors import NumericalError, UserError

ACCURACIES = ("acc", "exact_match", "em")  # at least one of them is what a task is scored by, the first that it has
_BINS = 15  # of the calibration error


@dataclass(frozen=True)
class ZeroShotResult:
    """Scores by task, and by group of tasks."""

    # acc and acc_norm, or exact_match, with standard errors; bits_per_byte, ece; version, split, limit, documents
    tasks: dict[str, dict[str, Any]]
    # by document: the outcome (0 or 1) of acc, acc_norm or exact_match, the log-likelihood of every choice (nats), the
    # index of the right one, and its loss in bits per byte
    documents: dict[str, dict[str, list[Any]]]

    @property
    def mean_acc(self) -> float:
        """Mean over tasks and groups of acc, exact_match where a task has no acc."""
        return self._mean("acc")

    @property
    def mean_acc_norm(self) -> float:
        """Mean over tasks and groups of acc_norm, acc where a task has none (WinoGrande)."""
        return self._mean("acc_norm")

    def _mean(self, metric: str) -> float:
        """Mean over what was asked for: of a group that is the group, not each of its tasks."""
        names = (metric, *ACCURACIES)
        scores = [
            next(scores[name] for name in names if name in scores)
            for scores in self.tasks.values()
            if "group" not in scores
        ]
        return sum(scores) / len(scores)


def calibration_error(loglikelihoods: Sequence[Sequence[float]], gold: Sequence[int]) -> float:
    """Return the expected calibration error of multiple-choice answers.

    The confidence of an answer is the softmax over the log-likelihoods of its choices. Answers are put in 15 equal
    bins of it; the error is the mean over answers of their bin's |accuracy - mean confidence|.
    """
    correct = [list(choices).index(max(choices)) == right for choices, right in zip(loglikelihoods, gold, strict=True)]
    return float(np.abs(calibration_gaps(loglikelihoods, correct).mean(axis=0)).sum())


def calibration_gaps(loglikelihoods: Sequence[Sequence[float]], correct: Sequence[float]) -> np.ndarray:
    """Return [documents, bins]: in the bin of its confidence, how much a document's exceeds its outcome (0 or 1).

    The sum over bins of the absolute means over documents is the expected calibration error.
    """
    gaps = np.zeros((len(correct), _BINS))
    for row, (choices, right) in enumerate(zip(loglikelihoods, correct, strict=True)):
        best = max(choices)
        confidence = 1 / math.fsum(math.exp(choice - best) for choice in choices)
        gaps[row, min(int(confidence * _BINS), _BINS - 1)] = confidence - right
    return gaps


def collect(output: Any, loaded: Mapping[str, Any], asked: Sequence[str], limit: int | None) -> ZeroShotResult:
    """Collect the scores of lm-eval's ``evaluate``.

    Args:
        output: what it returned, with samples.
        loaded: the tasks and groups that it was given.
        asked: their names in the order of the result, where a group stands before its tasks.
        limit: documents of each task; None for all.

    Raises:
        UserError: a task has no accuracy and no exact match.
        NumericalError: a log-likelihood is not finite.
    """
    scores: dict[str, dict[str, Any]] = {}
    documents: dict[str, dict[str, list[Any]]] = {}
    for name in asked:
        if (group := loaded.get("groups", {}).get(name)) is None:
            scores[name], documents[name] = _of_task(output, name, loaded["tasks"][name], limit)
            continue
        members = {task.task_name: _of_task(output, task.task_name, task, limit) for task in group.get_all_tasks()}
        scores[name], documents[name] = _of_group(output, name, members)
        scores |= {member: {**score, "group": name} for member, (score, _) in members.items()}
        documents |= {member: outcomes for member, (_, outcomes) in members.items()}
    return ZeroShotResult(scores, documents)


def _of_task(output: Any, name: str, task: Any, limit: int | None) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    samples = sorted(output["samples"][name], key=lambda sample: sample["doc_id"])
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))  # ways to read a generated answer
    metrics = _metrics(output["results"][name], filters[0])
    if not metrics:
        raise UserError(f"eval.zeroshot.tasks: {name} gave no accuracy and no exact match, so it cannot be scored")
    config, samples = output["configs"][name], [sample for sample in samples if sample["filter"] == filters[0]]
    outcomes: dict[str, list[Any]] = {
        metric: [float(sample[source]) for sample in samples]
        for metric, source in _names(output["results"][name], filters[0]).items()
    }
    outcomes |= _answers(name, task, samples)
    score = {
        **metrics,
        **_summary(outcomes),
        "version": output["versions"].get(name),
        "split": config.get("test_split") or config.get("validation_split"),
        "limit": limit,
        "num_fewshot": config.get("num_fewshot") or 0,
        "documents": len(samples),
    }
    if len(filters) > 1:
        score["filters"] = {each: _metrics(output["results"][name], each) for each in filters}
    return score, outcomes


def _names(row: Mapping[str, Any], filter_name: str) -> dict[str, str]:
    """Return the metrics that are recorded, each with its name in lm-eval."""
    here = {key.rpartition(",")[0] for key in row if key.endswith(f",{filter_name}")}
    found = [name for name in ACCURACIES if name in here][:1]
    return {
        **{"exact_match" if name == "em" else name: name for name in found},
        **({"acc_norm": "acc_norm"} if "acc_norm" in here else {}),
    }


def _metrics(row: Mapping[str, Any], filter_name: str) -> dict[str, float]:
    """Return the metrics with their standard errors, which one document alone does not have."""
    metrics: dict[str, float] = {}
    for metric, name in _names(row, filter_name).items():
        for suffix in ("", "_stderr"):
            if isinstance(value := row.get(f"{name}{suffix},{filter_name}"), (int, float)):
                metrics[f"{metric}{suffix}"] = float(value)
    return metrics


def _summary(outcomes: Mapping[str, list[Any]]) -> dict[str, float]:
    """Return bits per byte and calibration error, where the documents have what they are made of."""
    summary: dict[str, float] = {}
    if bits := outcomes.get("bits_per_byte"):
        summary["bits_per_byte"] = sum(bits) / len(bits)
    choices = outcomes.get("loglikelihoods", [])
    if "gold" in outcomes and all(len(each) > 1 for each in choices):
        summary["ece"] = calibration_error(choices, outcomes["gold"])
    return summary


def _of_group(output: Any, name: str, members: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Return lm-eval's own means of a group, and the outcomes of all its documents, one task after the other."""
    row = output["results"].get(name, {})
    filters = [key.partition(",")[2] for key in row if key.partition(",")[0] in ACCURACIES]
    if not filters:
        raise UserError(
            f"eval.zeroshot.tasks: the group {name} has no mean accuracy; name its tasks: {', '.join(members)}"
        )
    scores, documents = zip(*members.values(), strict=True)
    shared = [field for field in documents[0] if all(field in each for each in documents)]
    outcomes = {field: [value for each in documents for value in each[field]] for field in shared}
    splits = {score["split"] for score in scores}
    return {
        **_metrics(row, filters[0]),
        **_summary(outcomes),
        "version": output["versions"].get(name),
        "split": splits.pop() if len(splits) == 1 else None,
        "limit": scores[0]["limit"],
        "num_fewshot": scores[0]["num_fewshot"],
        "documents": sum(score["documents"] for score in scores),
        "tasks": len(members),
    }, outcomes


def _answers(name: str, task: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the log-likelihood of every choice, and, where all documents tell it, the right one and its loss."""
    if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        return {}
    loglikelihoods: list[Any] = []
    gold: list[Any] = []
    bits: list[Any] = []
    for sample in samples:
        choices = task.doc_to_choice(sample["doc"]) if task.OUTPUT_TYPE == "multiple_choice" else [""]
        # after them may come the answers without their question (mutual information)
        scored = [float(answer[0]) for answer in sample["filtered_resps"][: len(choices)]]
        if not all(map(math.isfinite, scored)):
            raise NumericalError(f"eval.zeroshot.tasks: {name}: the log-likelihoods {scored} are not finite")
        loglikelihoods.append(scored)
        if right := _right(task, sample["doc"], choices):
            gold.append(max(right, key=lambda index: scored[index]))
            size = len(sample["arguments"][gold[-1]][1].encode())
            bits.append(-scored[gold[-1]] / math.log(2) / size)
    if len(gold) < len(samples):
        return {"loglikelihoods": loglikelihoods}
    return {"loglikelihoods": loglikelihoods, "gold": gold, "bits_per_byte": bits}


def _right(task: Any, doc: Any, choices: Sequence[str]) -> list[int]:
    """Return the indices of the right choices; none if the document does not tell them.

    A task gives an index, an answer, or a list of them. Where the choices are contexts (WinoGrande), it is the "text"
    of the document that gives it.
    """
    if task.OUTPUT_TYPE == "loglikelihood":
        return [0]
    told = task.doc_to_text(doc) if getattr(task, "multiple_input", 0) else task.doc_to_target(doc)
    indices = [
        choices.index(each) if isinstance(each, str) and each in choices else each
        for each in (told if isinstance(told, (list, tuple)) else [told])
    ]
    valid = [index for index in indices if isinstance(index, int) and 0 <= index < len(choices)]
    return valid if len(valid) == len(indices) else []
