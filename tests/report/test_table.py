"""Tables of sweeps from hand-made records: layout, noise, marks, refusal to mix, failures, the written forms."""

import csv
import shutil
import subprocess

import pytest
from factory import failed, record_of, task, write_record

from dass_exp.errors import UserError
from dass_exp.report import published
from dass_exp.report.figures import draw
from dass_exp.report.load import SweepCell
from dass_exp.report.metric_table import build_metric_table
from dass_exp.report.page import Section, write_page
from dass_exp.report.protocol_check import Protocols
from dass_exp.report.table import TableValue, build_table
from dass_exp.report.write import (
    caption,
    format_value,
    latex,
    latex_published,
    long_form,
    markdown,
    tex,
    to_csv,
    write_table,
)

LAYOUT = {
    "title": "Perplexity of every method",
    "rows": "method",
    "columns": "pattern",
    "metric": "perplexity",
    "figure": {"kind": "bars"},
}
SAMPLES = {**LAYOUT, "columns": "calibration.num_samples"}
ACCURACY = {"title": "Accuracy", "rows": ["pattern", "method"], "columns": "task", "metric": "acc"}
HEADER = published.as_rows([])
PUBLISHED = published.as_rows([published.Published("llama2_7b wanda 2:4", 11.5, 11.02, "a_paper", "outside 2% (4.4%)")])


def four():
    return [
        record_of("magnitude", [9.0, 9.5, 9.2, 9.9]),
        record_of("wanda", [5.0, 5.5, 5.2, 5.9]),
        record_of("dass", [3.0, 3.5, 3.2, 3.9], alpha=0.5),
        record_of("dense", [2.0, 2.5, 2.2, 2.9]),
    ]


@pytest.fixture(name="table_of")
def table_of_fixture(results):
    def make(records, layout=LAYOUT, failed=(), **options):
        return build_table("perplexity", layout, records, list(failed), results, **options)

    return make


# Layout


def test_dense_is_on_top_and_in_every_column(table_of):
    table = table_of([*four(), record_of("wanda", [4.0, 4.5, 4.2, 4.9], pattern="4:8")])
    assert table.rows == ["dense", "magnitude", "wanda", "dass"]
    assert table.columns == ["2:4", "4:8"]
    assert table.cells["dense", "2:4"].mean == table.cells["dense", "4:8"].mean == pytest.approx(2.4)
    assert ("magnitude", "4:8") not in table.cells


def test_an_axis_may_differ(table_of):
    table = table_of([record_of("wanda", num_samples=samples) for samples in (4, 16)], SAMPLES)
    assert table.columns == ["num_samples=4", "num_samples=16"]
    table = table_of(
        [record_of("wanda", calibration=text) for text in ("c4_mini", "code")],
        {**LAYOUT, "columns": "calibration.name"},
    )
    assert table.columns == ["c4_mini", "code"]


def test_settings_of_a_method_are_shown_where_they_vary(table_of):
    assert table_of([record_of("dass", alpha=x) for x in (0.0, 0.5)]).rows == ["dass alpha=0.0", "dass alpha=0.5"]


def test_costs_have_their_units(table_of):
    cells = table_of([record_of("wanda")], {**LAYOUT, "columns": "cost", "metric": "cost"}).cells
    assert {column: value.mean for (_, column), value in cells.items()} == {
        "seconds to prune": 2.0,
        "peak memory GB": 1.5,
    }


# Noise and marks


def test_best_and_second_are_marked_where_they_stand_apart(table_of):
    cells = table_of(four()).cells
    marks = {row: value.mark for (row, _), value in cells.items()}
    assert marks == {"dense": "", "dass": "best", "wanda": "second", "magnitude": ""}


def test_nothing_is_marked_inside_the_noise(table_of):
    records = [record_of("wanda", [5.0, 5.5, 5.2, 5.9]), record_of("dass", [5.5, 4.9, 5.3, 5.7]), four()[0]]
    assert not any(value.mark for value in table_of(records).cells.values())


def test_seeds_are_pooled_into_mean_and_deviation(table_of):
    records = [record_of("wanda", [value, value], seed=seed) for seed, value in enumerate((1.0, 2.0, 3.0))]
    value = table_of(records).cells["wanda", "2:4"]
    assert (value.mean, value.sd, len(value.keys)) == (2.0, 1.0, 3)
    assert format_value(value, "perplexity") == "2.00 ± 1.00"
    assert TableValue((1.0,)).sd is None


def test_a_record_that_two_cells_share_counts_once(table_of):
    record = record_of("wanda", [1.0, 3.0])
    assert table_of([record, record]).cells["wanda", "2:4"].values == (2.0,)


def test_accuracy_is_paired_over_documents_and_ranked_within_a_pattern(table_of, results):
    records = []
    for method, accuracy in (("wanda", 1.0), ("magnitude", 0.0)):
        records.append(record_of(method, tasks={"piqa": task(accuracy)}))
        write_record(records[-1], results, {"piqa": {"acc": [accuracy] * 8}})
    table = table_of(records, ACCURACY)
    assert table.cells["2:4 wanda", "piqa"].mark == "best"
    assert format_value(table.cells["2:4 wanda", "piqa"], "acc") == "100.0 ± 5.0"
    assert table.columns == ["piqa", "mean"]


def test_methods_are_ranked_within_a_model(table_of):
    values = {("small", "wanda"): 5.0, ("small", "dass"): 4.0, ("small", "dense"): 3.0}
    values |= {("large", "wanda"): 1.0, ("large", "dass"): 2.0, ("large", "dense"): 0.5}
    records = [record_of(method, [nll, nll + 0.5, nll + 0.2], model=model) for (model, method), nll in values.items()]
    table = table_of(records)
    assert table.rows == [f"{model} {method}" for model in ("small", "large") for method in ("dense", "wanda", "dass")]
    best = {row for (row, _), value in table.cells.items() if value.mark == "best"}
    assert best == {"small dass", "large wanda"}
    assert latex(table).count(r"\midrule") == 4  # behind the head, behind each dense row, before the second


def trained(method, nll, training, recipe="tiny:swiglu@1"):
    record = record_of(method, nll, key=f"{method}-{training}")
    record["identity"] |= {"model": f"tiny:swiglu@{training}", "trained": {"recipe": recipe, "seed": training}}
    return record


def test_the_trainings_of_one_recipe_are_averaged(table_of):
    values = {"dense": 1.0, "wanda": 3.0}
    table = table_of([trained(name, [nll + seed], seed) for name, nll in values.items() for seed in (0, 1, 2)])
    assert table.rows == ["dense", "wanda"]
    assert table.cells["dense", "2:4"].values == (1.0, 2.0, 3.0)
    assert (table.cells["wanda", "2:4"].mean, table.cells["wanda", "2:4"].sd) == (4.0, 1.0)
    assert "Model tiny:swiglu@1 (dequantised" in caption(table)
    assert "training seeds 0, 1, 2, float32" in caption(table)


def test_trainings_of_two_recipes_are_not_averaged(table_of):
    table = table_of([trained("dense", [1.0], 0), trained("dense", [2.0], 1, recipe="tiny:swiglu@2")])
    assert table.rows == ["smollm2_135m@1 dense", "smollm2_135m@2 dense"]
    assert [cell.values for cell in table.cells.values()] == [(1.0,), (2.0,)]


# One protocol


@pytest.mark.parametrize(
    ("changes", "message", "label"),
    [
        ({"scope": "all"}, "scope: all, mlp", "scope=all"),
        ({"num_samples": 64}, "calibration.num_samples: 16, 64", "num_samples=64"),
        ({"calibration": "code"}, "calibration.name: c4_mini, code", "calibration=code"),
        ({"context": 2048}, "eval.perplexity.context: 2048, 512", "context=2048"),
        ({"max_windows": None}, "eval.perplexity.max_windows: 4, None", "max_windows=None"),
        ({"dtype": "bfloat16"}, "dtype: bfloat16, float32", "dtype=bfloat16"),
        ({"bos": "window"}, "bos: never, window", "bos=window"),
    ],
)
def test_protocols_are_not_mixed_unless_asked(table_of, changes, message, label):
    for method in ("dass", "wanda"):  # in another row, and in the same cell
        records = [record_of("wanda", key="one"), record_of(method, key="two", **changes)]
        with pytest.raises(UserError, match=rf"\({message}\)"):
            table_of(records)
        table = table_of(records, mix=True)
        assert any(label in row for row in table.rows)
        assert all(len(value.values) == 1 for value in table.cells.values())


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("protocol", {"windows_sha256": "another value"}, "windows_sha256: another , smollm2_"),
        ("identity", {"engine": 2}, "engine: 2, none"),
        ("identity", {"method": {"class": "wanda", "version": 2}}, "method.version: 1, 2"),
        (
            "identity",
            {"method": {"class": "wanda", "version": 1, "inner": {"version": 3}}},
            "method.inner.version: 3, none",
        ),
    ],
)
def test_whatever_else_differs_in_one_cell_is_found(table_of, section, change, message):
    first, second = record_of("wanda", key="one"), record_of("wanda", key="two")
    second[section] |= change
    with pytest.raises(UserError, match=message):
        table_of([first, second])


def test_two_texts_of_one_name_are_not_taken_for_one(table_of):
    records = [record_of("wanda", key="one"), record_of("dass", key="two")]
    records[1]["identity"]["calibration"]["text"] |= {"sha256": "another"}
    with pytest.raises(UserError, match=r"calibration.name: c4_mini \(\w{8}\), c4_mini \(\w{8}\)"):
        table_of(records)


def test_two_patterns_in_a_table_without_patterns_are_not_averaged(table_of):
    with pytest.raises(UserError, match="pattern: 2:4, 4:8"):
        table_of([record_of("wanda"), record_of("wanda", pattern="4:8")], SAMPLES)


def test_models_may_differ_in_what_their_family_determines(table_of):
    records = [record_of("wanda", model="small"), record_of("wanda", model="large", bos="window", dtype="bfloat16")]
    assert table_of(records).rows == ["small wanda", "large wanda"]


def test_a_dense_row_is_not_ranked_in_a_mixed_table_either(table_of):
    nll = [1.0, 1.1, 1.2, 1.05]
    pruned = [
        record_of(name, [add + each for each in nll], context=512) for name, add in (("wanda", 4.0), ("dass", 2.0))
    ]
    dense = [record_of("dense", nll, context=context) for context in (256, 512)]
    table = table_of([*dense, *pruned], mix=True)
    assert table.mixed and {row.endswith("dense") for (row, _), value in table.cells.items() if value.mark} == {False}


def test_mixed_protocols_keep_their_dense_rows_apart(table_of):
    dense = [record_of("dense", [2.0, 2.5]), record_of("dense", [1.0, 1.5], context=2048)]
    table = table_of([*dense, record_of("wanda", [5.0, 6.0])], mix=True)
    assert table.rows == ["context=512 dense", "context=2048 dense", "wanda, context=512"]
    assert table.cells["context=512 dense", "2:4"].values == (2.25,)
    assert table.mixed == ("eval.perplexity.context",)


# Failed cells


def test_a_failed_cell_is_in_its_place(table_of):
    records = [*four(), record_of("wanda", [8.0, 9.0, 8.0, 9.0], pattern="4:8")]
    table = table_of(records, failed=[failed("sparsegpt", "4:8", damping=0.0), failed("dass", "4:8", alpha=0.5)])
    assert table.cells["sparsegpt", "4:8"] == table.cells["dass", "4:8"] == "failed"
    assert table.cells["dass", "2:4"].mean > 0
    assert ("sparsegpt", "2:4") not in table.cells
    assert "| SparseGPT |  | failed |" in markdown(table)
    lines = list(csv.DictReader(to_csv(long_form(table)).splitlines()))
    assert [line["status"] for line in lines if line["row"] == "sparsegpt"] == ["failed"]
    assert {line["status"] for line in lines if line["row"] == "wanda"} == {"done"}


def test_a_failed_setting_is_told_from_those_that_went_well(table_of):
    table = table_of(four(), failed=[failed("dass", alpha=-1)])
    assert table.rows == ["dense", "magnitude", "wanda", "dass alpha=0.5", "dass alpha=-1"]
    assert table.cells["dass alpha=-1", "2:4"] == "failed"


def test_a_seed_that_failed_does_not_hide_those_that_went_well(table_of):
    table = table_of([record_of("wanda", seed=seed) for seed in (0, 1)], failed=[failed("wanda")])
    assert len(table.cells["wanda", "2:4"].values) == 2
    assert len(table.failed) == 1


def test_a_failed_cell_of_an_accuracy_table_failed_in_all_tasks(table_of):
    table = table_of([record_of("wanda", tasks={"piqa": task(0.5)})], ACCURACY, [failed("dass")])
    assert table.columns == ["piqa", "mean"]
    assert [table.cells["2:4 dass", column] for column in table.columns] == ["failed"] * 2


@pytest.mark.parametrize("layout", [LAYOUT, ACCURACY])
def test_a_table_of_failures_only_is_a_table(table_of, tmp_path, layout):
    table = table_of([], layout, [failed("dass"), failed("dense")])
    assert {*table.cells.values()} == {"failed"}
    assert table.rows[0] == "dense"
    assert markdown(table).count("failed") == latex(table).count("failed") == 2
    assert caption(table) == "No cell of this sweep has a record."
    assert draw(table, tmp_path) == []
    assert write_page([Section(table, caption(table))], [], tmp_path / "report.html").is_file()


def test_a_failure_without_a_place_is_still_listed(table_of):
    table = table_of(four(), failed=[SweepCell(("method=foo",), "failed", None, "no such method")])
    assert "failed" not in table.cells.values()
    assert [cell.error for cell in table.failed] == ["no such method"]


# The written forms


def test_the_written_forms_agree(table_of, tmp_path):
    table = table_of(four(), {**LAYOUT, "note": "Small models only.\n"})
    paths = write_table(table, tmp_path, "a note", HEADER)
    assert [path.name for path in paths] == ["perplexity.md", "perplexity.csv", "perplexity.tex"]
    text = paths[0].read_text()
    assert "| DaSS | **3.40** |" in text
    assert "| Wanda | <u>5.40</u> |" in text
    assert text.endswith("a note\n")
    rows = list(csv.DictReader(paths[1].open()))
    assert {row["row"]: float(row["mean"]) for row in rows} == {row: table.cells[row, "2:4"].mean for row in table.rows}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    assert caption(table).endswith("within a column. Small models only.")


def test_the_caption_states_the_protocol(table_of):
    text = caption(table_of(four()))
    for part in ("offline:smollm2_135m@b179 (dequantised", "float32", "scope mlp", "16 x 512 tokens of c4_mini"):
        assert part in text
    for part in ("seeds 0", "4 windows of 512 tokens", "never"):
        assert part in text


def test_a_word_is_shown_as_it_is(table_of):
    table = table_of(four())
    table.cells["wanda", "2:4"] = "failed"
    assert "| Wanda | failed |" in markdown(table)


def test_latex_escapes_and_marks(table_of):
    assert tex("50% & a_b #1 ± 2\\") == r"50\% \& a\_b \#1 $\pm$ 2\textbackslash{}"
    text = latex(table_of(four()))
    assert r"\textbf{3.40}" in text
    assert r"\underline{5.40}" in text
    assert text.count(r"\midrule") == 2


def test_published_numbers_are_in_all_three_forms(table_of, tmp_path):
    table = table_of(four())
    written = write_table(table, tmp_path, "a note", PUBLISHED)
    names = ["perplexity.md", "perplexity.csv", "perplexity.tex", "perplexity-published.csv"]
    assert [path.name for path in written] == names
    row = ["llama2_7b wanda 2:4", "11.50", "11.02", "+0.48", "a_paper", "outside 2% (4.4%)"]
    assert list(csv.reader(written[3].read_text().splitlines()))[1] == row
    assert r"a\_paper & outside 2\% (4.4\%) \\" in written[2].read_text()
    assert len(write_table(table, tmp_path, "a note", HEADER)) == 3
    assert not written[3].exists()  # what no longer has a counterpart goes


TASKS = ("hellaswag", "winogrande", "arc_easy", "arc_challenge", "piqa")
MODELS = ("tiny_swiglu", "tiny_geglu")


def as_in_zero_shot():
    """Records by method and pattern with the tasks of the zero-shot table, and its layout."""
    pruned = [(method, pattern) for method in ("magnitude", "sparsegpt") for pattern in ("4:8", "2:4")]
    cells = [("dense", "2:4"), *pruned]
    return [
        record_of(method, pattern=pattern, tasks=dict.fromkeys(TASKS, task(0.5))) for method, pattern in cells
    ], ACCURACY


def as_in_glu_variants():
    """Records of several models over seeds, and their layout."""
    cells = [(model, pattern, seed) for model in MODELS for pattern in ("50%", "4:8", "2:4") for seed in (0, 1)]
    records = [record_of("sparsegpt", [70 + s, 71], pattern, seed=s, model=model) for model, pattern, s in cells]
    return records, {**LAYOUT, "columns": "pattern"}


@pytest.mark.parametrize(
    ("wide", "records_and_layout"), [(True, as_in_zero_shot()), (True, as_in_glu_variants()), (False, (four(), LAYOUT))]
)
def test_a_wide_table_takes_both_columns_of_a_page(table_of, wide, records_and_layout):
    text = latex(table_of(*records_and_layout))
    assert (r"\begin{table*}" in text) == (r"\end{table*}" in text) == wide
    assert (r"\resizebox" in text) == (r"\usepackage{graphicx}" in text.splitlines()[0]) == wide
    assert text.startswith(r"% needs \usepackage{booktabs}")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no TeX is installed")
@pytest.mark.parametrize("columns", ["onecolumn", "twocolumn"])
def test_latex_compiles_and_fits_the_page(table_of, results, tmp_path, columns):
    tables = [table_of(four()), *(table_of(*given) for given in (as_in_zero_shot(), as_in_glu_variants()))]
    tables.append(build_metric_table("perplexity", LAYOUT, as_in_zero_shot()[0], [], results))
    body = "".join(map(latex, tables)) + latex_published(tables[0], PUBLISHED)
    head = rf"\documentclass[{columns}]{{article}}\usepackage{{booktabs,graphicx}}"
    (tmp_path / "t.tex").write_text(rf"{head}\begin{{document}}{body}\end{{document}}")
    call = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "Overfull" not in done.stdout
    assert "Float too large" not in done.stdout


def test_records_with_and_without_examples_do_not_share_a_table():
    none, five = (record_of("wanda", key=key, tasks={"piqa": task(0.5)}) for key in ("none", "five"))
    for record, more in ((none, {}), (five, {"num_fewshot": 5})):
        record["identity"]["eval"]["zeroshot"] = {"tasks": {"piqa": "6e14"}, "limit": 20, **more}
    differing = Protocols([none, five]).differing(["method"])
    assert differing == {"eval.zeroshot.num_fewshot": {"none", "5"}}
    assert not Protocols([five, five]).differing(["method"])
    assert not Protocols([none, five]).differing(["eval.zeroshot.num_fewshot"])
