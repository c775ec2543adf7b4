"""Records side by side: the order of the rows, what the table leaves out and says elsewhere, and the footnotes."""

from __future__ import annotations

import copy
import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from dass_exp.report.compare import as_markdown, as_rich, comparison, footnotes, settings_line
from dass_exp.report.console import (
    TerminalReporter,
    caption,
    method_label,
    pattern_label,
    scope_label,
    show,
    with_error,
)
from dass_exp.report.sweep_callback import Comparison, Sweep, note_cell

NOTE = "dequantised from 4-bit weights (GGUF Q4_1)"


def task(acc: float, norm: float | None = None, split: str = "validation") -> dict[str, Any]:
    scores = {"acc": acc, "acc_stderr": 0.05, "version": 1.0, "split": split, "limit": 20, "documents": 20}
    return scores | ({} if norm is None else {"acc_norm": norm, "acc_norm_stderr": 0.06})


def record_of(method: str, perplexity: float, **method_settings: Any) -> dict[str, Any]:
    """A record of the demo, with the fields that a report reads."""
    pruned, calibrated = method != "dense", method not in ("dense", "magnitude")
    return {
        "key": f"{method}{perplexity:g}".ljust(16, "0")[:16],
        "config": {
            "model": {"name": "smollm2_135m"},
            "method": {"name": method, **method_settings},
            "pattern": {"name": "2:4", "n": 2, "m": 4} if pruned else None,
            "scope": "mlp" if pruned else None,
            "seed": 0 if calibrated else None,
            "eval": {"perplexity": {"max_windows": 16}},
        },
        "identity": {"model": "offline:smollm2_135m@b179c9523d0e6a0f"},
        "protocol": {
            "bos": "never",
            "dtype": "float32",
            "device": "cpu",
            "model_note": NOTE,
            "context": 512,
            "dataset": "wikipedia_mini",
            "split": "even",
            "windows": 16,
            "lm_eval": "0.4.13",
            "limit": 20,
        },
        "calibration": {"name": "c4_mini", "num_samples": 16, "seq_len": 512} if calibrated else None,
        "sparsity": {"scope": 0.5 * pruned, "decoder": 0.37 * pruned, "model": 0.29 * pruned, "layers": []},
        "metrics": {
            "perplexity": {"wikipedia_mini": perplexity},
            "tasks": {"piqa": task(0.6, 0.65), "winogrande": task(0.5), "arc_easy": task(0.4, 0.3)},
            "mean_acc": 0.5,
            "mean_acc_norm": 0.48,
        },
        "cost": {
            "load_s": 1.0,
            "prune_s": 30.0 * pruned,
            "eval_s": 60.0,
            "peak_rss_bytes": 2_000_000_000,
            "peak_gpu_bytes": None,
        },
    }


@pytest.fixture
def demo() -> list[dict[str, Any]]:
    """The five methods, in the order of a sweep and not in that of their scores."""
    return [
        record_of("dense", 20.4),
        record_of("magnitude", 745.0),
        record_of("wanda", 100.2),
        record_of("sparsegpt", 60.1, blocksize=128, damping=0.01),
        record_of("dass", 85.3, alpha=0.5, granularity="input"),
    ]


def paper_record() -> dict[str, Any]:
    """A record made as the paper makes its own."""
    record = record_of("dass", 7.2, alpha=0.5, granularity="input")
    record["config"]["model"]["name"] = "llama2_7b"
    record["config"]["eval"]["perplexity"]["max_windows"] = None
    record["protocol"] |= {
        "model_note": "",
        "context": 2048,
        "dataset": "wikitext2",
        "split": "test",
        "windows": 166,
        "limit": None,
    }
    record["calibration"] = {"name": "c4", "num_samples": 128, "seq_len": 2048}
    record["metrics"] = {
        "perplexity": {"wikitext2": 7.2},
        "tasks": {"arc_easy": task(0.7, 0.6, "test")},
        "mean_acc": 0.7,
        "mean_acc_norm": 0.6,
    }
    return record


# The table


def test_the_best_perplexity_comes_first_and_dense_stands_where_it_belongs(demo):
    frame = comparison(demo)
    assert list(frame["method"]) == ["dense", "sparsegpt", "dass", "wanda", "magnitude"]
    assert list(frame["perplexity"]) == ["20.40", "60.10", "85.30", "100.20", "745.00"]


def test_dense_is_not_put_first_where_it_is_not_best(demo):
    demo[0]["metrics"]["perplexity"]["wikipedia_mini"] = 70.0
    assert list(comparison(demo)["method"]) == ["sparsegpt", "dense", "dass", "wanda", "magnitude"]


def test_without_a_perplexity_the_best_mean_accuracy_comes_first(demo):
    for index, record in enumerate(demo):
        del record["metrics"]["perplexity"]
        record["metrics"]["mean_acc"] = [0.3, 0.5, 0.4, 0.2, 0.6][index]
    frame = comparison(demo)
    assert list(frame["method"]) == ["dass", "magnitude", "wanda", "dense", "sparsegpt"]
    assert "perplexity" not in frame


def test_every_score_stands_with_its_standard_error(demo):
    row = comparison(demo).iloc[0]
    assert row["piqa"] == "60.0 ± 5.0"
    assert row["winogrande"] == "50.0 ± 5.0"
    assert (row["mean acc"], row["mean acc_norm"]) == ("50.0", "48.0")


def test_labels_that_are_the_same_everywhere_stand_in_the_settings_line(demo):
    frame = comparison(demo)
    assert not {"model", "pattern", "scope", "seed"} & set(frame.columns)
    line = settings_line(demo)
    assert all(
        label in line
        for label in ("2:4", "scope mlp", "dass alpha=0.5 granularity=input", "sparsegpt blocksize=128 damping=0.01")
    )


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
    frame = comparison([*demo, other])
    assert column in frame
    assert len(set(frame[column]) - {""}) == 2


def test_a_hyper_parameter_that_differs_is_shown_in_its_row_and_only_there(demo):
    frame = comparison([*demo, record_of("dass", 90.0, alpha=1.0, granularity="input")])
    assert list(frame["method"]) == ["dense", "sparsegpt", "dass alpha=0.5", "dass alpha=1.0", "wanda", "magnitude"]


def test_a_cell_that_was_not_scored_is_empty(demo):
    del demo[0]["metrics"]["tasks"]["piqa"]
    frame = comparison(demo)
    assert list(frame["piqa"]) == [""] + ["60.0 ± 5.0"] * 4


def test_markdown_has_every_row_and_every_column(demo):
    frame = comparison(demo)
    lines = as_markdown(frame).splitlines()
    assert len(lines) == 2 + len(demo)
    assert {line.count("|") for line in lines} == {len(frame.columns) + 1}
    for record in demo:
        (line,) = [line for line in lines if f"| {record['config']['method']['name']} |" in line]
        assert f"{record['metrics']['perplexity']['wikipedia_mini']:.2f}" in line
        assert record["key"][:8] in line


def test_the_table_of_a_terminal_has_every_row(demo):
    screen = io.StringIO()
    Console(width=200, file=screen).print(as_rich(comparison(demo), "A title"))
    text = screen.getvalue()
    assert "A title" in text
    assert all(name in text for name in ("dense", "sparsegpt", "dass", "wanda", "magnitude", "745.00"))


# What stands below it


def test_the_footnotes_say_what_differs_from_the_paper(demo):
    notes = footnotes(demo)
    for words in (
        ("smollm2_135m", "4-bit", "llama2_7b"),
        ("16 x 512", "c4_mini", "128 x 2048", "c4"),
        ("16 windows of 512", "wikipedia_mini", "2048", "wikitext2"),
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
        (lambda record: record["config"].update(scope="all"), "scope all"),
        (lambda record: record["calibration"].update(num_samples=64), "64 x 2048"),
        (lambda record: record["calibration"].update(seq_len=1024), "128 x 1024"),
        (lambda record: record["protocol"].update(context=1024), "1024"),
        (lambda record: record["protocol"].update(limit=50), "first 50"),
        (lambda record: record["metrics"]["tasks"]["arc_easy"].update(split="validation"), "validation"),
        (
            lambda record: (
                record["protocol"].update(windows=4),
                record["config"]["eval"]["perplexity"].update(max_windows=4),
            ),
            "4 windows",
        ),
    ],
    ids=["scope", "num_samples", "seq_len", "context", "limit", "split", "max_windows"],
)
def test_each_difference_has_its_footnote(change, word):
    record = paper_record()
    change(record)
    (note,) = footnotes([record])
    assert word in note


def test_the_caption_says_how_the_numbers_were_made(demo):
    text = caption(demo[4])
    for words in (
        "offline:smollm2_135m@b179c9523d0e6a0f",
        NOTE,
        "float32",
        "16 x 512 tokens of c4_mini, seed 0",
        "16 windows of 512 tokens of wikipedia_mini (even)",
        "lm-eval 0.4.13",
        "first 20 documents",
        "beginning-of-sequence token: never",
    ):
        assert words in text


def test_the_caption_of_dense_says_nothing_of_calibration(demo):
    assert "calibration" not in caption(demo[0])


def test_labels():
    config = record_of("dass", 1.0, alpha=0.5, granularity="input")["config"]
    assert (method_label(config), pattern_label(config), scope_label(config)) == (
        "dass alpha=0.5 granularity=input",
        "2:4",
        "scope mlp",
    )
    dense = record_of("dense", 1.0)["config"]
    assert (method_label(dense), pattern_label(dense), scope_label(dense)) == ("dense", "", "")
    assert with_error({"acc": 0.456, "acc_stderr": 0.0123}, "acc") == "45.6 ± 1.2"


# What a person sees


def test_the_summary_shows_pruned_beside_dense_and_the_record(demo, capsys):
    show(demo[4], demo[0], Path("results/runs/x/result.json"), found=True)
    text = capsys.readouterr().out
    rows = {
        label: next(line for line in text.splitlines() if label in line)
        for label in ("perplexity wikipedia_mini", "sparsity of the scope %")
    }
    assert re.findall(r"[\d.]+", rows["perplexity wikipedia_mini"]) == ["20.40", "85.30"]
    assert re.findall(r"[\d.]+", rows["sparsity of the scope %"]) == ["0.0", "50.0"]
    for words in (
        "piqa acc %",
        "piqa acc_norm %",
        "60.0 ± 5.0",
        "mean acc %",
        "29.0",
        "37.0",
        "peak memory GB",
        "found results/runs/x/result.json",
    ):
        assert words in text, words


def test_the_summary_of_dense_has_one_column(demo, capsys):
    show(demo[0], None, Path("result.json"), found=False)
    text = capsys.readouterr().out
    assert "20.40" in text
    assert "wrote result.json" in text


def test_a_run_without_scores_has_a_summary(demo, capsys):
    demo[4]["metrics"] = {}
    show(demo[4], None, Path("result.json"), found=False)
    assert "sparsity of the scope" in capsys.readouterr().out


def test_the_watch_says_each_phase_once(capsys):
    with TerminalReporter().phase("pruning with dass", 2) as step:
        step()
        step()
    assert capsys.readouterr().err.strip() == "pruning with dass ..."


# After a sweep


@pytest.fixture
def sweep(tmp_path, demo):
    """A sweep's folder: five cells that ended well, then one that failed."""
    for number, record in enumerate(demo):
        path = tmp_path / "runs" / record["key"] / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record))
        note_cell(tmp_path / "sweep" / str(number), {"status": "done", "overrides": [], "record": str(path)})
    note_cell(
        tmp_path / "sweep" / "10",
        {"status": "failed", "overrides": ["method.alpha=-1"], "error": "method.alpha=-1: no"},
    )
    return OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "sweep")}}, "sweep": {"title": "Every method"}})


@pytest.fixture(autouse=True)
def _no_sweep_is_left(monkeypatch):
    monkeypatch.setattr(Sweep, "failed", 0)


def test_after_a_sweep_its_cells_stand_side_by_side(sweep, capsys, caplog):
    with caplog.at_level(logging.ERROR):
        Comparison().on_multirun_end(sweep)
    text, folder = capsys.readouterr().out, Path(sweep.hydra.sweep.dir)
    kept = (folder / "comparison.md").read_text()
    for shown in (text, kept):
        assert all(
            words in shown for words in ("Every method", "745.00", "20.40", "16 x 512 tokens of c4_mini", "4-bit")
        )
    assert "paper" in text
    assert str(folder / "comparison.md") in text
    assert Sweep.failed == 1
    assert [entry.getMessage() for entry in caplog.records] == ["failed: method.alpha=-1: method.alpha=-1: no"]


def test_a_sweep_of_failures_only_shows_no_table(sweep, capsys):
    folder = Path(sweep.hydra.sweep.dir)
    for path in folder.glob("[0-4]/cell.json"):
        path.unlink()
    Comparison().on_multirun_end(sweep)
    assert Sweep.failed == 1
    assert capsys.readouterr().out == ""
    assert not (folder / "comparison.md").exists()


def test_two_cells_with_one_record_are_one_row(sweep, tmp_path, demo):
    path = tmp_path / "runs" / demo[0]["key"] / "result.json"
    note_cell(tmp_path / "sweep" / "11", {"status": "done", "overrides": [], "record": str(path)})
    Comparison().on_multirun_end(sweep)
    lines = (tmp_path / "sweep" / "comparison.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| dense")]) == 1


def test_calibrations_and_seeds_that_differ_stand_in_the_rows_and_not_in_the_caption(demo):
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
