"""What a run scores: texts of one's own, several sets of windows, generated text."""

from __future__ import annotations

import pytest
import torch
from support import Phases, contains, killed_after_block, run_with, settings_of, without
from transformers import AutoModelForCausalLM

from dass_exp.errors import UserError
from dass_exp.report.console import caption
from dass_exp.report.table import build_table
from dass_exp.report.write import caption as table_caption
from dass_exp.runs.context import ModelCache, RunContext
from dass_exp.runs.resolve import resolve
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


@pytest.mark.thorough
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


@pytest.mark.thorough
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


@pytest.mark.thorough
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


@pytest.mark.thorough
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


@pytest.mark.thorough
def test_names_of_sets_are_part_of_a_run(cell):
    keys = {
        run_with(*cell, "method=dense", override).record["key"]
        for override in (EXTRA[0], EXTRA[0].replace("c4:", "b:"))
    }
    assert len(keys) == 2


# --- generation

GENERATED = "eval=[ppl_mini,generation_mini]"
SHORT_GENERATION = ["eval.generation.prompts=3", "eval.generation.tokens=8"]


@pytest.fixture
def generating(cell):
    """A run that generates a little."""
    return [*without(cell, "eval=ppl_mini"), GENERATED, *SHORT_GENERATION]


@pytest.mark.thorough
def test_the_pruned_model_is_compared_with_the_dense_one(generating, tmp_path):
    outcome = run_with(*generating, f"save={tmp_path}/saved")
    record, dense = outcome.record, outcome.dense
    assert dense["metrics"]["generation"]["equal"] == 1.0
    windows = RunContext().windows(resolve(settings_of(*generating, "rerun=true"), RunContext()))
    prompts = windows["wikipedia_mini"].ids[:3, :32]
    models = [
        AutoModelForCausalLM.from_pretrained(path)
        for path in (settings_of(*generating).model.path, f"{tmp_path}/saved")
    ]
    with torch.no_grad():
        texts = [
            model.generate(prompts, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, 32:] for model in models
        ]
    expected = (texts[0] == texts[1]).double().mean().item()
    assert record["metrics"]["generation"] == {
        "prompts": 3,
        "tokens": 8,
        "equal": expected,
        "distinct_4": record["metrics"]["generation"]["distinct_4"],
    }
    assert 0 <= expected < 1
    assert record_problem(record, record["key"]) is None


@pytest.mark.thorough
def test_the_dense_model_generates_once_in_a_process(generating):
    phases, shared = Phases(), ModelCache()
    for method in ("magnitude", "wanda", "dass"):
        run_with(*generating, f"method={method}", context=RunContext(phases, shared))
    assert phases.count("generation of the dense", "generation of") == [1, 4]
    run_with(*generating, "method=magnitude", "rerun=true", context=RunContext(phases))  # the dense record is there
    assert phases.count("generation of the dense", "generation of") == [2, 6]


@pytest.mark.thorough
def test_generation_changes_neither_perplexity_nor_the_key_of_a_run_without_it(generating, cell):
    with_it, without_it = run_with(*generating).record, run_with(*cell).record
    assert with_it["key"] != without_it["key"]
    assert with_it["metrics"]["window_nll"] == without_it["metrics"]["window_nll"]
    assert "generation" not in {
        **without_it["metrics"],
        **without_it["config"]["eval"],
        **without_it["identity"]["eval"],
    }


def test_a_streamed_run_leaves_it_out_in_one_line(generating, cell, caplog):
    outcome = run_with(*generating, "model.placement=stream")
    assert outcome.record["key"] == run_with(*cell).record["key"]
    assert "generation" not in {**outcome.record["metrics"], **outcome.dense["metrics"]}
    lines = [record.getMessage() for record in caplog.records if "eval.generation" in record.getMessage()]
    assert len(lines) == 1
    assert "block by block" in lines[0]


@pytest.mark.thorough
def test_an_interrupted_streamed_run_goes_on_without_it(generating, caplog):
    streamed = [*generating, "resume=true"]
    killed_after_block(0, *streamed, "model.placement=stream")
    caplog.clear()
    assert "generation" not in run_with(*streamed).record["metrics"]
    assert len([record for record in caplog.records if "eval.generation" in record.getMessage()]) == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["eval=generation_mini"], ["eval.generation:", "eval=[ppl_mini,generation_mini]"]),
        ([GENERATED, "eval.generation.tokens=3"], ["eval.generation.tokens=3:", "at least 4"]),
        (["eval=ppl_mini", "eval.generation={tokens:3}"], ["eval.generation.tokens=3:", "at least 4"]),
        (["eval=ppl_mini", "eval.generation=16"], ["eval.generation=16:", "{prompts: 16, tokens: 32}"]),
        ([GENERATED, "+eval.generation.prompt=1"], ["eval.generation: its setting='prompt':", "prompts, tokens"]),
        ([GENERATED, "eval.generation.prompts=0"], ["eval.generation.prompts=0:", "at least 1"]),
        ([GENERATED, "eval.generation.tokens=4090"], ["eval.generation.tokens=4122:", "4096 positions"]),
    ],
)
def test_a_wrong_check_is_named(cell, overrides, words):
    with pytest.raises(UserError) as caught:
        run_with(*without(cell, "eval"), *overrides)
    assert contains(str(caught.value), words)


def test_several_files_of_the_evaluation_have_one_name(generating):
    assert settings_of(*generating).eval.name == "several"
