"""Tables of sweeps from hand-made records: layout, noise, marks, refusal to mix, the three written forms, published numbers."""

import csv
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from dass_exp.errors import UserError
from dass_exp.report import published
from dass_exp.report.compare_two import pair
from dass_exp.report.figures import draw
from dass_exp.report.load import Cell, repaired
from dass_exp.report.page import Chapter, page
from dass_exp.report.table import Entry, build
from dass_exp.report.write import caption, format_entry, latex, latex_beside, markdown, tex, write
from dass_exp.report.write import comma_separated as long_csv

HEAD = published.as_rows([])
LAYOUT = {
    "title": "Perplexity of every method",
    "rows": "method",
    "columns": "pattern",
    "metric": "perplexity",
    "figure": {"kind": "bars"},
}
ACCURACY = {"title": "Accuracy", "rows": ["pattern", "method"], "columns": "task", "metric": "acc"}


def record(method, nll, pattern="2:4", seed=0, scope="mlp", **changes):
    """A record with these window likelihoods; dense has no pattern, scope, calibration or seed."""
    dense = method == "dense"
    settings = {"dass": {"alpha": 0.5}}.get(method, {})
    return {
        "schema": 1,
        "key": f"{method}-{pattern}-{seed}-{scope}-{changes.get('num_samples', 16)}",
        "config": {
            "model": {"name": "smollm2_135m"},
            "method": {"name": method, **settings},
            "pattern": None if dense else {"name": pattern},
            "scope": None if dense else scope,
            "seed": None if dense else seed,
            "calibration": None if dense else {"name": "c4_mini", "num_samples": changes.get("num_samples", 16)},
            "eval": {"perplexity": {"max_windows": 4}},
        },
        "identity": {"model": "offline:smollm2_135m@b179", "method": {"class": method}, "seed": seed},
        "protocol": {
            "bos": "never",
            "dtype": "float32",
            "device": "cpu",
            "model_note": "4-bit",
            "context": 512,
            "dataset": "wikipedia_mini",
            "split": "even",
            "windows": len(nll),
            "windows_sha256": "f00",
            "lm_eval": "0.4.13",
            "limit": 20,
        },
        "calibration": None
        if dense
        else {"name": "c4_mini", "num_samples": changes.get("num_samples", 16), "seq_len": 512},
        "sparsity": {"layers": []},
        "metrics": {
            "perplexity": {"wikipedia_mini": sum(nll) / len(nll)},
            "window_nll": {"wikipedia_mini": list(nll)},
            "tasks": changes.get("tasks", {}),
            **changes.get("means", {}),
        },
        "cost": {"prune_s": 2.0, "peak_rss_bytes": 1.5e9, "peak_gpu_bytes": None},
        "environment": {},
    }


def four(best=1.0):
    return [
        record("magnitude", [9.0, 9.5, 9.2, 9.9]),
        record("wanda", [5.0, 5.5, 5.2, 5.9]),
        record("dass", [best + 2, best + 2.5, best + 2.2, best + 2.9]),
        record("dense", [2.0, 2.5, 2.2, 2.9]),
    ]


def sheet_of(records, layout=LAYOUT, **options):
    return build(
        "perplexity", layout, records, [], options.pop("results", __import__("pathlib").Path("/nowhere")), **options
    )


def test_dense_is_on_top_and_fills_every_column():
    sheet = sheet_of([*four(), record("wanda", [4.0, 4.5, 4.2, 4.9], pattern="4:8")])
    assert sheet.rows == ["dense", "magnitude", "wanda", "dass"]
    assert sheet.columns == ["2:4", "4:8"]
    assert sheet.cells[("dense", "2:4")].mean == sheet.cells[("dense", "4:8")].mean == pytest.approx(2.4)
    assert ("magnitude", "4:8") not in sheet.cells


def test_best_and_second_are_marked_where_they_stand_apart():
    cells = sheet_of(four()).cells
    assert {row: cells[(row, "2:4")].mark for row in ("dense", "dass", "wanda", "magnitude")} == {
        "dense": "",
        "dass": "best",
        "wanda": "second",
        "magnitude": "",
    }


def test_nothing_is_marked_inside_the_noise():
    records = [
        record("wanda", [5.0, 5.5, 5.2, 5.9]),
        record("dass", [5.5, 4.9, 5.3, 5.7]),
        record("magnitude", [9.0, 9.5, 9.2, 9.9]),
    ]
    assert not any(entry.mark for entry in sheet_of(records).cells.values())


def test_seeds_are_pooled_into_mean_and_deviation():
    records = [record("wanda", [value, value], seed=seed) for seed, value in enumerate((1.0, 2.0, 3.0))]
    entry = sheet_of(records).cells[("wanda", "2:4")]
    assert (entry.mean, entry.sd, len(entry.keys)) == (2.0, 1.0, 3)
    assert format_entry(entry, "perplexity") == "2.00 ± 1.00"


def test_a_record_that_two_cells_share_counts_once():
    one = record("wanda", [1.0, 3.0])
    assert sheet_of([one, one]).cells[("wanda", "2:4")].values == (2.0,)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"scope": "all"}, "scope: all, mlp"), ({"num_samples": 64}, "calibration.num_samples: 16, 64")],
)
def test_protocols_are_not_mixed_unless_asked(changes, word):
    records = [record("wanda", [1.0, 2.0]), record("dass", [1.0, 2.0], **changes)]
    with pytest.raises(UserError, match=word):
        sheet_of(records)
    (name, value), *_ = changes.items()
    assert any(f"{name}={value}" in row for row in sheet_of(records, mix=True).rows)


def test_an_axis_may_differ():
    layout = {**LAYOUT, "columns": "calibration.num_samples"}
    sheet = sheet_of([record("wanda", [1.0, 2.0], num_samples=4), record("wanda", [1.0, 2.0], num_samples=16)], layout)
    assert sheet.columns == ["num_samples=4", "num_samples=16"]


def test_settings_of_a_method_are_shown_where_they_vary():
    low, high = record("dass", [1.0, 2.0]), record("dass", [3.0, 4.0])
    low["config"]["method"]["alpha"], low["key"] = 0.0, "low"
    assert sheet_of([low, high]).rows == ["dass alpha=0.0", "dass alpha=0.5"]


def tasks(acc):
    return {"piqa": {"acc": acc, "acc_stderr": 0.1, "limit": 4, "split": "validation"}}


def test_accuracy_is_paired_over_documents_and_ranked_within_a_pattern(tmp_path):
    outcomes = {"wanda": [1.0] * 8, "magnitude": [0.0] * 8}
    records = [
        record(method, [1.0, 2.0], tasks=tasks(sum(found) / 8), means={"mean_acc": sum(found) / 8})
        for method, found in outcomes.items()
    ]
    for one in records:
        folder = tmp_path / "runs" / one["key"]
        folder.mkdir(parents=True)
        (folder / "documents.json").write_text(json.dumps({"piqa": {"acc": outcomes[one["config"]["method"]["name"]]}}))
    sheet = sheet_of(records, ACCURACY, results=tmp_path)
    assert sheet.cells[("2:4 wanda", "piqa")].mark == "best"
    assert format_entry(sheet.cells[("2:4 wanda", "piqa")], "acc") == "100.0 ± 10.0"
    assert sheet.columns == ["piqa", "mean"]


def test_costs_have_their_units():
    sheet = sheet_of([record("wanda", [1.0, 2.0])], {**LAYOUT, "columns": "cost", "metric": "cost"})
    assert {column: entry.mean for (_, column), entry in sheet.cells.items()} == {
        "seconds to prune": 2.0,
        "peak memory GB": 1.5,
    }


def test_the_written_forms_agree(tmp_path):
    sheet = sheet_of(four())
    paths = write(sheet, tmp_path, "a note", HEAD)
    assert [path.name for path in paths] == ["perplexity.md", "perplexity.csv", "perplexity.tex"]
    text = paths[0].read_text()
    assert "| dass | **3.40** |" in text
    assert "| wanda | <u>5.40</u> |" in text
    assert text.endswith("a note\n")
    rows = list(csv.DictReader(paths[1].open()))
    assert {row["row"]: float(row["mean"]) for row in rows} == {
        row: sheet.cells[(row, "2:4")].mean for row in sheet.rows
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)


def test_the_caption_states_the_protocol():
    said = caption(sheet_of(four()))
    for part in (
        "offline:smollm2_135m@b179 (4-bit)",
        "float32",
        "scope mlp",
        "16 x 512 tokens of c4_mini",
        "seeds 0",
        "4 windows of 512 tokens",
        "never",
    ):
        assert part in said


def test_latex_escapes_and_marks():
    assert tex("50% & a_b #1 ± 2\\") == r"50\% \& a\_b \#1 $\pm$ 2\textbackslash{}"
    made = latex(sheet_of(four()))
    assert r"\textbf{3.40}" in made
    assert r"\underline{5.40}" in made
    assert made.count(r"\midrule") == 2


def test_published_figures_are_in_all_three_forms(tmp_path):
    rows = published.as_rows([published.Published("llama2_7b wanda 2:4", 11.5, 11.02, "a_paper", "outside 2% (4.4%)")])
    written = write(sheet_of(four()), tmp_path, "a note", rows)
    assert [path.name for path in written] == [
        "perplexity.md",
        "perplexity.csv",
        "perplexity.tex",
        "perplexity-published.csv",
    ]
    assert list(csv.reader(written[3].read_text().splitlines()))[1] == [
        "llama2_7b wanda 2:4",
        "11.50",
        "11.02",
        "+0.48",
        "a_paper",
        "outside 2% (4.4%)",
    ]
    assert r"a\_paper & outside 2\% (4.4\%) \\" in written[2].read_text()
    assert len(write(sheet_of(four()), tmp_path, "a note", HEAD)) == 3
    assert not written[3].exists()  # what no longer has a counterpart goes


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no TeX is installed")
def test_latex_compiles(tmp_path):
    figures = published.as_rows(
        [published.Published("llama2_7b wanda 50%", 11.5, 11.02, "a_paper", "outside 2% (4.4%)")]
    )
    body = latex(sheet_of(four())) + latex_beside(sheet_of(four()), figures)
    (tmp_path / "t.tex").write_text(
        f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}{body}\\end{{document}}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_a_word_is_shown_as_it_is():
    assert format_entry("failed", "perplexity") == "failed"
    assert "| wanda | failed |" in markdown(replace_cell(sheet_of(four()), ("wanda", "2:4"), "failed"))


def replace_cell(sheet, place, entry):
    sheet.cells[place] = entry
    return sheet


# Published numbers


def llama(method="wanda", context=2048, scope="all", value=6.9):
    one = record(method, [value, value], scope=scope, pattern="50%")
    one["config"]["model"]["name"] = "llama31_8b"
    one["protocol"] |= {"context": context, "dataset": "wikitext2"}
    one["metrics"]["perplexity"] = {"wikitext2": value}
    return one


def row(**changes):
    base = {
        "source": "somewhere",
        "model": "llama3.1_8b",
        "scope": "all",
        "pattern": "50%",
        "method": "wanda",
        "metric": "perplexity",
    }
    return {**base, "dataset": "wikitext2", "context": "2048", "value": "7.0", "note": "", **changes}


def test_a_published_number_of_the_same_kind_is_found_with_a_verdict():
    (found,) = published.beside([llama()], [row()])
    assert (found.ours, found.value, found.verdict) == (6.9, 7.0, "within 2% (1.4%)")
    assert published.beside([llama(value=7.7)], [row()])[0].verdict == "outside 2% (10.0%)"


@pytest.mark.parametrize(
    "changes",
    [
        {"context": "4096"},
        {"scope": "mlp"},
        {"pattern": "2:4"},
        {"method": "dass"},
        {"model": "llama2_7b"},
        {"dataset": "c4"},
    ],
)
def test_another_protocol_is_no_counterpart(changes):
    assert published.beside([llama()], [row(**changes)]) == []
    assert "No published number on file" in published.as_markdown([])


def test_a_source_that_does_not_state_its_metric_gets_no_verdict():
    assert published.beside([llama()], [row(note="acc vs acc_norm not stated (harness default)")])[
        0
    ].verdict.startswith("no verdict")


def test_a_users_own_rows_count(tmp_path):
    path = tmp_path / "numbers.csv"
    path.write_text(
        "source,model,scope,pattern,method,metric,dataset,context,value,note\ndass-paper,llama3.1_8b,all,50%,wanda,perplexity,wikitext2,2048,6.9,\n"
    )
    assert published.beside([llama()], published.read(path))[0].source == "dass-paper"


# Two records


def test_two_records_side_by_side(tmp_path):
    text = pair(record("wanda", [5.0, 6.0, 7.0]), record("dass", [4.0, 5.0, 6.0]), tmp_path)
    assert "| method.class | wanda | dass |" in text
    assert "| nats per token wikipedia_mini | 6.0000 | 5.0000 | +1.0000 | +1.0000 to +1.0000 |" in text
    assert "No masks were kept for wanda-2:4-0-mlp-16 and dass-2:4-0-mlp-16" in text


def test_failed_cells_and_entries_have_defaults():
    assert Entry((1.0,)).sd is None
    assert Cell(("a=1",), "failed", None, "why").error == "why"


def failed(method, pattern="2:4", **settings):
    config = {
        "model": {"name": "smollm2_135m"},
        "method": {"name": method, **settings},
        "pattern": pattern and {"name": pattern},
        "scope": "mlp",
        "seed": 0,
    }
    return Cell((f"method={method}",), "failed", None, "the method went wrong", config)


def laid_out(records, cells, layout=LAYOUT):
    return build("perplexity", layout, records, cells, Path("none"))


def test_a_failed_cell_stands_in_its_place():
    sheet = laid_out(
        [*four(), record("wanda", [8.0, 9.0, 8.0, 9.0], pattern="4:8")],
        [failed("sparsegpt", "4:8", damping=0.0), failed("dass", "4:8", alpha=0.5)],
    )
    assert sheet.cells[("sparsegpt", "4:8")] == "failed"
    assert sheet.cells[("dass", "4:8")] == "failed"
    assert sheet.cells[("dass", "2:4")].mean > 0
    assert ("sparsegpt", "2:4") not in sheet.cells
    assert "| sparsegpt |  | failed |" in markdown(sheet)


def test_a_failed_setting_is_told_from_those_that_went_well():
    sheet = laid_out(four(), [failed("dass", alpha=-1)])
    assert sheet.rows == ["dense", "magnitude", "wanda", "dass alpha=0.5", "dass alpha=-1"]
    assert sheet.cells[("dass alpha=-1", "2:4")] == "failed"


def test_a_seed_that_failed_does_not_hide_those_that_went_well():
    sheet = laid_out([record("wanda", [1.0, 2.0], seed=seed) for seed in (0, 1)], [failed("wanda")])
    assert len(sheet.cells[("wanda", "2:4")].values) == 2
    assert len(sheet.failed) == 1


def test_a_failed_cell_of_an_accuracy_table_failed_in_all_tasks():
    sheet = laid_out(
        [record("wanda", [1.0, 2.0], tasks=tasks(0.5), means={"mean_acc": 0.5})], [failed("dass")], ACCURACY
    )
    assert [sheet.cells[("2:4 dass", column)] for column in sheet.columns] == ["failed"] * 2
    assert sheet.columns == ["piqa", "mean"]


def test_a_table_of_failures_only_is_a_table(tmp_path):
    for layout in (LAYOUT, ACCURACY):
        sheet = laid_out([], [failed("dass"), failed("dense", None)], layout)
        assert {*sheet.cells.values()} == {"failed"}
        assert sheet.rows[0] == "dense"
        assert markdown(sheet).count("failed") == 2
        assert caption(sheet) == "No cell of this sweep has a record."
        assert latex(sheet).count("failed") == 2
        assert draw(sheet, tmp_path) == []
        assert page([Chapter(sheet, caption(sheet))], [], tmp_path / "report.html").is_file()


def test_a_failure_that_is_not_placed_is_still_listed():
    sheet = laid_out(four(), [Cell(("method=foo",), "failed", None, "no such method")])
    assert "failed" not in sheet.cells.values()
    assert [cell.error for cell in sheet.failed] == ["no such method"]


def test_mixed_protocols_keep_their_dense_rows_apart():
    short, long = record("dense", [2.0, 2.5]), record("dense", [1.0, 1.5])
    long["protocol"]["context"], long["key"] = 2048, "long"
    sheet = sheet_of([short, long, record("wanda", [5.0, 6.0])], mix=True)
    assert sheet.rows == ["context=512 dense", "context=2048 dense", "wanda, context=512"]
    assert sheet.cells[("context=512 dense", "2:4")].values == (2.25,)
    assert sheet.mixed == ("context",)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("source,model\nx,y\n", "no column scope, pattern, method"),
        (
            "source,model,scope,pattern,method,metric,dataset,context,value\na,b,c,d,e,f,g,h,many\n",
            "line 2: value='many': expected a number",
        ),
        (
            "source,model,scope,pattern,method,metric,dataset,context,value\na,b,c,d,e,f,g,h\n",
            "line 2: value=None: expected a number",
        ),
    ],
)
def test_a_reference_that_cannot_be_read_is_told(tmp_path, text, told):
    (tmp_path / "numbers.csv").write_text(text)
    with pytest.raises(UserError, match=told):
        published.read(tmp_path / "numbers.csv")


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "bfloat16"), ("bos", "window"), ("windows_sha256", "other"), ("split", "odd")]
)
def test_records_of_one_model_that_were_made_differently_are_no_seeds_of_each_other(field, value):
    one, other = record("wanda", [5.0, 5.5]), record("wanda", [6.0, 6.5])
    other["protocol"][field], other["key"] = value, "other"
    with pytest.raises(UserError, match=field):
        sheet_of([one, other])
    assert all(len(entry.values) == 1 for entry in sheet_of([one, other], mix=True).cells.values())


def test_two_patterns_in_a_table_without_patterns_are_not_averaged():
    layout = {**LAYOUT, "columns": "calibration.num_samples"}
    records = [record("wanda", [1.0, 2.0]), record("wanda", [3.0, 4.0], pattern="4:8")]
    with pytest.raises(UserError, match="pattern: 2:4, 4:8"):
        sheet_of(records, layout)


def test_whatever_else_differs_between_records_of_one_cell_is_found_in_their_identity():
    one, other = record("wanda", [5.0, 5.5]), record("wanda", [6.0, 6.5])
    other["identity"] = other["identity"] | {"method": {"class": "wanda", "version": 2}}
    other["key"] = "other"
    with pytest.raises(UserError, match=r"method\.version"):
        sheet_of([one, other])


def test_methods_are_ranked_within_a_model():
    small = [
        record(method, nll)
        for method, nll in (
            ("wanda", [5.0, 5.5, 5.2, 5.9]),
            ("dass", [4.0, 4.5, 4.2, 4.9]),
            ("dense", [3.0, 3.1, 3.2, 3.3]),
        )
    ]
    large = [
        record(method, nll)
        for method, nll in (
            ("wanda", [1.0, 1.5, 1.2, 1.9]),
            ("dass", [2.0, 2.5, 2.2, 2.9]),
            ("dense", [0.5, 0.6, 0.7, 0.8]),
        )
    ]
    for one in large:
        one["config"]["model"]["name"], one["key"], one["identity"] = (
            "large",
            f"large-{one['key']}",
            one["identity"] | {"model": "large"},
        )
    sheet = sheet_of([*small, *large])
    assert sheet.rows == [
        "smollm2_135m dense",
        "smollm2_135m wanda",
        "smollm2_135m dass",
        "large dense",
        "large wanda",
        "large dass",
    ]
    assert {row: entry.mark for (row, _), entry in sheet.cells.items() if entry.mark == "best"} == {
        "smollm2_135m dass": "best",
        "large wanda": "best",
    }
    assert latex(sheet).count(r"\midrule") == 4  # behind the head, behind each dense row, before the second


def test_a_failed_cell_is_in_the_csv():
    lines = list(csv.DictReader(long_csv(laid_out(four(), [failed("sparsegpt", damping=0.0)])).splitlines()))
    assert [line["status"] for line in lines if line["row"] == "sparsegpt"] == ["failed"]
    assert {line["status"] for line in lines if line["row"] != "sparsegpt"} == {"done"}


def test_a_failure_that_was_repaired_with_a_smaller_batch_is_one_no_more():
    meant = failed("wanda").config | {"calibration": {"name": "c4_mini", "num_samples": 16, "batch_size": 8}}
    made = record("wanda", [1.0, 2.0])
    made["config"]["calibration"]["batch_size"] = 1
    cell = Cell(("method=wanda",), "failed", None, "out of memory", meant)
    assert repaired(cell, [made])
    assert not repaired(cell, [record("dass", [1.0, 2.0]), record("wanda", [1.0, 2.0], num_samples=4)])
    assert not repaired(Cell(("method=foo",), "failed", None, "no such method"), [made])


def test_a_reference_in_another_encoding_is_told(tmp_path):
    head = "source,model,scope,pattern,method,metric,dataset,context,value\n"
    (tmp_path / "excel.csv").write_text(head, encoding="utf-8-sig")
    assert published.read(tmp_path / "excel.csv") == []
    (tmp_path / "latin.csv").write_bytes(head.encode() + b"\xe9,,,,,,,,1\n")
    with pytest.raises(UserError, match="no CSV file in UTF-8"):
        published.read(tmp_path / "latin.csv")
    (tmp_path / "zero.csv").write_text(head + "a,b,c,d,e,perplexity,g,h,0\n")
    with pytest.raises(UserError, match="line 2: value='0': expected a number above 0"):
        published.read(tmp_path / "zero.csv")


def trained(method, nll, training, recipe="tiny:swiglu@1"):
    made = record(method, nll)
    identity = {
        **made["identity"],
        "model": f"tiny:swiglu@weights{training}",
        "trained": {"recipe": recipe, "seed": training},
    }
    return {**made, "key": f"{method}-{training}", "identity": identity}


def test_the_trainings_of_one_recipe_are_averaged():
    records = [
        trained(method, [value + training] * 4, training)
        for method, value in (("dense", 1.0), ("wanda", 3.0))
        for training in (0, 1, 2)
    ]
    sheet = sheet_of(records)
    assert sheet.rows == ["dense", "wanda"]
    assert sheet.cells["dense", "2:4"].values == (1.0, 2.0, 3.0)
    assert (sheet.cells["wanda", "2:4"].mean, sheet.cells["wanda", "2:4"].sd) == (4.0, 1.0)
    assert "Model tiny:swiglu@1 (4-bit), training seeds 0, 1, 2, float32" in caption(sheet)


def test_what_a_sweep_says_of_itself_stands_in_the_caption():
    assert caption(sheet_of(four(), {**LAYOUT, "note": "Small models only.\n"})).endswith(
        "from the next. Small models only."
    )


def test_trainings_of_two_recipes_are_not():
    records = [trained("dense", [1.0] * 4, 0), trained("dense", [2.0] * 4, 1, recipe="tiny:swiglu@2")]
    with pytest.raises(UserError, match="weights: tiny:swiglu@1, tiny:swiglu@2"):
        sheet_of(records)
