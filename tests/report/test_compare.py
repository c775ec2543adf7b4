"""Records side by side, footnotes and captions, the summary of a run, and what is printed after a sweep."""

from __future__ import annotations

import copy
import io
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from factory import NOTE, diverged, record_of, task, write_record
from omegaconf import OmegaConf
from rich.console import Console

from dass_exp.report.compare import as_markdown, as_rich, comparison, footnotes, settings_line
from dass_exp.report.console import caption, method_label, pattern_label, scope_label, show_run, sizes_line, with_error
from dass_exp.report.sweep_callback import Comparison, Sweep, note_cell

METHODS = ("dense", "sparsegpt", "dass", "wanda", "magnitude")
PAPER = {"num_samples": 128, "seq_len": 2048, "calibration": "c4", "context": 2048, "dataset": "wikitext2"}
PAPER |= {"model": "llama2_7b", "max_windows": None, "limit": None}


@pytest.fixture
def demo() -> list[dict[str, Any]]:
    """The five methods, in the order of a sweep and not in that of their scores."""
    tasks = {"piqa": task(0.6, 0.65), "winogrande": task(0.5), "arc_easy": task(0.4, 0.3)}
    return [
        record_of("dense", [20.4], key="dense", tasks=tasks),
        record_of("magnitude", [745.0], key="magnitude", tasks=tasks),
        record_of("wanda", [100.2], key="wanda", tasks=tasks),
        record_of("sparsegpt", [60.1], key="sparsegpt", tasks=tasks, blocksize=128, damping=0.01),
        record_of("dass", [85.3], key="dass", tasks=tasks, alpha=0.5, granularity="input"),
    ]


def paper_record(split: str = "test", **changes: Any) -> dict[str, Any]:
    """A record in the paper's own protocol, changes apart."""
    tasks = {"arc_easy": task(0.7, 0.6, split)}
    return record_of("dass", [7.2], tasks=tasks, alpha=0.5, **{**PAPER, **changes})


# The table


def test_the_best_perplexity_comes_first_and_dense_where_it_belongs(demo):
    frame = comparison(demo)
    assert list(frame["method"]) == ["dense", "sparsegpt", "dass", "wanda", "magnitude"]
    assert list(frame["perplexity"]) == ["20.40", "60.10", "85.30", "100.20", "745.00"]
    demo[0]["metrics"]["perplexity"]["wikipedia_mini"] = 70.0
    assert list(comparison(demo)["method"]) == ["sparsegpt", "dense", "dass", "wanda", "magnitude"]


def test_without_a_perplexity_the_best_mean_accuracy_comes_first(demo):
    for record, accuracy in zip(demo, (0.3, 0.5, 0.4, 0.2, 0.6), strict=True):
        del record["metrics"]["perplexity"]
        record["metrics"]["mean_acc"] = accuracy
    frame = comparison(demo)
    assert list(frame["method"]) == ["dass", "magnitude", "wanda", "dense", "sparsegpt"]
    assert "perplexity" not in frame


def test_every_score_has_its_standard_error(demo):
    row = comparison(demo).iloc[0]
    labels = ("piqa", "winogrande", "mean acc", "mean acc_norm")
    assert [row[label] for label in labels] == ["60.0 ± 5.0", "50.0 ± 5.0", "50.0", "50.0"]


def test_the_divergence_from_the_dense_model_stands_beside_the_perplexity(demo):
    diverged(demo[2], [0.5, 1.5], [0.25, 0.5], 4.0)
    row = comparison(demo).set_index("method").loc[demo[2]["config"]["method"]["name"]]
    assert (row["KL"], row["agree %"]) == ("1.000", "37.5")
    frame = comparison(demo)
    assert frame.iloc[0]["KL"] == ""  # the dense model
    columns = list(frame.columns)
    assert columns.index("KL") == columns.index("perplexity") + 1


def test_labels_that_are_the_same_everywhere_are_in_the_settings_line(demo):
    assert not {"model", "pattern", "scope", "seed"} & set(comparison(demo).columns)
    line = settings_line(demo)
    for label in ("2:4", "scope mlp", "dass alpha=0.5 granularity=input", "sparsegpt blocksize=128 damping=0.01"):
        assert label in line


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("pattern", {"pattern": {"name": "4:8"}}),
        ("scope", {"scope": "all"}),
        ("seed", {"seed": 1}),
        ("model", {"model": {"name": "other"}}),
    ],
)
def test_a_label_that_differs_is_a_column(demo, column, change):
    other = copy.deepcopy(demo[2])
    other["config"] |= change
    assert len(set(comparison([*demo, other])[column]) - {""}) == 2


def test_a_hyper_parameter_that_differs_is_shown_in_its_rows_only(demo):
    frame = comparison([*demo, record_of("dass", [90.0], alpha=1.0, granularity="input")])
    assert list(frame["method"]) == ["dense", "sparsegpt", "dass alpha=0.5", "dass alpha=1.0", "wanda", "magnitude"]


def test_a_task_that_was_not_scored_is_empty(demo):
    del demo[0]["metrics"]["tasks"]
    demo[0]["metrics"]["tasks"] = {"winogrande": task(0.5)}
    assert list(comparison(demo)["piqa"]) == ["", *["60.0 ± 5.0"] * 4]


def test_both_forms_of_the_table_have_every_row(demo):
    frame = comparison(demo)
    lines = as_markdown(frame).splitlines()
    assert len(lines) == 2 + len(demo)
    assert {line.count("|") for line in lines} == {len(frame.columns) + 1}
    for record in demo:
        (line,) = [line for line in lines if f"| {record['config']['method']['name']} |" in line]
        assert f"{record['metrics']['perplexity']['wikipedia_mini']:.2f}" in line
        assert record["key"][:8] in line
    screen = io.StringIO()
    for table in as_rich(frame, "A title", 200):
        Console(width=200, file=screen).print(table)
    assert all(name in screen.getvalue() for name in ("A title", "745.00", *METHODS))


# Footnotes and captions


def test_the_footnotes_say_what_differs_from_the_paper(demo):
    notes = footnotes(demo)
    for words in (
        ("smollm2_135m", "4-bit", "llama2_7b"),
        ("16 x 512", "c4_mini", "128 x 2048", "c4"),
        ("1 windows of 512", "wikipedia_mini", "2048", "wikitext2"),
        ("first 20 documents", "standard error"),
        ("arc_easy", "validation", "test"),
    ):
        assert [note for note in notes if all(word in note for word in words)], words
    assert len(notes) == len(set(notes)) == 5


def test_the_papers_own_protocol_has_no_footnote():
    assert footnotes([paper_record()]) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"scope": "all"}, "scope all"),
        ({"num_samples": 64}, "64 x 2048"),
        ({"seq_len": 1024}, "128 x 1024"),
        ({"context": 1024}, "1024"),
        ({"limit": 50}, "first 50"),
        ({"split": "validation"}, "validation"),
        ({"max_windows": 1}, "1 windows"),
    ],
)
def test_each_difference_has_its_footnote(change, word):
    (note,) = footnotes([paper_record(**change)])
    assert word in note


def test_the_caption_says_how_the_numbers_were_made(demo):
    text = caption(demo[4])
    for words in (
        "offline:smollm2_135m@b179",
        NOTE,
        "float32",
        "16 x 512 tokens of c4_mini, seed 0",
        "1 windows of 512 tokens of wikipedia_mini (even)",
        "lm-eval 0.4.13",
        "first 20 documents",
        "beginning-of-sequence token: never",
    ):
        assert words in text
    assert "calibration" not in caption(demo[0])


def test_calibrations_and_seeds_that_differ_are_in_the_rows_and_not_in_the_caption(demo):
    demo[2]["calibration"] = demo[2]["calibration"] | {"num_samples": 64}
    demo[4]["config"]["seed"] = 1
    frame = comparison(demo)
    assert {*frame["calibration"]} == {"", "16 x 512 tokens of c4_mini", "64 x 512 tokens of c4_mini"}
    assert {*frame["seed"]} == {"", "0", "1"}
    assert "calibration" not in caption(demo[3], demo)
    demo[2]["calibration"] = demo[3]["calibration"]
    assert "calibration" not in comparison(demo)
    assert "calibration 16 x 512 tokens of c4_mini;" in caption(demo[3], demo)
    assert "calibration 16 x 512 tokens of c4_mini, seed 0;" in caption(demo[3])


def test_labels(demo):
    labels = [[label(record["config"]) for label in (method_label, pattern_label, scope_label)] for record in demo]
    assert labels[4] == ["dass alpha=0.5 granularity=input", "2:4", "scope mlp"]
    assert labels[0] == ["dense", "", ""]
    assert with_error({"acc": 0.456, "acc_stderr": 0.0123}, "acc") == "45.6 ± 1.2"


# What a user sees of a run


def test_the_summary_shows_pruned_beside_dense_and_the_record(demo, capsys):
    show_run(demo[4], demo[0], Path("results/runs/x/result.json"), found=True)
    text = capsys.readouterr().out
    expected = {"perplexity wikipedia_mini": ["20.40", "85.30"]}
    for label, values in expected.items():
        line = next(line for line in text.splitlines() if label in line)
        assert re.findall(r"[\d.]+", line) == values
    for words in ("piqa acc %", "piqa acc_norm %", "60.0 ± 5.0", "mean acc %", "29.0", "37.0", "peak memory GB"):
        assert words in text, words
    assert "found results/runs/x/result.json" in text


def test_one_line_has_the_zeros_and_the_size_of_the_model(demo):
    record = {"sparsity": {"scope": 0.5, "decoder": 0.394, "model": 0.301}}
    zeros = "zeros: 50.0 % of the scope, 39.4 % of the linears of all blocks, 30.1 % of the whole model"
    assert sizes_line(record) == zeros  # an earlier version noted no sizes
    record["sparsity"] |= {"dense_bytes": 538_060_000, "packed_bytes": 386_000_000}
    assert sizes_line(record).startswith(f"{zeros}; size: 538.1 MB dense, 386.0 MB packed")
    assert sizes_line(demo[4]).startswith("zeros: 50.0 % of the scope, 37.0 %")


def test_the_summary_of_a_single_record(demo, capsys):
    show_run(demo[0], None, Path("result.json"), found=False)
    text = capsys.readouterr().out
    assert "20.40" in text
    assert "wrote result.json" in text
    demo[4]["metrics"] = {}  # nothing was scored
    show_run(demo[4], None, Path("result.json"), found=False)
    assert "zeros: 50.0 % of the scope" in capsys.readouterr().out


# After a sweep


@pytest.fixture
def sweep(tmp_path, demo, monkeypatch):
    """A sweep's folder: five cells that ended well, then one that failed."""
    monkeypatch.setattr(Sweep, "failed", 0)
    for number, record in enumerate(demo):
        path = write_record(record, tmp_path)
        note_cell(tmp_path / "sweep" / str(number), {"status": "done", "overrides": [], "record": str(path)})
    note = {"status": "failed", "overrides": ["method.alpha=-1"], "error": "method.alpha=-1: no"}
    note_cell(tmp_path / "sweep" / "10", note)
    return OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "sweep")}}, "sweep": {"title": "Every method"}})


def test_after_a_sweep_its_cells_are_compared(sweep, tmp_path, capsys, caplog):
    with caplog.at_level(logging.ERROR):
        Comparison().on_multirun_end(sweep)
    text, kept = capsys.readouterr().out, tmp_path / "sweep" / "comparison.md"
    for shown in (text, kept.read_text()):
        for words in ("Every method", "745.00", "20.40", "16 x 512 tokens of c4_mini", "4-bit"):
            assert words in shown
    assert "paper" in text
    assert str(kept) in text
    assert Sweep.failed == 1
    assert [entry.getMessage() for entry in caplog.records] == ["failed: method.alpha=-1: method.alpha=-1: no"]


def test_a_sweep_of_failures_only_shows_no_table(sweep, tmp_path, capsys):
    for folder in (tmp_path / "sweep").glob("[0-4]"):
        shutil.rmtree(folder)
    Comparison().on_multirun_end(sweep)
    assert Sweep.failed == 1
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "sweep" / "comparison.md").exists()


@pytest.mark.parametrize("content", [None, b"", b'{"status": "done", "checksum": "xxh3_128:0"}'])
def test_a_cell_whose_end_is_not_noted_has_failed(sweep, tmp_path, caplog, content):
    path = tmp_path / "sweep" / "0" / "cell.json"
    path.unlink() if content is None else path.write_bytes(content)
    Comparison().on_multirun_end(sweep)
    assert Sweep.failed == 2
    assert f"failed: 0: {path}: " in caplog.text


def test_a_damaged_record_is_named_and_the_others_are_compared(sweep, tmp_path, demo, caplog):
    path = tmp_path / "runs" / demo[0]["key"] / "result.json"
    path.write_bytes(path.read_bytes()[:-9])
    Comparison().on_multirun_end(sweep)
    assert f"{path}: it is damaged" in caplog.text
    lines = (tmp_path / "sweep" / "comparison.md").read_text().splitlines()
    compared = {line.split()[1] for line in lines if line.startswith("| ")}
    assert compared & {*METHODS} == {*METHODS} - {"dense"}


def test_a_comparison_that_cannot_be_written_is_shown_and_the_failures_count(sweep, tmp_path, capsys):
    (tmp_path / "sweep" / "comparison.md").mkdir()
    Comparison().on_multirun_end(sweep)
    shown = " ".join(capsys.readouterr().out.split())
    assert "745.00" in shown
    assert "comparison.md could not be written" in shown
    assert Sweep.failed == 1


def test_a_cell_that_cannot_be_noted_is_one_line(tmp_path, caplog):
    (tmp_path / "0").write_text("a file where the folder should be")
    note_cell(tmp_path / "0", {"status": "done"})
    assert "how the cell ended could not be noted" in caplog.text


def test_two_cells_with_one_record_are_one_row(sweep, tmp_path, demo):
    path = tmp_path / "runs" / demo[0]["key"] / "result.json"
    note_cell(tmp_path / "sweep" / "11", {"status": "done", "overrides": [], "record": str(path)})
    Comparison().on_multirun_end(sweep)
    lines = (tmp_path / "sweep" / "comparison.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| dense")]) == 1
