"""Tables and figures of retrained models: one column a scored step, one line a method, a band over seeds."""

from __future__ import annotations

import pytest
from factory import record_of

from dass_exp.report.figures import draw
from dass_exp.report.table import build_table, with_metric

LAYOUT = {
    "title": "The course",
    "rows": ["pattern", "method"],
    "columns": "step",
    "metric": "perplexity",
    "figure": {"kind": "steps"},
}
TEXT = "wikipedia_mini"


def retrained(method, curve, overlap=0.9, closed=0.5, **settings):
    """A record whose model has these perplexities behind these steps."""
    record = record_of(method, [curve[max(curve)]], **settings)
    record["config"]["retrain"] = {"name": "full", "steps": max(curve)}
    entries = [
        {"step": step, "loss": 1.0, "perplexity": {TEXT: value}, "kl": {TEXT: value / 100}}
        for step, value in curve.items()
    ]
    record["metrics"]["retrain"] = {
        "curve": entries,
        "gap_closed": {TEXT: closed} if closed is not None else {},
        "mask_overlap": {"gate": overlap, "down": overlap - 0.1},
    }
    return record


@pytest.fixture(name="records")
def records_fixture():
    return [
        record_of("dense", [20.0]),
        retrained("wanda", {0: 110.0, 10: 80.0, 100: 60.0}, seed=0),
        retrained("wanda", {0: 114.0, 10: 84.0, 100: 64.0}, seed=1),
        retrained("dass", {0: 94.0, 10: 70.0, 100: 58.0}, closed=None, seed=0),
    ]


def table_of(records, tmp_path, metric=None):
    layout = LAYOUT if metric is None else with_metric(LAYOUT, metric, "retrain")
    return build_table("retrain", layout, records, [], tmp_path)


def test_each_scored_step_is_a_column_and_dense_stands_in_all(records, tmp_path):
    table = table_of(records, tmp_path)
    assert table.columns == ["step 0", "step 10", "step 100"]
    wanda = next(row for row in table.rows if "wanda" in row)
    assert wanda == "2:4 wanda + full retraining"  # the number of steps is what the columns show
    assert [table.cells[wanda, column].mean for column in table.columns] == [112.0, 82.0, 62.0]
    assert table.cells[wanda, "step 10"].sd == pytest.approx(8**0.5)
    assert {table.cells["dense", column].mean for column in table.columns} == {20.0}


def test_other_metrics_of_windows_have_the_same_columns(records, tmp_path):
    table = table_of(records, tmp_path, "kl")
    assert [table.cells["2:4 dass + full retraining", column].mean for column in table.columns] == [0.94, 0.7, 0.58]


def test_the_overlap_of_masks_has_the_steps_at_which_they_were_chosen_again(records, tmp_path):
    for entry in records[1]["metrics"]["retrain"]["curve"][1:]:
        entry["mask_overlap"] = {"gate": 1.0 - entry["step"] / 1000, "down": 0.9}
    table = table_of(records[:2], tmp_path, "mask_overlap")
    assert table.columns == ["step 10", "step 100"]
    (wanda,) = (row for row in table.rows if "wanda" in row)
    assert [table.cells[wanda, column].mean for column in table.columns] == pytest.approx([94.5, 90.0])
    assert draw(table, tmp_path)


def test_what_became_of_gap_and_masks_is_one_number_a_record(records, tmp_path):
    by_pattern = {**LAYOUT, "rows": "method", "columns": "pattern", "metric": "mask_overlap"}
    overlap = build_table("retrain", by_pattern, records, [], tmp_path)
    closed = table_of(records, tmp_path, "gap_closed")
    assert overlap.columns == closed.columns == ["2:4"]
    assert overlap.cells["wanda + full retraining", "2:4"].mean == pytest.approx(85.0)
    assert closed.cells["wanda + full retraining", "2:4"].mean == pytest.approx(50.0)
    assert closed.cells["dass + full retraining", "2:4"] == "not recorded"
    assert closed.figure == {"kind": "bars"}


def test_the_figure_has_a_line_for_each_method_and_a_band_where_there_are_seeds(records, tmp_path):
    svg, *_ = draw(table_of(records, tmp_path), tmp_path)
    content = svg.read_text()
    assert all(
        name in content for name in ("2:4 Wanda + full retraining", "2:4 DaSS", "dense (20)", "steps of training")
    )
    assert content.count("FillBetweenPolyCollection") == 1
    assert draw(table_of(records[:1], tmp_path), tmp_path / "none") == []
