"""Pictures: both files are there and not blank, what they say, their scales and error bars, and the same bytes each time."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dass_exp.errors import UserError
from dass_exp.report.figures import draw, draw_layers
from dass_exp.report.table import Entry, ResultTable

BARS = {"kind": "bars"}
HALF, NM = {"name": "50%", "sparsity": 0.5}, {"name": "2:4", "n": 2, "m": 4}


def record_of(key: str, method: str, perplexity: float, alpha: float | None = None, **config: Any) -> dict[str, Any]:
    settings = {
        "model": {"name": "tiny"},
        "method": {"name": method} | ({} if alpha is None else {"alpha": alpha}),
        "pattern": None,
        "scope": None,
        "calibration": None,
        "seed": None,
    }
    return {
        "key": key,
        "identity": {"model": "tiny"},
        "config": settings | config,
        "metrics": {"perplexity": {"text": perplexity}},
        "cost": {},
        "sparsity": {"layers": []},
    }


def sheet_of(
    cells: dict[tuple[str, str], Entry | str], figure: Any = BARS, metric: str = "perplexity", records: Any = ()
) -> ResultTable:
    rows, columns = list(dict.fromkeys(row for row, _ in cells)), list(dict.fromkeys(column for _, column in cells))
    return ResultTable("table", "A title of the sheet", metric, rows, columns, cells, list(records), [], figure)


def one(value: float, stderr: float | None = None) -> Entry:
    return Entry((value,), stderr)


def by_samples(seeds: int) -> list[dict[str, Any]]:
    return [
        record_of(
            f"{method}{samples}{seed}",
            method,
            value + seed - samples,
            calibration={"num_samples": samples, "name": "c4"},
            pattern=NM,
            seed=seed,
        )
        for method, value in (("wanda", 100.0), ("dass", 90.0))
        for samples in (1, 4, 16)
        for seed in range(seeds)
    ]


def texts(path: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8"))


def ink(path: Path) -> int:
    """Pixels of a PNG that are not white."""
    from matplotlib.image import imread

    return int((imread(path)[..., :3].min(axis=-1) < 0.9).sum())


def bars_of_errors(path: Path) -> int:
    return len(re.findall(r'id="LineCollection_\d+"', path.read_text(encoding="utf-8")))


PLAIN = {("dense", "2:4"): one(20.1), ("wanda", "2:4"): one(60.0), ("dass", "2:4"): one(50.0)}


def test_no_picture_is_asked_for(tmp_path):
    assert draw(sheet_of(PLAIN, figure=None), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_is_told(tmp_path):
    with pytest.raises(UserError, match="pie"):
        draw(sheet_of(PLAIN, figure={"kind": "pie"}), tmp_path)


def test_bars_say_what_they_show(tmp_path):
    svg, png = draw(sheet_of(PLAIN), tmp_path / "new")
    assert (svg.name, png.name) == ("table.svg", "table.png")
    assert {"A title of the sheet", "wanda", "dass", "dense (20.1)", "2:4", "perplexity"} <= set(texts(svg))
    assert ink(png) > 10_000
    assert sorted(path.name for path in svg.parent.iterdir()) == ["table.png", "table.svg"]


def test_bars_differ_by_more_than_colour(tmp_path):
    svg, _ = draw(sheet_of(PLAIN), tmp_path)
    assert (
        len(set(re.findall(r'<pattern id="(\w+)"', svg.read_text(encoding="utf-8")))) == 1
    )  # the first bar is plain, the second hatched


@pytest.mark.parametrize(
    ("entry", "told"), [(Entry((48.0, 52.0)), "standard deviation"), (one(50.0, 3.0), "standard error")]
)
def test_error_bars_where_they_are_known(tmp_path, entry, told):
    without, _ = draw(sheet_of(PLAIN, metric="acc"), tmp_path / "a")
    svg, _ = draw(sheet_of(PLAIN | {("dass", "2:4"): entry}, metric="acc"), tmp_path / "b")
    assert bars_of_errors(svg) == bars_of_errors(without) + 1
    assert "accuracy %" in texts(svg)
    assert f"(± {told})" in texts(svg)
    assert not any("±" in text for text in texts(without))


@pytest.mark.parametrize(("worst", "logarithmic"), [(399.0, False), (410.0, True)])
def test_a_wide_range_is_drawn_on_a_log_scale(tmp_path, worst, logarithmic):
    svg, _ = draw(sheet_of({("dense", "2:4"): one(20.0), ("magnitude", "2:4"): one(worst)}), tmp_path)
    assert ("(log scale)" in texts(svg)) == logarithmic


def test_dense_of_each_column_and_cells_without_a_number(tmp_path):
    cells = PLAIN | {("dense", "4:8"): one(22.0), ("wanda", "4:8"): "failed", ("dass", "4:8"): one(math.inf)}
    svg, _ = draw(sheet_of(cells), tmp_path)
    assert {"dense", "failed", "inf"} <= set(texts(svg))
    assert draw(sheet_of({("wanda", "2:4"): "failed", ("dass", "2:4"): one(math.nan)}), tmp_path) == []


def test_models_stand_in_panels_of_their_own(tmp_path):
    cells = {
        (f"{model} {row}", "2:4"): one(value)
        for model in ("small", "large")
        for row, value in (("dense", 5.0), ("wanda", 9.0))
    }
    records = [record_of(model, "wanda", 9.0, model={"name": model}) for model in ("small", "large")]
    svg, _ = draw(sheet_of(cells, records=records), tmp_path)
    assert {"small, dense 5", "large, dense 5", "wanda", "dense"} <= set(texts(svg))


@pytest.mark.parametrize("number", [3, 4, 5])
def test_many_models_stand_two_in_a_row(tmp_path, number):
    names = [f"model{index}" for index in range(number)]
    cells = {
        (f"{model} {row}", "2:4"): one(value) for model in names for row, value in (("dense", 5.0), ("wanda", 9.0))
    }
    svg, _ = draw(
        sheet_of(cells, records=[record_of(model, "wanda", 9.0, model={"name": model}) for model in names]), tmp_path
    )
    assert {f"{model}, dense 5" for model in names} <= set(texts(svg))
    assert texts(svg).count("dense") == 1
    width, height = (float(side) for side in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg.read_text()).groups())
    assert height < 1.1 * width


def test_names_are_drawn_as_they_are(tmp_path):
    names = ["_hidden", "<b>$x^2$</b>", "wanda alpha=0.25, context=512, a long name that goes on"]
    svg, _ = draw(sheet_of({(name, "2:4"): one(50.0 + place) for place, name in enumerate(names)}), tmp_path)
    assert {"_hidden", "&lt;b&gt;$x^2$&lt;/b&gt;", names[2]} <= set(texts(svg))


def test_lines_over_samples_by_method_with_dense_as_a_level(tmp_path):
    records = [record_of("dense", "dense", 20.0), record_of("dense", "dense", 20.0), *by_samples(1)]
    figure = {"kind": "line", "x": "calibration.num_samples"}
    alone, _ = draw(sheet_of(PLAIN, figure, records=records), tmp_path / "alone")
    assert {"wanda", "dass", "dense (20)", "calibration sequences", "1", "4", "16", "perplexity"} <= set(texts(alone))
    svg, png = draw(sheet_of(PLAIN, figure, records=[records[0], *by_samples(3)]), tmp_path / "seeds")
    assert bars_of_errors(svg) == bars_of_errors(alone) + 2
    assert "(± standard deviation)" in texts(svg)
    assert ink(png) > 5_000


def test_lines_over_alpha_by_pattern(tmp_path):
    records = [
        record_of(f"{alpha}{pattern['name']}", "dass", 50 + alpha, pattern=pattern, alpha=alpha)
        for alpha in (0.0, 0.5)
        for pattern in (HALF, NM)
    ]
    svg, _ = draw(sheet_of(PLAIN, {"kind": "line", "x": "method.alpha"}, records=records), tmp_path)
    assert {"50%", "2:4", "alpha", "0.5"} <= set(texts(svg))
    assert "dass" not in texts(svg)


def test_lines_over_sparsity_are_one_a_method(tmp_path):
    records = [
        record_of(f"{method}{part}", method, 50 + 100 * part, pattern={"name": f"{part:.0%}", "sparsity": part})
        for method in ("wanda", "dass")
        for part in (0.3, 0.5)
    ]
    figure = {"kind": "line", "x": "pattern.sparsity"}
    svg, _ = draw(sheet_of(PLAIN, figure, records=[*records, record_of("nm", "wanda", 70.0, pattern=NM)]), tmp_path)
    assert {"wanda", "dass", "sparsity %", "30", "50", "wanda 2:4 (70)"} <= set(texts(svg))
    assert draw(sheet_of(PLAIN, figure, records=[record_of("dense", "dense", 20.0)]), tmp_path) == []


def test_lines_of_mixed_protocols_are_not_averaged(tmp_path):
    records = by_samples(1) + [one | {"key": f"{one['key']}-long"} for one in by_samples(1)]
    for number, one in enumerate(records):
        one["protocol"], one["calibration"] = {"context": 512 if number < 6 else 2048}, None
    sheet = replace(
        sheet_of(PLAIN, {"kind": "line", "x": "calibration.num_samples"}, records=records), mixed=("context",)
    )
    svg, _ = draw(sheet, tmp_path)
    assert {"wanda context=512", "wanda context=2048", "dass context=512", "dass context=2048"} <= set(texts(svg))
    assert bars_of_errors(svg) == 0


def test_the_same_sheet_gives_the_same_bytes(tmp_path):
    sheet = sheet_of(PLAIN | {("dass", "4:8"): one(60.0, 2.0)})
    first, second = (draw(replace(sheet), tmp_path / name) for name in ("first", "second"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_layers_by_block(tmp_path):
    record = record_of("0123", "wanda", 50.0, pattern=NM, scope="mlp")
    record["sparsity"]["layers"] = [
        {
            "name": f"decoder.{block}.mlp.{role}",
            "role": role,
            "zeros": zeros,
            "size": 100,
            "block_error": None if block == 0 else 0.1 * block,
        }
        for block in range(3)
        for role, zeros in (("gate", 50), ("up", 50), ("down", 40))
    ]
    svg, png = draw_layers(record, tmp_path)
    assert svg.name == "layers-0123.svg"
    assert {"gate, up", "down", "index of the block", "sparsity %", "tiny, wanda, 2:4, scope mlp"} <= set(texts(svg))
    assert ink(png) > 5_000


def test_a_dense_record_has_no_layers_to_draw(tmp_path):
    assert draw_layers(record_of("0123", "dense", 20.0), tmp_path) == []
