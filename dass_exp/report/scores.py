"""Read a metric from records: numbers, standard errors, and outcomes by window or document for paired tests."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dass_exp.evaluate.task_scores import ACCURACIES, calibration_gaps
from dass_exp.report.load import Record, asked_tasks, documents, evaluation_of, is_dense
from dass_exp.report.metrics import metric_of
from dass_exp.report.significance import Outcomes

MEAN = "mean"
# Fields of a record's metrics: where a metric of windows stands, and where its outcomes by window stand.
_WINDOWS = {
    "perplexity": ("perplexity", "window_nll"),
    "kl": ("divergence.kl", "window_kl"),
    "agreement": ("divergence.agreement", "window_agreement"),
    "perplexity_ratio": ("divergence.perplexity_ratio", "window_nll"),
}
_GENERATION = {"generation_equal": "equal", "distinct_4": "distinct_4"}  # fields of a record's generation
# Columns of a cost table: label and unit of each field of a record's cost.
_COSTS = {
    "prune_s": ("seconds to prune", 1.0),
    "peak_rss_bytes": ("peak memory GB", 1e-9),
    "peak_gpu_bytes": ("peak GPU memory GB", 1e-9),
}
_DIRECTIONS = {"right to wrong": 1.0, "wrong to right": -1.0}  # dense minus pruned outcome of a document


class Score(NamedTuple):
    """One number of one record; ``column`` is its task or cost, empty for a metric of windows."""

    column: str
    value: float
    stderr: float | None = None
    outcomes: Outcomes = Outcomes()


class Scores:
    """Reads a metric from records; flips need the dense record of the same model and evaluation among them.

    ``by_step`` reads a metric of windows behind each step of a retraining at which the model was scored.
    """

    def __init__(self, metric: str, records: Sequence[Record], results: Path, by_step: bool = False) -> None:
        self._name, _, self._text = metric.partition(":")
        self._by_step = by_step
        self._metric = metric_of(metric)
        self._dense = {evaluation_of(record): record for record in records if is_dense(record)}
        self._documents = cache(lambda key: documents(results, key))

    def of(self, record: Record) -> list[Score]:
        """Return the scores of a record by task or cost, a mean over tasks included; empty if it holds none."""
        if self._metric.source == "cost":
            known = {name: column for name, column in _COSTS.items() if record["cost"].get(name) is not None}
            return [Score(label, record["cost"][name] * unit) for name, (label, unit) in known.items()]
        read = {
            "windows": self._windows,
            "generation": self._generation,
            "retrain": self._retrain,
            "tasks": self._tasks,
        }
        return list(read[self._metric.source](record))

    def headline(self, record: Record) -> Score | None:
        """Return the one score that stands for a record: of its windows, its mean over tasks, or its first cost."""
        scores = self.of(record)
        return next((score for score in scores if score.column == MEAN), scores[0] if scores else None)

    def absence(self, record: Record) -> str:
        """Say in a word or three why a record has no score, as its cell shows it."""
        scored = bool(record["metrics"].get("tasks"))
        return (
            "no dense record" if self._name == "flips" and scored and self._dense_of(record) is None else "not recorded"
        )

    def _windows(self, record: Record) -> Iterator[Score]:
        metrics = record["metrics"]
        if self._by_step and "retrain" in metrics:
            yield from self._steps(record)
            return
        field, by_window = _WINDOWS[self._name]
        text = self._text or main_text(record)
        value = metrics.get(field.partition(".")[0], {}).get(text)
        if "." in field:
            value = (value or {}).get(field.partition(".")[2])
        if value is not None:
            paired = metrics.get(by_window, {}).get(text) or ()
            yield Score("", self._metric.scale * value, None, _group(paired, self._metric.scale))

    def _generation(self, record: Record) -> Iterator[Score]:
        if (generation := record["metrics"].get("generation")) is not None:
            yield Score("", self._metric.scale * generation[_GENERATION[self._name]])

    def _steps(self, record: Record) -> Iterator[Score]:
        for entry in record["metrics"]["retrain"]["curve"]:
            value = entry.get(self._name, {}).get(self._text or main_text(record))
            if value is not None:
                yield Score(step_label(entry["step"]), self._metric.scale * value)

    def _retrain(self, record: Record) -> Iterator[Score]:
        course = record["metrics"].get("retrain", {})
        parts = course.get(self._name) or {}
        if self._by_step:
            curve = course.get("curve", [])
            known = {entry["step"]: shares for entry in curve if (shares := entry.get(self._name))}
            if parts and not known:  # records of before have the last only
                known = {curve[-1]["step"]: parts}
            for step, shares in known.items():
                yield Score(step_label(step), self._metric.scale * _of_roles(shares))
        elif self._name == "gap_closed":
            if (found := parts.get(self._text or main_text(record))) is not None:
                yield Score("", self._metric.scale * found)
        elif parts:
            yield Score("", self._metric.scale * _of_roles(parts))

    def _tasks(self, record: Record) -> list[Score]:
        tasks = asked_tasks(record)
        if self._name == "flips":
            return self._flips(record, tasks)
        scores = [score for task in tasks if (score := self._task(record, task)) is not None]
        mean = record["metrics"].get(f"mean_{self._name}")
        return [*scores, *_mean(scores, None if mean is None else self._metric.scale * mean)] if scores else []

    def _task(self, record: Record, task: str) -> Score | None:
        values, outcomes = record["metrics"]["tasks"][task], self._documents(record["key"]).get(task, {})
        names = (self._name, *ACCURACIES) if self._name.startswith("acc") else (self._name,)
        name = next((name for name in names if name in values), None)
        if name is None:
            return None
        if name == "ece":
            likelihoods, correct = outcomes.get("loglikelihoods") or (), outcomes.get("acc") or ()
            paired = Outcomes()
            if len(likelihoods) == len(correct) > 0:
                paired = Outcomes((self._metric.scale * calibration_gaps(likelihoods, correct),))
            return Score(task, self._metric.scale * values[name], None, paired)
        paired = _group(outcomes.get(name) or (), self._metric.scale)
        known = values.get(f"{name}_stderr")
        error = _standard_error(paired) if known is None else self._metric.scale * known
        return Score(task, self._metric.scale * values[name], error, paired)

    def _flips(self, record: Record, tasks: Mapping[str, Any]) -> list[Score]:
        """Return the share of documents whose outcome is not the dense model's, and both directions on their own."""
        dense = self._dense_of(record)
        if dense is None or is_dense(record):
            return []
        ours, theirs = self._documents(record["key"]), self._documents(dense["key"])
        lost = {
            task: gone
            for task in tasks
            if (gone := outcomes_lost(theirs.get(task, {}), ours.get(task, {}))) is not None
        }
        if not lost:
            return []
        scores = [_of_documents(task, self._metric.scale * (gone != 0)) for task, gone in lost.items()]
        directions = [
            _mean([_of_documents(task, self._metric.scale * (gone == sign)) for task, gone in lost.items()], name=name)
            for name, sign in _DIRECTIONS.items()
        ]
        return [*scores, *_mean(scores), *(score for direction in directions for score in direction)]

    def _dense_of(self, record: Record) -> Record | None:
        return self._dense.get(evaluation_of(record))


def _of_roles(shares: Mapping[str, float]) -> float:
    return math.fsum(shares.values()) / len(shares)


def step_label(step: int) -> str:
    """Return the column of a step of a retraining."""
    return f"step {step}"


def main_text(record: Record) -> str:
    """Return the name of the text that ``eval.perplexity`` scores, which the record's protocol describes."""
    scored, named = record["metrics"].get("perplexity", {}), record["protocol"].get("dataset", "")
    return str(named if named in scored else next(iter(scored), named))


def outcomes_lost(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> np.ndarray | None:
    """Return by document of a task 1 where only the first is right, -1 where only the second is, else 0.

    None if the two were not scored on the same number of documents.
    """
    name = next((name for name in ACCURACIES if dense.get(name) and pruned.get(name)), None)
    if name is None or len(dense[name]) != len(pruned[name]):
        return None
    return np.sign(np.asarray(dense[name], dtype=np.float64) - np.asarray(pruned[name], dtype=np.float64))


def _group(outcomes: Sequence[float], scale: float) -> Outcomes:
    return Outcomes((scale * np.asarray(outcomes, dtype=np.float64),)) if len(outcomes) else Outcomes()


def _of_documents(column: str, outcomes: np.ndarray) -> Score:
    paired = Outcomes((outcomes,))
    return Score(column, float(outcomes.mean()), _standard_error(paired), paired)


def _standard_error(outcomes: Outcomes) -> float | None:
    """Return the standard error of the mean of a single group of two documents or more."""
    if len(outcomes.groups) != 1 or len(outcomes.groups[0]) < 2:
        return None
    return float(np.std(outcomes.groups[0], ddof=1) / math.sqrt(len(outcomes.groups[0])))


def _mean(scores: Sequence[Score], value: float | None = None, name: str = MEAN) -> list[Score]:
    """Return the mean over tasks, which are independent; ``value`` where the record holds it."""
    errors = [score.stderr for score in scores]
    variance = [error**2 for error in errors if error is not None]
    error = math.sqrt(math.fsum(variance)) / len(scores) if len(variance) == len(scores) else None
    complete = all(score.outcomes.groups for score in scores)
    paired = Outcomes(tuple(group for score in scores for group in score.outcomes.groups) if complete else ())
    mean = math.fsum(score.value for score in scores) / len(scores)
    return [Score(name, mean if value is None else value, error, paired)]
