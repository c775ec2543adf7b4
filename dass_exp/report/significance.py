"""Whether two results differ by more than noise: by seeds where there are several, else by a paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 5000
LEVEL = 0.95


def bootstrap(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference ``first - second`` over paired outcomes, and its 95 % interval (percentiles of resampled pairs, fixed seed).

    Args:
        first: outcomes by window or document.
        second: outcomes of the same windows or documents, in the same order.

    Raises:
        ValueError: they are not paired, or there are none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} outcomes cannot be paired")
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(difference), size=(RESAMPLES, len(difference)))
    means = difference[picks].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(difference.mean()), float(low), float(high)


def seeds_differ(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two sets of seeds differ by more than two standard errors of the difference of their means (Welch)."""
    spread = np.var(first, ddof=1) / len(first) + np.var(second, ddof=1) / len(second)
    return bool(abs(np.mean(first) - np.mean(second)) > 2 * np.sqrt(spread))


def pairs_differ(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the 95 % interval of a paired bootstrap leaves out zero. One pair alone tells nothing."""
    if len(first) != len(second) or len(first) < 2:
        return False
    _, low, high = bootstrap(first, second)
    return low > 0 or high < 0
