"""Which combinations of method and stages none beats in both time and score, and how they are drawn."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from factory import record_of

from dass_exp.report.figures import draw
from dass_exp.report.pareto import Point, front, pareto_points
from dass_exp.report.table import build_table

LAYOUT = {
    "title": "Against time",
    "rows": "method",
    "columns": "pattern",
    "metric": "perplexity",
    "figure": {"kind": "pareto"},
}


def combination(method, seconds, perplexity, seed=0, pattern="2:4", **stages):
    record = record_of(method, [perplexity, perplexity], pattern, seed)
    record["key"] = f"{record['key']} {seconds} {stages}"
    record["config"] |= {group: {"name": name} for group, name in stages.items()}
    record["identity"] |= {group: {"class": name} for group, name in stages.items()}
    record["cost"]["prune_s"] = seconds
    return record


def test_the_front_is_what_nothing_beats_in_both_numbers():
    numbers = {
        "fast": (1.0, 50.0),
        "worse": (2.0, 60.0),
        "better": (3.0, 40.0),
        "same": (4.0, 40.0),
        "best": (9.0, 30.0),
    }
    assert front({label: Point("dass", "", *pair) for label, pair in numbers.items()}) == ["fast", "better", "best"]


def test_higher_may_be_better():
    numbers = {"fast": (1.0, 90.0), "worse": (2.0, 50.0), "best": (3.0, 95.0)}
    points = {label: Point("dass", "", *pair) for label, pair in numbers.items()}
    assert front(points, higher=True) == ["fast", "best"]


def test_points_are_means_over_seeds_of_what_has_the_same_stages():
    records = [
        combination("dass", 10.0, 90.0),
        combination("dass", 20.0, 50.0, repair="least_squares"),
        combination("dass", 30.0, 40.0, seed=1, repair="least_squares"),
        combination("dass", 5.0, 20.0, pattern="4:8"),
    ]
    table = SimpleNamespace(records=records, headlines={record["key"]: 7.0 for record in records[:3]})
    points = pareto_points(table, "2:4")
    assert sorted((point.method, point.stages, point.seconds) for point in points.values()) == [
        ("dass", "", 10.0),
        ("dass", "least_squares", 25.0),
    ]
    table.headlines[records[0]["key"]] = math.inf
    assert len(pareto_points(table, "2:4")) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("patterns", [("2:4",), ("2:4", "4:8")])
def test_the_figure_names_methods_and_stages_once_and_no_setting(patterns, tmp_path):
    records = [
        combination(method, seconds, score, pattern=pattern, **stages)
        for pattern in patterns
        for method, seconds, score, stages in [
            ("wanda", 10.0, 100.0, {}),
            ("dass", 12.0, 90.0, {}),
            ("dass", 20.0, 50.0, {"permute": "neurons", "repair": "least_squares"}),
        ]
    ]
    table = build_table("frontier", LAYOUT, [record_of("dense", [20.0, 20.0]), *records], [], tmp_path)
    svg, png, _ = draw(table, tmp_path)
    text = svg.read_text()
    for word in ("Wanda", "DaSS", "neurons + least squares", "no stage", "seconds to prune", *patterns):
        assert text.count(f">{word}<") + text.count(f"> {word}<") + text.count(f">{word} (") == (
            len(patterns) if word == "seconds to prune" else 1
        ), word
    assert "alpha=" not in text
    assert png.stat().st_size > 10_000
