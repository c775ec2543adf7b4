"""Whether results differ by more than noise."""

import numpy as np
import pytest

from dass_exp.report.significance import Outcomes, bootstrap, pairs_differ, seeds_differ


def one(outcomes):
    """The outcomes of a score with a single group of windows or documents."""
    return Outcomes((np.array(outcomes, dtype=float),))


def test_a_constant_difference_has_no_spread():
    assert bootstrap([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]) == (1.0, 1.0, 1.0)
    assert pairs_differ(one([2.0, 3.0, 4.0]), one([1.0, 2.0, 3.0]))


def test_the_interval_covers_the_mean_and_is_the_same_each_time():
    first, second = [1.0, 5.0, 2.0, 8.0, 3.0], [0.5, 4.0, 2.5, 6.0, 3.0]
    mean, low, high = bootstrap(first, second)
    assert low < mean < high
    assert bootstrap(first, second) == (mean, low, high)


def test_outcomes_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match="1 and 2 outcomes cannot be paired"):
        bootstrap([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("first", "second"),
    [([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]), ([1.0], [2.0]), ([], []), ([1.0, 2.0], [1.0, 2.0, 3.0])],
    ids=["around zero", "one pair", "none", "not paired"],
)
def test_pairs_that_show_no_difference(first, second):
    assert not pairs_differ(one(first), one(second))


@pytest.mark.parametrize(("second", "differ"), [([4.0, 5.0, 6.0], True), ([2.0, 3.0, 4.0], False)])
def test_seeds_differ_beyond_two_standard_errors(second, differ):
    # the variance of each is 1, so two standard errors of the difference are 2 * sqrt(1/3 + 1/3) = 1.63
    assert seeds_differ([1.0, 2.0, 3.0], second) is differ
