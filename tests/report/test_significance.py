"""Whether results differ by more than noise: by hand, against SciPy, and how often nothing is taken for something."""

from __future__ import annotations

import numpy as np
import pytest
from factory import record_of
from scipy import stats

from dass_exp.report.significance import (
    LEVEL,
    Outcomes,
    holm,
    paired_interval,
    paired_p_value,
    seeds_p_value,
    separated,
)
from dass_exp.report.table import build_table

FIRST, SECOND = [1.0, 5.0, 2.0, 8.0, 3.0], [0.5, 4.0, 2.5, 6.0, 3.0]


def one(outcomes):
    """The outcomes of a score with a single group of windows or documents."""
    return Outcomes((np.array(outcomes, dtype=float),))


def test_a_constant_difference_has_no_spread():
    assert paired_interval([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]) == (1.0, 1.0, 1.0)
    assert paired_p_value(one([2.0, 3.0, 4.0]), one([1.0, 2.0, 3.0])) == 0
    assert paired_p_value(one([2.0, 3.0, 4.0]), one([2.0, 3.0, 4.0])) == 1


def test_one_group_is_scipys_paired_test():
    expected = stats.ttest_rel(FIRST, SECOND)
    assert paired_p_value(one(FIRST), one(SECOND)) == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(1 - LEVEL)
    assert paired_interval(FIRST, SECOND) == pytest.approx((np.mean(FIRST) - np.mean(SECOND), *interval))


def test_groups_are_added_up_by_welch_and_satterthwaite():
    """Two groups: the test of their sum is that of two independent means, one of them with its sign turned."""
    groups = np.array(FIRST) - np.array(SECOND), np.array([0.3, -0.2, 0.9, 0.4])
    outcomes = Outcomes(groups), Outcomes(tuple(np.zeros_like(group) for group in groups))
    expected = stats.ttest_ind(groups[0], -groups[1], equal_var=False)
    assert paired_p_value(*outcomes) == pytest.approx(expected.pvalue)


def test_seeds_are_welchs_test():
    expected = stats.ttest_ind(FIRST, SECOND[:3], equal_var=False)
    assert seeds_p_value(FIRST, SECOND[:3]) == pytest.approx(expected.pvalue)
    assert seeds_p_value([1.0, 1.0], [2.0, 2.0]) == 0
    assert seeds_p_value([1.0], [2.0, 3.0]) is None


def test_bins_contribute_with_the_sign_of_their_mean():
    bins = np.array([[0.5, 0.0], [-0.1, -0.2], [0.0, 0.1]])
    (numbers,) = Outcomes((bins,)).contributions
    assert numbers == pytest.approx([0.5, -0.1 + 0.2, -0.1])
    assert numbers.mean() == pytest.approx(np.abs(bins.mean(axis=0)).sum())


def test_outcomes_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match="1 and 2 outcomes cannot be paired"):
        paired_interval([1.0], [1.0, 2.0])
    assert paired_interval([3.0], [1.0]) == (2.0, -np.inf, np.inf)


@pytest.mark.parametrize(
    ("first", "second"),
    [([1.0, 2.0], [5.0, 6.0]), ([], []), ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0])],
    ids=["two pairs", "none", "not paired"],
)
def test_pairs_of_which_nothing_is_said(first, second):
    assert paired_p_value(one(first), one(second)) is None


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_pairs_that_cannot_be_tested_do_not_count():
    known = {(1.0, 2.0): 0.04, (1.0, 9.0): None, (2.0, 9.0): None}
    assert separated([1.0, 2.0, 9.0], lambda *pair: known[pair]) == {(0, 1), (1, 0)}
    known[1.0, 9.0] = 0.9  # two tests, so 0.04 is 0.08
    assert separated([1.0, 2.0, 9.0], lambda *pair: known[pair]) == set()


# --- how often nothing is taken for something

NOISE = {
    "normal": lambda generator, shape: generator.normal(size=shape),
    "heavy tails": lambda generator, shape: generator.standard_t(2, size=shape),
    "answers": lambda generator, shape: generator.integers(0, 2, size=shape).astype(float),
}


@pytest.mark.thorough
@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("pairs", [2, 3, 4, 8, 16, 64])
def test_pairs_without_a_difference_are_told_apart_in_at_most_six_percent(pairs, noise):
    generator = np.random.default_rng(pairs)
    draws = NOISE[noise](generator, (2000, 2, pairs))
    p_values = [paired_p_value(one(first), one(second)) for first, second in draws]
    assert np.mean([p is not None and p <= LEVEL for p in p_values]) <= 0.06
    if noise == "normal" and pairs >= 3:
        assert np.mean([p <= LEVEL for p in p_values]) >= 0.035  # and the test is not idle


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_seeds_without_a_difference_are_told_apart_in_at_most_six_percent(seeds):
    draws = np.random.default_rng(seeds).normal(size=(2000, 2, seeds))
    assert np.mean([seeds_p_value(first, second) <= LEVEL for first, second in draws]) <= 0.06


@pytest.mark.thorough
@pytest.mark.parametrize("windows", [3, 16])
def test_tables_in_which_nothing_differs_have_few_marks(windows, tmp_path):
    """Whole tables of five methods: at most 6 % of them have any mark."""
    layout = {"title": "Nothing differs", "rows": "method", "columns": "pattern", "metric": "perplexity"}
    generator, marked = np.random.default_rng(windows), 0
    for _ in range(300):
        hard = generator.normal(size=windows)  # some windows are harder than others, for every method
        records = [
            record_of(method, list(3 + hard / 3 + generator.normal(size=windows) / 10))
            for method in ("wanda", "dass", "ria", "sparsegpt", "magnitude")
        ]
        table = build_table("made", layout, records, [], tmp_path)
        marked += any(value.mark for value in table.cells.values())
    assert marked <= 0.06 * 300


def test_a_difference_that_is_there_is_found(tmp_path):
    layout = {"title": "One is better", "rows": "method", "columns": "pattern", "metric": "perplexity"}
    generator = np.random.default_rng(0)
    hard = generator.normal(size=16)
    levels = {"wanda": 3.0, "dass": 2.7, "ria": 3.3, "sparsegpt": 3.31}
    records = [
        record_of(method, list(level + hard / 3 + generator.normal(size=16) / 20)) for method, level in levels.items()
    ]
    cells = build_table("made", layout, records, [], tmp_path).cells
    assert {row: cells[row, "2:4"].mark for row in levels} == {
        "wanda": "second",
        "dass": "best",
        "ria": "",
        "sparsegpt": "",
    }
