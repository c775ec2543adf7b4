"""Test whether results differ by more than noise: Welch's t over seeds, a t on paired differences otherwise."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05  # share of false marks in a column of a table where nothing differs
MIN_PAIRS = 3  # windows or documents of a group, below which nothing is said
_ZERO = 1e-12  # what rounding may leave of a difference that is zero

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Outcomes:
    """The outcomes of a score, which is the plain mean over groups: the windows of a text, or the documents of a task.

    A group holds one number per document, whose mean counts, or [documents, bins], whose absolute column means add up.
    """

    groups: tuple[NDArray[np.float64], ...] = ()

    @cached_property
    def contributions(self) -> tuple[NDArray[np.float64], ...]:
        """One number per document and group, whose mean is the score of the group.

        Of [documents, bins] it is each bin with the sign of its mean: the sum of absolute means, linear around them.
        """
        return tuple(group if group.ndim == 1 else group @ np.sign(group.mean(axis=0)) for group in self.groups)


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of ``first - second`` over pairs and its 95 % interval by Student's t; infinite for one pair.

    Args:
        first: outcomes by window or document.
        second: outcomes of the same windows or documents, in the same order.

    Raises:
        ValueError: their lengths differ, or they are empty.
    """
    from scipy.stats import t as student

    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} outcomes cannot be paired")
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    mean, count = float(difference.mean()), len(difference)
    if count == 1:
        return mean, -math.inf, math.inf
    half = float(student.ppf(1 - LEVEL / 2, count - 1) * difference.std(ddof=1) / math.sqrt(count))
    return mean, mean - half, mean + half


def seeds_p_value(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the p-value of Welch's t-test of the means over seeds; None for fewer than two seeds."""
    if min(len(first), len(second)) < 2:
        return None
    parts = [float(np.var(values, ddof=1)) / len(values) for values in (first, second)]
    return _p_value(float(np.mean(first) - np.mean(second)), parts, [len(first) - 1, len(second) - 1])


def paired_p_value(first: Outcomes, second: Outcomes) -> float | None:
    """Return the p-value of a t-test on paired differences, of the mean over groups where there are several.

    None if the outcomes cannot be paired, or for fewer than :data:`MIN_PAIRS` pairs in a group.
    """
    shapes = [np.shape(group) for group in first.groups]
    if not shapes or shapes != [np.shape(group) for group in second.groups]:
        return None
    if min(shape[0] for shape in shapes) < MIN_PAIRS:
        return None
    differences = [one - other for one, other in zip(first.contributions, second.contributions, strict=True)]
    mean = math.fsum(each.mean() for each in differences) / len(differences)
    parts = [float(each.var(ddof=1)) / len(each) / len(differences) ** 2 for each in differences]
    return _p_value(mean, parts, [len(each) - 1 for each in differences])


def _p_value(mean: float, parts: Sequence[float], freedom: Sequence[int]) -> float:
    """Two-sided p-value of a mean whose variance is the sum of independent ``parts`` (Welch-Satterthwaite)."""
    from scipy.stats import t as student

    variance = math.fsum(parts)
    if variance <= _ZERO**2:
        return 0.0 if abs(mean) > _ZERO else 1.0
    degrees = variance**2 / math.fsum(part**2 / free for part, free in zip(parts, freedom, strict=True))
    return float(2 * student.sf(abs(mean) / math.sqrt(variance), degrees))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number: Holm, Scand. J. Statist. 6 (1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def separated(values: Sequence[Value], p_value: Callable[[Value, Value], float | None]) -> set[tuple[int, int]]:
    """Return which values differ by more than noise, as pairs of their places, each pair in both orders.

    The p-values of all pairs that can be tested are adjusted together, so that a column in which nothing differs has a
    false mark in at most :data:`LEVEL` of all cases.
    """
    tested = {
        (one, other): p
        for one, other in itertools.combinations(range(len(values)), 2)
        if (p := p_value(values[one], values[other])) is not None
    }
    found = {pair for pair, p in zip(tested, holm(list(tested.values())), strict=True) if p <= LEVEL}
    return found | {(other, one) for one, other in found}
