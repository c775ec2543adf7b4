"""One style per method in all figures, and the names of methods as papers write them."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import permutations

import pytest
import test_figures
from factory import record_of
from support import CONF
from test_figures import one, table_of

from dass_exp.report import styles
from dass_exp.report.figures import draw
from dass_exp.report.styles import display, styles_of

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml") if path.stem != "dense")


def test_every_method_has_a_name_and_a_style_that_no_other_has():
    chosen = styles_of(METHODS)
    for aspect in ("colour", "hatch", "marker"):
        assert len({getattr(style, aspect) for style in chosen.values()}) == len(METHODS), aspect
    assert all(display(method) != method for method in METHODS)
    free = [style.colour for style in styles._FREE]
    assert len({*free, *(style.colour for style in chosen.values())}) == len(free) + len(METHODS)


def test_a_style_does_not_depend_on_the_other_rows_or_their_order():
    (alone,) = styles_of(["wanda"]).values()
    for labels in permutations(["wanda", "4:8 dass", "mine"]):
        chosen = styles_of(labels, ["mine"])
        assert chosen["wanda"] == alone
        assert chosen["mine"] == styles_of(["2:4 mine alpha=1"], ["mine"])["2:4 mine alpha=1"]


def test_rows_of_one_method_share_its_colour_more_or_less():
    labels = ["dass", "dass alpha=0.5, context=512", "dass + neurons"]
    chosen = styles_of(labels)
    assert chosen["dass"] == styles_of(["dass"])["dass"]
    assert len({style.marker for style in chosen.values()}) == 1
    for aspect in ("colour", "hatch", "dash"):
        assert len({getattr(style, aspect) for style in chosen.values()}) == 3, aspect
    # paler: every part is nearer to 255
    parts = [[int(chosen[label].colour[at : at + 2], 16) for at in (1, 3, 5)] for label in sorted(labels)]
    assert all(dark <= pale for dark, pale in zip(parts[0], parts[2], strict=True))


def test_names_without_a_style_get_different_ones_while_there_are_some():
    names = [f"plugin{number}" for number in range(len(styles._FREE))]
    chosen = styles_of(names)
    assert len({style.colour for style in chosen.values()}) == len(names)
    assert len(styles_of([*names, "one more"])) == len(names) + 1


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("2:4 dass", "2:4 DaSS"),
        (
            "sparsegpt + neurons + least_squares lam=0.1, context=512",
            "SparseGPT + neurons + least squares lam=0.1, context=512",
        ),
        ("wanda, context=512", "Wanda, context=512"),
        ("dense", "dense"),
        ("50% magnitude", "50% Magnitude"),
        ("dass alpha=0.5 + alpha", "DaSS alpha=0.5 + AlphaPruning"),
        ("my_wanda wandas method=wanda wanda.x", "my_wanda wandas method=wanda wanda.x"),
    ],
)
def test_methods_are_named_as_papers_write_them(label, shown):
    assert display(label) == shown


def colours(path) -> set[str]:
    return set(re.findall(r'(?:fill|stroke)(?:: |=")(#[0-9a-f]{6})', path.read_text(encoding="utf-8")))


@pytest.mark.thorough
def test_a_method_has_its_colour_in_figures_of_every_kind(tmp_path):
    wanda = styles_of(["wanda"])["wanda"].colour.lower()
    bars = table_of({("dass", "2:4"): one(5.0), ("wanda", "2:4"): one(6.0)})
    other = table_of({("wanda", "2:4"): one(6.0), ("magnitude", "2:4"): one(9.0)})
    records = test_figures.by_samples()
    lines = table_of(figure=test_figures.SAMPLES, records=records, axes=("method", "calibration.num_samples"))
    costly = [record_of("wanda", [9.0]), record_of("dass", [5.0])]
    points = table_of({("wanda", "2:4"): one(9.0)}, {"kind": "pareto"}, records=costly)
    for number, table in enumerate((bars, other, lines, points)):
        svg, *_ = draw(table, tmp_path / str(number))
        assert wanda in colours(svg)
    without, *_ = draw(replace(points, records=costly[1:]), tmp_path / "without")
    assert wanda not in colours(without)


def test_shares_stay_on_a_linear_axis(tmp_path):
    cells = {("dass", "2:4"): one(2.0), ("wanda", "2:4"): one(60.0)}
    assert "(log scale)" not in test_figures.drawn(table_of(cells, metric="flips"), tmp_path / "flips")
    assert "(log scale)" in test_figures.drawn(table_of(cells, metric="kl"), tmp_path / "kl")
