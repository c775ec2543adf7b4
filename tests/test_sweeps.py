"""Sweeps: every file composes, cells share what they can, a plan runs nothing, the report finds what ran."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from support import CONF, ROOT, command, run_with, settings_of

from dass_exp.config.settings import register
from dass_exp.errors import UserError
from dass_exp.models import load as models
from dass_exp.models import tiny as tiny_models
from dass_exp.report import cli
from dass_exp.report.load import cells_of, load
from dass_exp.runs.context import Shelf
from dass_exp.runs.plan import plan
from dass_exp.runs.run import run

SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
CELLS = sorted((ROOT / "sweeps" / "cells").glob("*.yaml"))


@pytest.mark.parametrize("protocol", ["demo", "paper"])
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_composes_at_both_scales(path, protocol, monkeypatch):
    monkeypatch.setenv("DASS_EXP_ROOT", str(ROOT))
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra_compose("config", [f"sweeps={path.stem}", f"protocol={protocol}"], return_hydra_config=True)
    params = composed.hydra.sweeper.params
    assert params
    for name, axis in params.items():
        assert str(axis), name
    assert composed.sweep.title


def test_the_sweeps_of_the_paper_are_there():
    named = {
        "perplexity",
        "zero_shot",
        "alpha",
        "granularity",
        "calibration_size",
        "calibration_source",
        "sparsity_levels",
        "full_model",
        "cost",
        "demo",
    } | {"glu_variants"}
    assert {path.stem for path in SWEEPS} == named


@pytest.mark.parametrize("path", CELLS, ids=lambda path: path.stem)
def test_every_cell_of_the_granularity_ablation_validates(path, monkeypatch):
    monkeypatch.setenv("DASS_EXP_ROOT", str(ROOT))
    settings = settings_of(f"+sweeps/cells={path.stem}")
    expected = {
        "rows_weight": ("dass", {"granularity": "output"}),
        "rows_activation": ("wanda", {}),
        "columns_weight": ("dass", {"alpha": 0.0, "granularity": "input"}),
        "columns_activation": ("dass", {"alpha": 0.5, "granularity": "input"}),
    }
    assert (settings.method.name, settings.method.settings()) == expected[path.stem]


def test_a_shelf_loads_once_and_gives_the_same_numbers(cell, monkeypatch):
    loads, real = [], models.load_model
    monkeypatch.setattr(models, "load_model", lambda spec: loads.append(spec) or real(spec))
    shelf = Shelf()
    wanted = ["wanda", "sparsegpt", "dass", "magnitude"]
    shared = [run(settings_of(*cell, f"method={method}"), shelf=shelf).record for method in wanted]
    assert len(loads) == 1
    alone = [run_with(*cell, f"method={method}", "rerun=true").record for method in wanted]
    assert [one["metrics"] for one in shared] == [one["metrics"] for one in alone]
    assert [one["sparsity"]["scope"] for one in shared] == [0.5] * 4


def test_a_shared_model_is_dense_again_after_a_failure(cell, monkeypatch):
    shelf = Shelf()
    before = run(settings_of(*cell, "method=dense", "rerun=true"), shelf=shelf).record["metrics"]

    def broken(*arguments, **settings):
        raise RuntimeError("the scoring broke")

    with monkeypatch.context() as patched:
        patched.setattr("dass_exp.runs.making.perplexity", broken)
        with pytest.raises(RuntimeError, match="broke"):
            run(settings_of(*cell, "method=wanda"), shelf=shelf)
    assert run(settings_of(*cell, "method=dense", "rerun=true"), shelf=shelf).record["metrics"] == before


def test_a_plan_loads_and_writes_nothing(cell, results, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda spec: pytest.fail("a plan loaded the model"))
    planned = plan(settings_of(*cell))
    assert (planned.done, planned.seconds, planned.basis) == (False, None, "no like record")
    assert not results.exists()


def test_a_plan_knows_what_is_done_and_estimates_the_rest(cell):
    done = run_with(*cell, "method=wanda").record
    assert plan(settings_of(*cell, "method=wanda")).done
    more = plan(settings_of(*cell, "method=wanda", "pattern=4of8"))
    assert not more.done
    cost = done["cost"]["prune_s"]
    assert more.seconds == pytest.approx(cost + sum(_eval_seconds(cell)) / 2)


def _eval_seconds(cell):
    return [run_with(*cell, f"method={method}").record["cost"]["eval_s"] for method in ("wanda", "dense")]


def test_a_plan_refuses_what_a_run_would_refuse(cell):
    with pytest.raises(UserError, match=r"model\.layers\.0"):
        plan(settings_of(*cell, "pattern=nm", "pattern.n=2", "pattern.m=7"))


@pytest.mark.parametrize("path", sorted((CONF / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_file_says_what_it_needs(path, results, monkeypatch, tmp_path):
    monkeypatch.setattr(tiny_models, "cache_dir", lambda: tmp_path)  # whatever was trained on this machine
    own = yaml.safe_load(path.read_text())
    assert own.keys() <= {"name", "path", "license", "parameters", "context", "revision", "dtype", "bos"}
    planned = plan(settings_of(f"model={path.stem}", f"results_dir={results}", "tracker=none"))
    assert f"{own['name']} ({own['path']})" in planned.needs
    assert f"license: {own['license']}; sequences up to {own['context']} tokens" in planned.needs
    here = own["path"] == "offline:smollm2_135m"
    assert planned.basis.startswith("no like record" if here else "the model is not at hand")


def test_a_model_without_a_file_that_is_not_there_is_refused(results):
    with pytest.raises(UserError, match="no-owner/no-model"):
        plan(settings_of("model.path=no-owner/no-model", f"results_dir={results}"))


def test_a_repeat_is_a_record_of_its_own(cell):
    keys = {run_with(*cell, "method=magnitude", f"repeat={number}").record["key"] for number in (0, 1, 2)}
    assert len(keys) == 3


SWEEP = ["sweeps=alpha", "pattern=2of4", "method.alpha=0,1", "eval=ppl_mini"]


@pytest.fixture(name="swept", scope="module")
def swept_fixture(tiny, tmp_path_factory):
    """A folder in which a real sweep ran through the command, with a bad cell."""
    folder = tmp_path_factory.mktemp("swept")
    rest = [f"model.path={tiny}", "tracker=none", "eval.perplexity.context=32", "eval.perplexity.max_windows=4"]
    few = ["calibration.num_samples=4", "calibration.seq_len=32"]
    planned = command(*SWEEP, *rest, *few, "plan=true", folder=folder)
    assert planned.returncode == 0, planned.stderr
    assert "would run" in planned.stdout
    assert not (folder / "results" / "runs").exists()
    done = command("sweeps=alpha", "pattern=2of4", "method.alpha=0,1,-1", "eval=ppl_mini", *rest, *few, folder=folder)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("loading the model") == 1
    return folder / "results"


def test_the_report_of_a_sweep(swept, capsys):
    (swept / "runs" / "broken").mkdir()
    (swept / "runs" / "broken" / "result.json").write_text('{"schema": 1, "key"')
    cli.main(["alpha", "--results", str(swept)])
    text = (swept / "tables" / "alpha.md").read_text()
    assert "| alpha=0.0 |" in text
    assert "| alpha=1.0 |" in text
    assert "| alpha=-1 | failed |" in text
    assert "| dense |" in text
    assert "method.alpha=-1: expected a number" in text
    assert "No published number on file" in text
    assert (swept / "report.html").is_file()
    assert {path.suffix for path in (swept / "figures").iterdir()} == {".svg", ".png"}
    problems = load(swept).problems
    assert len(problems) == 1
    assert "broken/result.json" in problems[0]


def test_a_report_may_be_written_elsewhere(swept, tmp_path):
    cli.main(["alpha", "--results", str(swept), "--output", str(tmp_path / "paper")])
    assert {path.name for path in (tmp_path / "paper").rglob("*.*")} == {
        "report.html",
        *(f"alpha.{ending}" for ending in ("md", "csv", "tex", "svg", "png")),
    }
    links = re.findall(r'href="([^"#]*result.json)"', (tmp_path / "paper" / "report.html").read_text())
    assert len(links) == 3
    assert all((tmp_path / "paper" / link).is_file() for link in links)


def test_the_cells_of_a_sweep_end_as_they_last_ended(swept):
    cells = cells_of(swept, "alpha")
    assert sorted(cell.status for cell in cells) == ["done", "done", "failed"]
    assert cells_of(swept, "perplexity") == []


def test_two_records_are_compared(swept, capsys):
    first, second = (cell.key for cell in cells_of(swept, "alpha") if cell.status == "done")
    cli.main(["compare", "--results", str(swept), first, second])
    assert "| method.alpha | 0.0 | 1.0 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code"), [(["nonsense"], 2), (["compare", "0"], 2), (["compare", "zz", "zz"], 2)]
)
def test_a_question_that_cannot_be_answered_ends_with_2(swept, arguments, code):
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--results", str(swept)])
    assert ended.value.code == code


def test_an_empty_folder_says_what_to_do(tmp_path, caplog):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--results", str(tmp_path)])
    assert ended.value.code == 2
    assert "run a sweep first" in caplog.text


def test_layouts_name_metrics_and_axes_that_exist():
    for path in SWEEPS:
        layout = yaml.safe_load(Path(path).read_text())["sweep"]
        if path.stem != "demo":
            assert layout["metric"] in ("perplexity", "acc", "cost")
            assert set(layout) <= {"title", "rows", "columns", "metric", "figure", "note"}
    assert json.dumps(layout)
