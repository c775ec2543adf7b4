"""What a run scores: texts of one's own, and several sets of windows."""

from __future__ import annotations

import pytest
from support import Phases, contains, killed_after_block, run_with

from dass_exp.errors import UserError
from dass_exp.report.console import caption
from dass_exp.report.table import build_table
from dass_exp.report.write import caption as table_caption
from dass_exp.runs.context import RunContext
from dass_exp.storage.record_schema import record_problem

pytestmark = pytest.mark.usefixtures("short_texts")

TEXT = "One-shot pruning removes weights of a language model.\n\nThe cat sat on the mat, twice.\n\n"


@pytest.fixture
def own(cell, tmp_path):
    """A run that calibrates on a file and scores another one."""
    (tmp_path / "a.txt").write_text(TEXT * 20)
    (tmp_path / "b.txt").write_text(TEXT.upper() * 20)
    files = ["calibration=text_file", f"calibration.text.path={tmp_path}/a.txt", "eval=ppl_text_file"]
    return [*cell, *files, f"eval.perplexity.text.path={tmp_path}/b.txt", "eval.perplexity.name=mine"]


def test_a_run_calibrates_on_a_file_and_scores_another(own, tmp_path):
    record = run_with(*own).record
    assert list(record["metrics"]["perplexity"]) == ["mine"]
    assert record["calibration"]["name"] == "text_file"
    assert str(tmp_path) not in repr(record["identity"])
    (tmp_path / "c.txt").write_text(TEXT.upper() * 20)
    assert run_with(*own, f"eval.perplexity.text.path={tmp_path}/c.txt").found


@pytest.mark.parametrize("setting", ["calibration.text.path", "eval.perplexity.text.path"])
@pytest.mark.parametrize(("content", "words"), [(None, "no such file"), (b"", "no text"), (b"caf\xe9", "not UTF-8")])
def test_a_file_that_is_no_text_is_refused_before_the_model_is_loaded(own, tmp_path, setting, content, words):
    phases = Phases()
    if content is not None:
        (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        run_with(*own, f"{setting}={tmp_path}/bad.txt", context=RunContext(phases))
    assert contains(str(caught.value), ["text.path=", "bad.txt", words])
    assert phases.count("loading") == [0]
    assert not (tmp_path / "results" / "runs").exists()


# --- several sets of windows

C4 = "text:{_target_:dass_exp.data.texts.OfflineText,asset:c4}"
EXTRA = [f"eval.extra_perplexity={{c4:{{{C4},context:48,max_windows:3}},c4_short:{{{C4},context:16}}}}"]
AS_THE_ONLY_SET = [
    f"eval.perplexity.{C4.replace(':', '=', 1)}",
    "eval.perplexity.context=48",
    "eval.perplexity.text.part=all",
]
AS_THE_ONLY_SET += ["eval.perplexity.max_windows=3", "eval.perplexity.name=c4"]


def test_each_set_is_scored_as_if_it_were_the_only_one(cell):
    both, first, second = run_with(*cell, *EXTRA), run_with(*cell), run_with(*cell, *AS_THE_ONLY_SET)
    for record, one, other in ((both.record, first.record, second.record), (both.dense, first.dense, second.dense)):
        assert list(record["metrics"]["perplexity"]) == ["wikipedia_mini", "c4", "c4_short"]
        for field in ("perplexity", "window_nll", "predicted_tokens_per_window"):
            values = record["metrics"][field]
            assert values["wikipedia_mini"] == one["metrics"][field]["wikipedia_mini"]
            assert values["c4"] == other["metrics"][field]["c4"]
        fields = ("context", "dataset", "split", "windows", "windows_sha256")
        assert {name: record["protocol"][name] for name in fields} == {name: one["protocol"][name] for name in fields}
        sets = record["protocol"]["extra_perplexity"]
        assert sets["c4"] == {name: other["protocol"][name] for name in fields}
        assert (sets["c4_short"]["context"], sets["c4_short"]["dataset"]) == (16, "c4_short")
        assert "and 3 windows of 48 tokens of c4 (all)" in caption(record)
        assert record_problem(record, record["key"]) is None
    assert "extra_perplexity" not in {**first.record["protocol"], **first.record["config"]["eval"]}


def test_a_table_shows_one_set(cell, results):
    records = [run_with(*cell, *EXTRA).record]
    layout = {"title": "t", "rows": "method", "columns": "pattern"}
    for metric, name, windows in (
        ("perplexity", "wikipedia_mini", "4 windows of 32 tokens of wikipedia_mini (even)"),
        ("perplexity:c4", "c4", "3 windows of 48 tokens of c4 (all)"),
    ):
        table = build_table("t", {**layout, "metric": metric}, records, [], results)
        (value,) = table.cells.values()
        assert value.values == (records[0]["metrics"]["perplexity"][name],)
        assert windows in table_caption(table)


def test_a_streamed_run_scores_all_sets_and_resumes_them(cell, tmp_path):
    resident = run_with(*cell, *EXTRA)
    streamed = [*cell, *EXTRA, "model.placement=stream", f"results_dir={tmp_path}/streamed"]
    killed_after_block(0, *streamed, "calibration.batch_size=1")
    outcome = run_with(*streamed)
    for record, expected in ((outcome.record, resident.record), (outcome.dense, resident.dense)):
        assert record["key"] == expected["key"]
        assert record["protocol"]["extra_perplexity"] == expected["protocol"]["extra_perplexity"]
        for name, nll in expected["metrics"]["window_nll"].items():
            assert record["metrics"]["window_nll"][name] == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([f"eval.extra_perplexity={{c4:{{{C4},context:1}}}}"], ["eval.extra_perplexity.c4.context=1:", "at least 2"]),
        (
            [f"eval.extra_perplexity={{c4:{{{C4},contxt:9}}}}"],
            ["eval.extra_perplexity.c4: its setting='contxt':", "max_windows"],
        ),
        (["eval.extra_perplexity={c4:{context:9}}"], ["eval.extra_perplexity.c4={", "text: ..."]),
        ([f"eval.extra_perplexity={{wikipedia_mini:{{{C4}}}}}"], ["eval.extra_perplexity.wikipedia_mini:", "another"]),
        (["eval.extra_perplexity=c4"], ["eval.extra_perplexity='c4':", "a mapping"]),
        ([*EXTRA, "eval.perplexity=null"], ["eval.extra_perplexity:", "beside eval.perplexity"]),
        ([f"eval.extra_perplexity={{c4:{{{C4},context:5000}}}}"], ["eval.extra_perplexity.c4.context=5000:", "4096"]),
        ([f"eval.extra_perplexity={{c4:{{{C4},context:4000}}}}"], []),
    ],
)
def test_a_wrong_set_is_named(cell, overrides, words):
    if not words:
        assert run_with(*cell, *overrides, "model.placement=resident", "method=magnitude").record
        return
    with pytest.raises(UserError) as caught:
        run_with(*cell, *overrides)
    assert contains(str(caught.value), words)


def test_names_of_sets_are_part_of_a_run(cell):
    keys = {
        run_with(*cell, "method=dense", override).record["key"]
        for override in (EXTRA[0], EXTRA[0].replace("c4:", "b:"))
    }
    assert len(keys) == 2
