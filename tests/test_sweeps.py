"""Sweeps: every file composes, cells share what they can, a plan runs nothing, the report finds what ran."""

from __future__ import annotations

import re

import pytest
import support
import yaml
from engine_support import PRUNING
from support import CONF, ROOT, FixedMemory, Phases, command, run_with, settings_of, tiny_overrides

from dass_exp.engine.callbacks import Callback
from dass_exp.errors import UserError
from dass_exp.models import load as model_load
from dass_exp.report import cli
from dass_exp.report.load import cells_of, load
from dass_exp.report.metrics import METRICS
from dass_exp.runs.context import ModelCache, RunContext
from dass_exp.runs.failed_cell import describe_failed
from dass_exp.runs.plan import plan
from dass_exp.runs.resolve import resolve
from dass_exp.runs.resolved_run import Components

SWEEPS = sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml"))
LOADED = "loading the model"


@pytest.mark.thorough
@pytest.mark.parametrize("protocol", ["demo", "paper"])
@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_composes_at_both_scales_to_axes_and_the_layout_of_a_table(name, protocol):
    composed = support.composed_with_hydra(f"sweeps={name}", f"protocol={protocol}")
    params, layout = composed.hydra.sweeper.params, composed.sweep
    assert params
    assert all(str(axis) for axis in params.values())
    assert layout.title
    if name != "demo":
        assert layout.metric in METRICS
        assert set(layout) <= {"title", "rows", "columns", "metric", "figure", "note", "metrics"}


def test_the_sweeps_of_the_paper_are_there():
    paper = "perplexity zero_shot alpha granularity calibration_size calibration_source sparsity_levels full_model cost"
    assert {*paper.split(), "demo", "glu_variants"} <= set(SWEEPS)


@pytest.mark.parametrize(
    ("cell", "name", "settings"),
    [
        ("rows_weight", "dass", {"granularity": "output"}),
        ("rows_activation", "wanda", {}),
        ("columns_weight", "dass", {"alpha": 0.0, "granularity": "input"}),
        ("columns_activation", "dass", {"alpha": 0.5, "granularity": "input"}),
    ],
)
def test_every_cell_of_the_granularity_ablation_is_a_method(cell, name, settings):
    method = Components.of(settings_of(f"variant={cell}")).method
    assert (method.name, method.settings()) == (name, settings)


# --- what cells share


@pytest.mark.thorough
def test_cells_load_their_model_once_and_get_the_numbers_that_they_get_alone(cell):
    phases, cache, methods = Phases(), ModelCache(), [method.name for method in PRUNING]
    shared = [run_with(*cell, f"method={name}", context=RunContext(phases, cache)).record for name in methods]
    assert phases.count(LOADED) == [1]
    alone = [run_with(*cell, f"method={name}", "rerun=true").record for name in methods]
    assert [record["metrics"] for record in shared] == [record["metrics"] for record in alone]
    assert [record["sparsity"]["scope"] for record in shared] == [0.5] * len(methods)


@pytest.mark.thorough
def test_a_shared_model_is_dense_again_after_a_failure(cell):
    class Broken(Callback):
        def on_end(self) -> None:
            raise RuntimeError("it broke")

    cache, dense = ModelCache(), [*cell, "method=dense", "rerun=true"]
    before = run_with(*dense, context=RunContext(shared=cache)).record["metrics"]
    with pytest.raises(RuntimeError, match="broke"):
        run_with(*cell, "method=wanda", context=RunContext(shared=cache, callbacks=[Broken()]))
    assert run_with(*dense, context=RunContext(shared=cache)).record["metrics"] == before


@pytest.mark.thorough
def test_a_cell_without_enough_memory_is_the_same_cell_once_its_activations_are_on_disk(cell):
    device, disk = (
        resolve(settings_of(*cell, f"calibration.cache={cache}"), RunContext()).needs for cache in ("device", "disk")
    )
    free = min(device.resident, device.streamed) - 1
    assert min(disk.resident, disk.streamed) < free
    context = FixedMemory(free)
    with pytest.raises(UserError, match=r"calibration\.cache=disk"):
        run_with(*cell, context=context)
    failed = describe_failed(*support.composed_with_choices(*cell), context)
    repaired = run_with(*cell, "calibration.cache=disk", context=FixedMemory(free)).record
    assert failed["key"] == repaired["key"]


def test_a_cell_with_a_wrong_method_still_names_its_pattern(cell):
    composed, choices = support.composed_with_choices(*cell, "method._target_=dass_exp.nope.Nope")
    failed = describe_failed(composed, choices, RunContext())
    assert failed["config"]["pattern"] == {"name": "2:4", "n": 2, "m": 4}
    assert failed["config"]["method"]["name"] == "dass"


# --- a plan


@pytest.mark.thorough
def test_a_plan_loads_and_writes_nothing(cell, results):
    phases = Phases()
    planned = plan(settings_of(*cell), RunContext(phases))
    assert (planned.done, planned.seconds) == (False, None) and planned.basis.startswith("no like record; about ")
    assert phases.count(LOADED) == [0]
    assert not results.exists()


@pytest.mark.thorough
def test_a_plan_knows_what_is_done_and_estimates_the_rest(cell):
    outcome = run_with(*cell, "method=wanda")
    assert plan(settings_of(*cell, "method=wanda")).done
    more = plan(settings_of(*cell, "method=wanda", "pattern=4of8"))
    assert not more.done
    eval_s = sum(record["cost"]["eval_s"] for record in (outcome.record, outcome.dense)) / 2
    assert more.seconds == pytest.approx(outcome.record["cost"]["prune_s"] + eval_s)


def test_a_model_that_is_missing_is_searched_for_once(monkeypatch, results):
    searched = []

    def missing(*_):
        searched.append(1)
        raise UserError("there is none")

    monkeypatch.setattr(model_load, "identify", missing)
    context = RunContext(planning=True)
    plans = [
        plan(settings_of("model=llama2_7b", f"method={name}", f"results_dir={results}"), context)
        for name in ("dass", "wanda")
    ]
    assert searched == [1]
    assert {planned.problem for planned in plans} == {"there is none"}


@pytest.mark.thorough
def test_the_arithmetic_of_a_run_is_that_of_its_tokens(cell):
    planned = plan(settings_of(*cell, "method=wanda", "calibration.num_samples=4", "calibration.seq_len=32"))
    assert "(256 tokens of calibration, " in planned.basis
    dense = plan(settings_of(*cell, "method=dense"))
    assert "calibration" not in dense.basis


def test_what_a_model_file_says_does_not_hold_for_another_path(tiny):
    named = settings_of(f"model.path={tiny}", "model.name=mine").model
    assert (named.name, named.parameters, named.license) == ("mine", None, None)
    assert settings_of("model.name=mine").model.parameters is not None


@pytest.mark.thorough
def test_a_plan_refuses_what_a_run_would_refuse(cell, results):
    with pytest.raises(UserError, match=r"model\.layers\.0"):
        plan(settings_of(*cell, "pattern=nm", "pattern.n=2", "pattern.m=7"))
    with pytest.raises(UserError, match="no-owner/no-model"):
        plan(settings_of("model.path=no-owner/no-model", f"results_dir={results}"))


@pytest.mark.thorough
@pytest.mark.parametrize("path", sorted((CONF / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_file_says_what_it_needs(path, results, monkeypatch, tmp_path):
    own = yaml.safe_load(path.read_text())
    if own["path"].startswith("tiny:"):
        monkeypatch.setenv("DASS_EXP_CACHE", str(tmp_path))  # whatever was trained on this machine
    assert own.keys() <= {"path", "license", "parameters", "context", "revision", "dtype", "bos"}
    planned = plan(settings_of(f"model={path.stem}", f"results_dir={results}", "tracker=none"))
    assert f"{path.stem} ({own['path']})" in planned.needs
    assert f"license: {own['license']}; sequences up to {own['context']} tokens" in planned.needs
    at_hand = path.stem == "smollm2_135m"
    assert bool(planned.problem) != at_hand
    assert planned.basis.startswith("no like record; about" if at_hand else "about") and "TFLOP (" in planned.basis


# --- a sweep through the command


@pytest.fixture(scope="module")
def swept(tiny, tmp_path_factory):
    """The results of a sweep through the command, one of whose cells is bad."""
    folder = tmp_path_factory.mktemp("swept")
    sweep = ["sweeps=alpha", "pattern=2of4", *tiny_overrides(tiny, folder / "results")]
    planned = command(*sweep, "method.alpha=0,1", "plan=true", folder=folder)
    assert planned.returncode == 0, planned.stderr
    assert "would run" in planned.stdout
    assert not (folder / "results" / "runs").exists()
    done = command(*sweep, "method.alpha=0,1,-1", folder=folder)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count(LOADED) == 1
    return folder / "results"


@pytest.mark.thorough
def test_the_report_of_a_sweep(swept):
    (swept / "runs" / "broken").mkdir()
    (swept / "runs" / "broken" / "result.json").write_text('{"schema": 1, "key"')
    cli.main(["alpha", "--results", str(swept)])
    text = (swept / "tables" / "alpha.md").read_text()
    rows = ["| alpha=0.0 |", "| alpha=1.0 |", "| alpha=-1 | failed |", "| dense |"]
    remarks = ["method.alpha=-1: expected a number", "No published number on file"]
    assert [words for words in (*rows, *remarks) if words not in text] == []
    assert (swept / "report.html").is_file()
    assert {path.suffix for path in (swept / "figures").iterdir()} == {".svg", ".png", ".pdf"}
    (problem,) = load(swept).problems
    assert "broken/result.json" in problem


@pytest.mark.thorough
def test_a_report_may_be_written_elsewhere(swept, tmp_path):
    cli.main(["alpha", "--results", str(swept), "--output", str(tmp_path / "paper")])
    files = {path.name for path in (tmp_path / "paper").rglob("*.*")}
    assert files == {"report.html", *(f"alpha.{ending}" for ending in ("md", "csv", "tex", "svg", "png", "pdf"))}
    links = re.findall(r'href="([^"#]*result.json)"', (tmp_path / "paper" / "report.html").read_text())
    assert len(links) == 3
    assert all((tmp_path / "paper" / link).is_file() for link in links)


@pytest.mark.thorough
def test_another_metric_has_a_table_of_its_own(swept, tmp_path):
    cli.main(["alpha", "--metric", "cost", "--results", str(swept), "--output", str(tmp_path)])
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {
        f"alpha_cost.{end}" for end in ("md", "csv", "tex")
    }
    text = (tmp_path / "tables" / "alpha_cost.md").read_text()
    assert text.startswith("# Cost: Perplexity against alpha")
    assert "| 2:4 alpha=0.0 |" in text
    assert "Made by `dass-report alpha --metric cost`." in text
    cli.main(["alpha", "--metrics", "--results", str(swept), "--output", str(tmp_path / "all")])
    text = (tmp_path / "all" / "tables" / "alpha_metrics.md").read_text()
    assert text.startswith("# What perplexity does not show: Perplexity against alpha")
    assert re.search(r"\| 2:4 alpha=0.0 \| (\*\*)?\d+\.\d\d \(\d(-\d)?\)", text)
    with pytest.raises(SystemExit) as ended:
        cli.main(["alpha", "--metric", "nonsense", "--results", str(swept)])
    assert ended.value.code == 2


@pytest.mark.thorough
def test_the_cells_of_a_sweep_end_as_they_last_ended_and_can_be_compared(swept, capsys):
    cells = cells_of(swept, "alpha")
    assert sorted(cell.status for cell in cells) == ["done", "done", "failed"]
    assert cells_of(swept, "perplexity") == []
    cli.main(["compare", "--results", str(swept), *(cell.key for cell in cells if cell.status == "done")])
    assert "| method.alpha | 0.0 | 1.0 |" in capsys.readouterr().out


@pytest.mark.thorough
@pytest.mark.parametrize("arguments", [["nonsense"], ["compare", "0"], ["compare", "zz", "zz"]])
def test_a_question_that_cannot_be_answered_ends_with_2(swept, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--results", str(swept)])
    assert ended.value.code == 2


def test_an_empty_folder_says_what_to_do(tmp_path, caplog):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--results", str(tmp_path)])
    assert ended.value.code == 2
    assert "run a sweep first" in caplog.text
