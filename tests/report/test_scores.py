"""Metrics other than perplexity and accuracy: from the record's fields to a table's cells, marks and words."""

from __future__ import annotations

import math

import numpy as np
import pytest
from factory import diverged, failed, record_of, task, write_record

from dass_exp.errors import UserError
from dass_exp.report.figures import draw
from dass_exp.report.metric_table import build_metric_table
from dass_exp.report.metrics import METRICS, metric_of
from dass_exp.report.scores import Scores
from dass_exp.report.significance import Outcomes, paired_p_value
from dass_exp.report.table import build_table, with_metric
from dass_exp.report.write import caption, format_value, long_form, markdown

PERPLEXITY = {"title": "Every method", "rows": "method", "columns": "pattern", "metric": "perplexity"}
ACCURACY = {"title": "Accuracy", "rows": ["pattern", "method"], "columns": "task", "metric": "acc"}


@pytest.fixture(name="table_of")
def table_of_fixture(results):
    def make(records, metric, layout=PERPLEXITY):
        return build_table("made", with_metric(layout, metric, "made"), records, [], results)

    return make


def answered(results, method, outcomes, **fields):
    """A stored record with these outcomes of acc by task, whose mean is its accuracy, and other fields by task."""
    tasks = {name: task(sum(values) / len(values)) | fields.get(name, {}) for name, values in outcomes.items()}
    record = record_of(method, tasks=tasks, key=method)
    write_record(record, results, {name: {"acc": list(map(float, values))} for name, values in outcomes.items()})
    return record


# Divergence


def two():
    first = diverged(record_of("wanda", [5.0, 5.5, 5.2]), [0.5, 0.7, 0.6], [0.5, 0.6, 0.55], 2.5)
    second = diverged(record_of("dass", [4.0, 4.5, 4.2]), [0.2, 0.4, 0.3], [0.7, 0.8, 0.75], 1.5)
    return [record_of("dense", [2.0, 2.1, 2.2]), first, second]


@pytest.mark.parametrize(
    ("metric", "wanda", "dass"),
    [("kl", "0.600", "0.300"), ("agreement", "55.0", "75.0"), ("perplexity_ratio", "2.500", "1.500")],
)
def test_divergence_stands_by_setting_and_is_marked_by_windows(table_of, metric, wanda, dass):
    table = table_of(two(), metric)
    assert (table.rows, table.columns) == (["wanda", "dass"], ["2:4"])  # dense does not diverge from itself
    shown = {row: format_value(table.cells[row, "2:4"], metric) for row in table.rows}
    assert shown == {"wanda": wanda, "dass": dass}
    assert table.cells["dass", "2:4"].mark == "best"
    assert caption(table).startswith(METRICS[metric].unit)
    assert "3 windows of 512 tokens" in caption(table)


def test_a_record_without_the_field_says_so_and_the_others_stand(table_of):
    table = table_of([*two(), record_of("magnitude", [9.0, 9.5, 9.9])], "kl")
    assert table.cells["magnitude", "2:4"] == "not recorded"
    assert "| Magnitude | not recorded |" in markdown(table)
    assert table.cells["dass", "2:4"].mark == "best"
    assert markdown(table_of([record_of("wanda")], "kl")).count("not recorded") == 1


def test_only_records_with_the_field_are_pooled_over_seeds(table_of):
    seeds = [diverged(record_of("wanda", seed=seed), [kl, kl], [0.5, 0.5], 1.5) for seed, kl in enumerate((0.2, 0.4))]
    value = table_of([*seeds, record_of("wanda", seed=2)], "kl").cells["wanda", "2:4"]
    assert value.values == pytest.approx((0.2, 0.4))


def test_the_text_of_eval_perplexity_is_meant_unless_another_is_named(table_of):
    record = record_of("wanda", [5.0, 6.0])
    record["metrics"]["perplexity"] = {"c4_mini": 9.0, **record["metrics"]["perplexity"]}
    record["metrics"]["window_nll"]["c4_mini"] = [8.5, 9.5]
    assert table_of([record], "perplexity").cells["wanda", "2:4"].values == (5.5,)
    assert table_of([record], "perplexity:c4_mini").cells["wanda", "2:4"].values == (9.0,)
    assert table_of([record], "perplexity:other").cells["wanda", "2:4"] == "not recorded"


@pytest.mark.parametrize("metric", ["loss", "acc:c4_mini", ""])
def test_a_metric_that_does_not_exist_is_refused(metric):
    with pytest.raises(UserError, match="metric"):
        metric_of(metric)


# Tasks


def test_flips_are_the_answers_that_changed_in_either_direction(table_of, results):
    records = [
        answered(results, "dense", {"piqa": [1, 1, 0, 0], "copa": [1, 1]}),
        answered(results, "wanda", {"piqa": [1, 0, 1, 0], "copa": [0, 1]}),
    ]
    table = table_of(records, "flips")
    assert table.rows == ["2:4 wanda"]
    shown = {column: table.cells["2:4 wanda", column].mean for column in table.columns}
    # piqa loses one of four and gains one of four; copa loses one of two
    expected = {"piqa": 50.0, "copa": 50.0, "mean": 50.0, "right to wrong": 37.5, "wrong to right": 12.5}
    assert shown == expected
    # 0, 1, 1, 0: a deviation of sqrt(1/3), over the root of four
    assert table.cells["2:4 wanda", "piqa"].stderr == pytest.approx(100 * math.sqrt(1 / 3) / 2)


def test_flips_without_their_dense_record(table_of, results):
    table = table_of([answered(results, "wanda", {"piqa": [1, 0]})], "flips")
    assert markdown(table).count("no dense record") == 1


def test_the_mean_over_tasks_is_marked_by_the_noise_inside_each_task(table_of, results):
    # each task alone is within its noise; all of them together are not
    worse, better = [1, 0, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0]
    tasks = [f"task{number}" for number in range(8)]
    given = {"wanda": dict.fromkeys(tasks, worse), "dass": dict.fromkeys(tasks, better)}
    records = [answered(results, method, outcomes) for method, outcomes in given.items()]
    table = table_of(records, "acc", ACCURACY)
    marks = {column: table.cells["2:4 dass", column].mark for column in table.columns}
    assert marks == {**dict.fromkeys(tasks, ""), "mean": "best"}
    same = table_of([records[0], answered(results, "ria", dict.fromkeys(tasks, worse))], "acc", ACCURACY)
    assert not any(value.mark for value in same.cells.values())


def test_the_mean_has_no_outcomes_if_a_task_has_none(results):
    record = record_of("wanda", tasks={"piqa": task(0.5), "copa": task(0.5)})
    write_record(record, results, {"piqa": {"acc": [0.0, 1.0]}})
    scores = {score.column: score for score in Scores("acc", [record], results).of(record)}
    assert len(scores["piqa"].outcomes.groups) == 1
    assert scores["copa"].outcomes.groups == scores["mean"].outcomes.groups == ()


def test_the_loss_on_the_right_answer_by_document(table_of, results):
    records = []
    for method, bits in (("wanda", [0.9, 0.8, 1.0]), ("dass", [0.7, 0.6, 0.8])):
        record = record_of(method, tasks={"piqa": task(0.5) | {"bits_per_byte": sum(bits) / 3}})
        write_record(record, results, {"piqa": {"acc": [1.0, 0.0, 1.0], "bits_per_byte": bits}})
        records.append(record)
    table = table_of(records, "bits_per_byte")
    assert format_value(table.cells["2:4 dass", "piqa"], "bits_per_byte") == "0.700 ± 0.058"  # 0.1 / sqrt(3)
    assert table.cells["2:4 dass", "mean"].mark == "best"
    assert "± standard error" in caption(table)


def test_a_calibration_error_is_read_and_tested_from_the_choices(table_of, results):
    # wanda is sure of what is wrong, dass of what is right
    sure = [math.log(0.95), math.log(0.05)]
    records = []
    for method, right in (("wanda", 0.0), ("dass", 1.0)):
        error = abs(0.95 - right)
        record = record_of(method, tasks={"piqa": task(right) | {"ece": error}})
        outcomes = {"acc": [right] * 6, "loglikelihoods": [sure] * 6, "gold": [0] * 6}
        write_record(record, results, {"piqa": outcomes})
        records.append(record)
    table = table_of(records, "ece")
    assert format_value(table.cells["2:4 wanda", "piqa"], "ece") == "95.0"
    assert table.cells["2:4 dass", "piqa"].mark == "best"
    assert "standard error" not in caption(table)


def test_rounding_is_no_difference():
    first = tuple(np.array([x, 0.0]) for x in (0.1, 0.2, 0.3))
    second = tuple(np.array([x, 0.0]) for x in (0.2, 0.3, 0.1))
    assert paired_p_value(Outcomes(first), Outcomes(second)) in (None, 1.0)
    assert paired_p_value(Outcomes((np.full(3, 0.1 + 0.2),)), Outcomes((np.full(3, 0.3),))) == 1.0


# All metrics


def test_every_method_by_every_metric_with_its_ranks(results):
    layout = {**PERPLEXITY, "title": "Two sizes of noise"}
    likelihoods = {"wanda": [5.0, 5.5, 5.2], "dass": [4.0, 4.5, 4.2], "ria": [4.1, 4.4, 4.2]}
    divergences = {"wanda": [0.5, 0.7, 0.6], "dass": [0.2, 0.4, 0.3], "ria": [0.1, 0.3, 0.2]}
    records = [record_of("dense", [2.0, 2.1, 2.2])]
    for method, nll in likelihoods.items():
        records.append(diverged(record_of(method, nll), divergences[method], [0.5, 0.6, 0.7], 1.5))
    table = build_metric_table("made", layout, records, [], results)
    assert table.rows == ["dense", "2:4 wanda", "2:4 dass", "2:4 ria"]
    assert table.columns == ["perplexity", "KL", "agreement %"]
    lines = markdown(table).splitlines()[2:]
    # perplexity does not separate dass and ria, the divergence does; the agreement separates none
    assert lines == [
        "| dense | 2.10 |  |  |",
        "| 2:4 Wanda | 5.23 (3) | 0.600 (3) | 60.0 (1-3) |",
        "| 2:4 DaSS | 4.23 (1-2) | <u>0.300 (2)</u> | 60.0 (1-3) |",
        "| 2:4 RIA | 4.23 (1-2) | **0.200 (1)** | 60.0 (1-3) |",
    ]
    text = caption(table)
    assert METRICS["kl"].unit in text
    assert "No record holds: same text %, distinct 4-grams %, flips %, bits per byte, ECE %, accuracy %." in text
    header, first, *_ = long_form(table)
    assert (header[-1], first[2]) == ("rank", "perplexity")


def test_ranks_are_within_a_pattern_and_over_seeds(results):
    records = [
        record_of(method, [value + seed / 10] * 2, pattern=pattern, seed=seed)
        for pattern, values in {"2:4": {"wanda": 5.0, "dass": 4.0}, "4:8": {"wanda": 3.0, "dass": 3.05}}.items()
        for method, value in values.items()
        for seed in range(3)
    ]
    cells = build_metric_table("made", PERPLEXITY, records, [failed("ria")], results).cells
    ranks = {row: value.rank for (row, _), value in cells.items() if not isinstance(value, str)}
    assert ranks == {"2:4 dass": "1", "2:4 wanda": "2", "4:8 dass": "1-2", "4:8 wanda": "1-2"}
    assert cells["2:4 ria", "perplexity"] == "failed"
    assert format_value(cells["2:4 dass", "perplexity"], "perplexity") == "4.10 ± 0.10 (1)"


@pytest.mark.parametrize(("metric", "expected"), [("generation_equal", "25.0"), ("distinct_4", "60.0")])
def test_generated_text_has_its_tables(table_of, metric, expected):
    generation = {"prompts": 2, "tokens": 8, "equal": 0.25, "distinct_4": 0.6}
    records = [record_of("wanda"), record_of("dass")]
    records[0]["metrics"]["generation"] = generation
    table = table_of(records, metric)
    assert table.columns == ["2:4"]
    assert format_value(table.cells["wanda", "2:4"], metric) == expected
    assert table.cells["dass", "2:4"] == "not recorded"
    assert caption(table).startswith(METRICS[metric].unit)


def test_a_table_says_how_many_records_come_from_a_changed_checkout(table_of):
    records = [record_of("wanda"), record_of("dass")]
    assert "changed checkout" not in caption(table_of(records, "perplexity"))
    records[1]["environment"]["git_dirty"] = True
    assert "1 of 2 records come from a changed checkout." in caption(table_of(records, "perplexity"))


# Layouts


@pytest.mark.parametrize(
    ("layout", "metric", "rows", "columns"),
    [
        (PERPLEXITY, "kl", ["method"], "pattern"),
        (PERPLEXITY, "flips", ["pattern", "method"], "task"),
        (PERPLEXITY, "cost", ["pattern", "method"], "cost"),
        (ACCURACY, "ece", ["pattern", "method"], "task"),
        (ACCURACY, "agreement", ["method"], "pattern"),
        ({"title": "The demo"}, "kl", ["method"], "pattern"),
        ({**PERPLEXITY, "columns": "cost", "metric": "cost"}, "kl", ["method"], "pattern"),
    ],
)
def test_a_layout_for_another_metric_keeps_its_axes(layout, metric, rows, columns):
    changed = with_metric(layout, metric, "made")
    assert (changed["rows"], changed["columns"], changed["metric"]) == (rows, columns, metric)
    assert METRICS[metric].title in changed["title"]


@pytest.mark.parametrize("figure", [{"kind": "bars"}, {"kind": "line", "x": "method.alpha"}, {"kind": "pareto"}])
def test_figures_show_the_metric_that_is_asked_for(table_of, tmp_path, figure):
    records = [diverged(record_of("dass", alpha=x), [x + 0.1, x + 0.2], [0.5, 0.5], 1.5) for x in (0.0, 0.5)]
    svg, *_ = draw(table_of(records, "kl", {**PERPLEXITY, "figure": figure}), tmp_path)
    assert "KL divergence, nats per token" in svg.read_text(encoding="utf-8")
