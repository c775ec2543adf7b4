"""Test whether two results differ by more than noise: over several seeds, or by a paired bootstrap."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 5000
LEVEL = 0.95

_AT_ONCE = 500  # resamples in memory at the same time
_ZERO = 1e-12  # what rounding may leave of a difference that is zero


@dataclass(frozen=True, eq=False)
class Outcomes:
    """The outcomes of a score, which is the plain mean over groups: the windows of a text, or the documents of a task.

    A group holds one number per document, whose mean counts, or [documents, bins], whose absolute column means add up.
    """

    groups: tuple[NDArray[np.float64], ...] = ()

    @cached_property
    def resampled(self) -> NDArray[np.float64]:
        """The score of each resample, for which documents are drawn with replacement inside each group.

        The draws depend on nothing but the sizes of the groups: scores of the same windows or documents are paired.
        """
        generator = np.random.default_rng(0)
        scores: NDArray[np.float64] = np.mean([_resampled_group(group, generator) for group in self.groups], axis=0)
        return scores


def bootstrap(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Bootstrap paired outcomes: the mean of ``first - second`` and its 95 % interval (percentiles, fixed seed).

    Args:
        first: outcomes by window or document.
        second: outcomes of the same windows or documents, in the same order.

    Raises:
        ValueError: their lengths differ, or they are empty.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} outcomes cannot be paired")
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return (float(difference.mean()), *_interval(Outcomes((difference,)).resampled))


def seeds_differ(first: Sequence[float], second: Sequence[float]) -> bool:
    """Check whether the means over seeds differ by more than two standard errors of their difference (Welch)."""
    variance = np.var(first, ddof=1) / len(first) + np.var(second, ddof=1) / len(second)
    return bool(abs(np.mean(first) - np.mean(second)) > 2 * np.sqrt(variance))


def pairs_differ(first: Outcomes, second: Outcomes) -> bool:
    """Check whether the 95 % interval of a paired bootstrap excludes zero; never for fewer than two pairs a group."""
    shapes = [np.shape(group) for group in first.groups]
    if not shapes or shapes != [np.shape(group) for group in second.groups] or min(shape[0] for shape in shapes) < 2:
        return False
    low, high = _interval(first.resampled - second.resampled)
    return low > _ZERO or high < -_ZERO


def _interval(scores: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resampled_group(group: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    size, scores = len(group), []
    for _ in range(RESAMPLES // _AT_ONCE):
        picks = generator.integers(0, size, size=(_AT_ONCE, size))
        if group.ndim == 1:
            scores.append(group[picks].mean(axis=1))
        else:
            places = (picks + size * np.arange(_AT_ONCE)[:, None]).ravel()
            counts = np.bincount(places, minlength=_AT_ONCE * size).reshape(_AT_ONCE, size)
            scores.append(np.abs(counts @ group / size).sum(axis=1))
    return np.concatenate(scores)
