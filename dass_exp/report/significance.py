"""Test whether two results differ by more than noise: over several seeds, or by a paired bootstrap."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 5000
LEVEL = 0.95


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
    picks = np.random.default_rng(0).integers(0, len(difference), size=(RESAMPLES, len(difference)))
    means = difference[picks].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(difference.mean()), float(low), float(high)


def seeds_differ(first: Sequence[float], second: Sequence[float]) -> bool:
    """Check whether the means over seeds differ by more than two standard errors of their difference (Welch)."""
    variance = np.var(first, ddof=1) / len(first) + np.var(second, ddof=1) / len(second)
    return bool(abs(np.mean(first) - np.mean(second)) > 2 * np.sqrt(variance))


def pairs_differ(first: Sequence[float], second: Sequence[float]) -> bool:
    """Check whether the 95 % interval of a paired bootstrap excludes zero; never for fewer than two pairs."""
    if len(first) != len(second) or len(first) < 2:
        return False
    _, low, high = bootstrap(first, second)
    return low > 0 or high < 0
