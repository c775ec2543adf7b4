"""Pictures: both files are there and not blank, what they say, scales and error bars, the same bytes each time."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factory import record_of

from dass_exp.errors import UserError
from dass_exp.report.figures import draw, draw_layers
from dass_exp.report.table import ResultTable, TableValue

BARS = {"kind": "bars"}
SAMPLES, ALPHA, SPARSITY = (
    {"kind": "line", "x": x} for x in ("calibration.num_samples", "method.alpha", "pattern.sparsity")
)


def one(value: float, stderr: float | None = None) -> TableValue:
    return TableValue((value,), stderr)


PLAIN = {("dense", "2:4"): one(20.1), ("wanda", "2:4"): one(60.0), ("dass", "2:4"): one(50.0)}


def table_of(cells: Any = PLAIN, figure: Any = BARS, metric: str = "perplexity", **fields: Any) -> ResultTable:
    rows, columns = list(dict.fromkeys(row for row, _ in cells)), list(dict.fromkeys(column for _, column in cells))
    records = fields.pop("records", [])
    fields.setdefault("headlines", headlines(records))
    return ResultTable("table", "A title of the table", metric, rows, columns, cells, records, [], figure, **fields)


def headlines(records: Any) -> dict[str, float]:
    """The perplexity of each record by its key."""
    return {record["key"]: next(iter(record["metrics"]["perplexity"].values())) for record in records}


def by_samples(seeds: int = 1, **settings: Any) -> list[dict[str, Any]]:
    """Records of Wanda and DaSS with 1, 4 and 16 calibration sequences."""
    return [
        record_of(method, [value + seed - samples], seed=seed, num_samples=samples, **settings)
        for method, value in (("wanda", 100.0), ("dass", 90.0))
        for samples in (1, 4, 16)
        for seed in range(seeds)
    ]


def panels(models: list[str]) -> ResultTable:
    """A table with a dense row and one of Wanda for each model."""
    values = {"dense": 5.0, "wanda": 9.0}
    cells = {(f"{model} {row}", "2:4"): one(value) for model in models for row, value in values.items()}
    return table_of(cells, records=[record_of("wanda", model=model) for model in models])


def texts(path: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8"))


def drawn(table: ResultTable, folder: Path) -> set[str]:
    """The texts in the picture of a table."""
    svg, *_ = draw(table, folder)
    return set(texts(svg))


def ink(path: Path) -> int:
    """Pixels of a PNG that are not white."""
    from matplotlib.image import imread

    return int((imread(path)[..., :3].min(axis=-1) < 0.9).sum())


def error_bars(path: Path) -> int:
    return len(re.findall(r'id="LineCollection_\d+"', path.read_text(encoding="utf-8")))


def test_no_picture_is_asked_for(tmp_path):
    assert draw(table_of(figure=None), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match="pie"):
        draw(table_of(figure={"kind": "pie"}), tmp_path)


def test_bars_say_what_they_show(tmp_path):
    svg, png, pdf = draw(table_of(), tmp_path / "new")
    assert "A title of the table" not in texts(svg)  # it stands above the picture, wherever that is shown
    assert b"A title of the table" in png.read_bytes() and pdf.read_bytes().startswith(b"%PDF")
    assert {"Wanda", "DaSS", "dense (20.1)", "2:4", "perplexity"} <= set(texts(svg))
    assert ink(png) > 10_000
    assert sorted(path.name for path in svg.parent.iterdir()) == ["table.pdf", "table.png", "table.svg"]
    # bars differ by more than colour: the first is plain, the second hatched
    assert len(set(re.findall(r'<pattern id="(\w+)"', svg.read_text(encoding="utf-8")))) == 1


@pytest.mark.parametrize(
    ("value", "kind"), [(TableValue((48.0, 52.0)), "standard deviation"), (one(50.0, 3.0), "standard error")]
)
def test_error_bars_where_they_are_known(tmp_path, value, kind):
    without, *_ = draw(table_of(metric="acc"), tmp_path / "a")
    svg, *_ = draw(table_of(PLAIN | {("dass", "2:4"): value}, metric="acc"), tmp_path / "b")
    assert error_bars(svg) == error_bars(without) + 1
    assert {"accuracy %", f"(± {kind})"} <= set(texts(svg))
    assert not any("±" in text for text in texts(without))


@pytest.mark.parametrize(("worst", "logarithmic"), [(199.0, False), (200.0, True)])
def test_a_wide_range_is_drawn_on_a_log_scale(tmp_path, worst, logarithmic):
    table = table_of({("dense", "2:4"): one(20.0), ("magnitude", "2:4"): one(worst)})
    assert ("(log scale)" in drawn(table, tmp_path)) == logarithmic


def test_dense_of_each_column_and_cells_without_a_number(tmp_path):
    cells = PLAIN | {("dense", "4:8"): one(22.0), ("wanda", "4:8"): "failed", ("dass", "4:8"): one(math.inf)}
    assert {"dense", "failed", "inf"} <= drawn(table_of(cells), tmp_path)
    assert draw(table_of({("wanda", "2:4"): "failed", ("dass", "2:4"): one(math.nan)}), tmp_path) == []


@pytest.mark.thorough
@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_models_have_panels_of_their_own(tmp_path, number):
    models = [f"model{index}" for index in range(number)]
    svg, *_ = draw(panels(models), tmp_path)
    assert {"Wanda", *(f"{model}, dense 5" for model in models)} <= set(texts(svg))
    assert texts(svg).count("dense") == 1
    width, height = (float(side) for side in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg.read_text()).groups())
    assert height < 1.3 * width


def test_names_are_drawn_as_they_are(tmp_path):
    names = ["_hidden", "<b>$x^2$</b>", "wanda alpha=0.25, context=512, a long name that goes on"]
    texts = drawn(table_of({(name, "2:4"): one(50.0 + place) for place, name in enumerate(names)}), tmp_path)
    assert {"_hidden", "&lt;b&gt;$x^2$&lt;/b&gt;", names[2].replace("wanda", "Wanda")} <= texts


@pytest.mark.thorough
def test_lines_over_samples_by_method_with_dense_as_a_level(tmp_path):
    dense, axes = record_of("dense", [20.0]), ("method", "calibration.num_samples")
    alone, *_ = draw(table_of(figure=SAMPLES, records=[dense, dense, *by_samples()], axes=axes), tmp_path / "alone")
    assert {"Wanda", "DaSS", "dense (20)", "calibration sequences", "1", "4", "16", "perplexity"} <= set(texts(alone))
    svg, png, _ = draw(table_of(figure=SAMPLES, records=[dense, *by_samples(3)], axes=axes), tmp_path / "seeds")
    assert error_bars(svg) == error_bars(alone) + 2
    assert "(± standard deviation)" in texts(svg)
    assert ink(png) > 5_000


def test_lines_over_alpha_by_pattern(tmp_path):
    records = [record_of("dass", [50 + x], pattern, alpha=x) for x in (0.0, 0.5) for pattern in ("50%", "2:4")]
    table = table_of(figure=ALPHA, records=records, axes=("method.alpha", "pattern"))
    labels = drawn(table, tmp_path)
    assert {"50%", "2:4", "alpha", "0.5"} <= labels
    assert "DaSS" not in labels
    without_alpha = [record_of("wanda", [60.0], pattern) for pattern in ("50%", "2:4")]
    assert {"Wanda 50% (60)", "Wanda 2:4 (60)"} <= drawn(
        replace(table, records=[*records, *without_alpha], headlines=headlines([*records, *without_alpha])), tmp_path
    )


def test_lines_of_several_models_and_of_another_setting_of_the_method(tmp_path):
    settings = [(model, kind) for model in ("small", "large") for kind in ("input", "output")]
    records = [
        record_of("dass", [50.0 + x], model=model, alpha=x, granularity=kind)
        for model, kind in settings
        for x in (0.0, 0.5)
    ]
    labels = drawn(table_of(figure=ALPHA, records=records, axes=("method", "pattern")), tmp_path)
    assert {f"{model} DaSS granularity={kind}" for model, kind in settings} <= labels


def test_lines_over_sparsity_are_one_a_method(tmp_path):
    records = [record_of(method, [50 + part], pattern=f"{part}%") for method in ("wanda", "dass") for part in (30, 50)]
    table = table_of(figure=SPARSITY, axes=("method", "pattern"), records=[*records, record_of("wanda", [70.0])])
    assert {"Wanda", "DaSS", "sparsity %", "30", "50", "Wanda 2:4 (70)"} <= drawn(table, tmp_path)
    assert draw(replace(table, records=[record_of("dense")]), tmp_path) == []


def test_lines_of_mixed_protocols_are_not_averaged(tmp_path):
    records = [*by_samples(), *by_samples(context=2048)]
    axes, mixed = ("method", "calibration.num_samples"), ("eval.perplexity.context",)
    svg, *_ = draw(table_of(figure=SAMPLES, records=records, axes=axes, mixed=mixed), tmp_path)
    assert {f"{method} context={context}" for method in ("Wanda", "DaSS") for context in (512, 2048)} <= set(texts(svg))
    assert error_bars(svg) == 0


def test_the_same_table_gives_the_same_bytes(tmp_path):
    table = table_of(PLAIN | {("dass", "4:8"): one(60.0, 2.0)})
    first, second = (draw(replace(table), tmp_path / name) for name in ("first", "second"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_layers_by_block(tmp_path):
    record = record_of("wanda", key="0123")
    record["sparsity"]["layers"] = [
        {"name": f"decoder.{block}.mlp.{role}", "role": role, "zeros": zeros, "size": 100, "block_error": error}
        for block, error in enumerate((None, 0.1, 0.2))
        for role, zeros in (("gate", 50), ("up", 50), ("down", 40))
    ]
    svg, png, _ = draw_layers(record, tmp_path)
    assert svg.name == "layers-0123.svg"
    assert {"gate, up", "down", "index of the block", "sparsity %"} <= set(texts(svg))
    assert ink(png) > 5_000


def test_a_dense_record_has_no_layers_to_draw(tmp_path):
    assert draw_layers(record_of("dense"), tmp_path) == []


@pytest.mark.thorough
def test_values_on_a_log_axis_are_dots_and_others_bars(tmp_path):
    def shapes(cells, folder):
        svg, *_ = draw(table_of(cells), tmp_path / folder)
        content = svg.read_text()
        return content.count('id="PathCollection'), len(re.findall(r'id="patch_\d+"', content)), "log scale" in content

    wide = shapes({("dense", "2:4"): one(20.0), ("magnitude", "2:4"): one(730.0), ("dass", "2:4"): one(90.0)}, "wide")
    narrow = shapes(PLAIN, "narrow")
    assert wide[2] and not narrow[2]
    assert narrow[1] > wide[1]  # bars are patches
