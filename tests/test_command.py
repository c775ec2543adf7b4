"""The command in this process: what it refuses before Hydra acts on it, what it hides, and one line for each error."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import ROOT, tiny_overrides

from dass_exp import __main__ as command_module
from dass_exp.config.components import admitted_packages
from dass_exp.report.sweep_callback import Sweep

Command = Callable[..., SimpleNamespace]
EVIL = "open({path!r}, 'w').close()\nclass Code:\n    def __init__(self, *a, **k): pass\n"


@pytest.fixture(name="work")
def work_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the command runs in; ``evil_code``, beside it on the path, makes a file ``ran`` on import."""
    (tmp_path / "evil_code.py").write_text(EVIL.format(path=str(tmp_path / "ran")))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "work"
    sys.modules.pop("evil_code", None)
    assert not (tmp_path / "ran").exists(), "foreign code ran"


@pytest.fixture(name="dass_exp")
def command_fixture(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Runs the command in this process; returns code, out, err."""
    del work
    root, before = logging.getLogger(), (list(logging.getLogger().handlers), logging.getLogger().level)
    monkeypatch.setenv("DASS_EXP_ROOT", str(ROOT))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def call(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["dass-exp", *arguments])
        monkeypatch.setattr(command_module, "_ADMITTED", admitted_packages(arguments))
        for name, value in (("started", None), ("failed", 0)):
            monkeypatch.setattr(Sweep, name, value)
        code: object = 0
        root.handlers = []
        try:
            command_module.main()
        except SystemExit as stop:
            code = stop.code
        finally:
            for handler in root.handlers:
                handler.close()
            root.handlers, root.level = before
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code or 0, out=out, err=err)

    yield call
    root.handlers, root.level = before


def refusal(done: SimpleNamespace, *words: str) -> None:
    """Exit code 2 and one line with every word."""
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    (line,) = [line for line in done.err.splitlines() if line and not line.endswith(" ...")]
    assert all(word in line for word in words), line


def config_file(folder: Path, content: str) -> list[str]:
    """Arguments that make the command read ``content`` as a file of another config folder."""
    (folder / "more" / "variant").mkdir(parents=True)
    (folder / "more" / "variant" / "theirs.yaml").write_text(f"# @package _global_\n{content}\n")
    return ["--config-dir", str(folder / "more"), "variant=theirs"]


FOREIGN = {
    "callback": "hydra: {callbacks: {x: {_target_: evil_code.Code}}}",
    "callback that is none": "hydra: {callbacks: {x: {_target_: hydra.utils.get_method, path: evil_code.Code}}}",
    "nested": "hydra: {callbacks: {comparison: {inner: {_target_: evil_code.Code}}}}",
    "sweeper": "hydra: {sweeper: {_target_: evil_code.Code}}",
    "launcher": "hydra: {launcher: {_target_: evil_code.Code}}",
    "handler class": "hydra: {job_logging: {handlers: {file: {class: evil_code.Code}}}}",
    "handler factory": "hydra: {job_logging: {handlers: {file: {'()': evil_code.Code}}}}",
    "formatter": "hydra: {hydra_logging: {formatters: {simple: {class: evil_code.Code}}}}",
    "formatter factory": "hydra: {hydra_logging: {formatters: {simple: {'()': evil_code.Code}}}}",
    "filter": "hydra: {job_logging: {filters: {f: {'()': evil_code.Code}}}}",
    "object": "hydra: {job_logging: {handlers: {console: {stream: 'ext://evil_code.Code'}}}}",
    "function of logging": "hydra: {job_logging: {handlers: {file: {'()': logging.os.system, command: ls}}}}",
    "by reference": "sweep: {title: evil_code.Code}\nhydra: {callbacks: {x: {_target_: '${sweep.title}'}}}",
    "search path of cells": "hydra: {mode: MULTIRUN, overrides: {hydra: ['hydra.searchpath=[pkg://evil_code]']}}",
    "environment": "hydra: {job: {env_set: {LD_PRELOAD: evil.so}}}",
    "shell": "hydra: {launcher: {setup: ['ls']}}",
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", FOREIGN)
def test_a_config_file_runs_no_foreign_code(dass_exp, work, name):
    refusal(dass_exp(*config_file(work, FOREIGN[name])), "hydra.")


@pytest.mark.parametrize(
    "arguments",
    [
        ["hydra.searchpath=[pkg://evil_code]"],
        ["--config-path", "pkg://evil_code"],
        ["+hydra.callbacks.x._target_=evil_code.Code"],
        ["hydra.job_logging.handlers.file.class=evil_code.Code"],
        ["--experimental-rerun", "config.pickle"],
        ["--experimental-r=config.pickle"],
    ],
    ids=" ".join,
)
def test_an_argument_runs_no_foreign_code(dass_exp, arguments):
    done = dass_exp(*arguments)
    refusal(done)
    assert "--config-path RUN/.hydra" in done.err or "evil_code" in done.err


def test_logging_and_search_paths_of_our_own_stay_allowed(dass_exp, work):
    content = """
hydra:
  job_logging:
    handlers: {file: {class: logging.handlers.RotatingFileHandler, maxBytes: 1000}}
"""
    arguments = config_file(work, content)
    done = dass_exp(*arguments, "hydra.searchpath=[pkg://hydra.conf,pkg://dass_exp]", "scope=wrong")
    assert "scope='wrong'" in done.err


@pytest.mark.thorough
def test_own_tasks_come_from_the_command_line_only(dass_exp, work, tiny):
    (work / "tasks").mkdir()
    arguments = config_file(work, "eval:\n  zeroshot: {include_path: tasks, tasks: [piqa]}\n")
    refusal(dass_exp(*arguments, "scope=wrong"), "eval.zeroshot.include_path", "only the command line")
    assert "scope='wrong'" in dass_exp(*arguments, "eval.zeroshot.include_path=tasks", "scope=wrong").err


MISTAKES = {
    "results_dir=''": ["results_dir=''", "empty"],
    "results_dir=/": ["results_dir='/'", "root"],
    "save=/": ["save='/'", "root"],
    "save=loop": ["save='loop'"],
    "threads=1000000": ["threads=1000000", "1024"],
    f"seed={10**29}": [f"seed={10**29}", str(2**64 - 1)],
    "seed=18446744073709551616": ["seed=", str(2**64 - 1)],
    "eval.zeroshot.limit=0": ["eval.zeroshot.limit=0", "at least 1"],
    "results_dir=${results_dir}": ["results_dir"],
    "results_dir=${nothing}": ["results_dir", "nothing"],
    "results_dir=${nothing:1}": ["results_dir", "nothing"],
    "seed=${seed}": ["seed"],
    "seed=${model.seed}": ["seed"],
    "sweeps=alpha sweeps=demo": ["sweeps=alpha sweeps=demo", "one sweep"],
    "sweeps=[alpha,demo]": ["sweeps=[alpha,demo]", "one sweep"],
    "-m seed=range(0,3,0)": ["range"],
    "calibration.text.asset=null": ["text.asset=None"],
    "calibration.text.part=5": ["calibration.text.part"],
    "model.name=null": ["model.name"],
    "tracker.project=5 tracker=wandb": ["tracker.project=5"],
    "pattern=null": ["pattern=null", "2of4"],
    "eval=none": ["eval.perplexity.context=32", "eval.perplexity is null", "choose another eval"],
    "method._target_=dass_exp.masks.NM": ["method._target_=dass_exp.masks.NM", "expected a Pruner"],
}


@pytest.mark.thorough
@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_one_line(dass_exp, work, tiny, typed):
    (work / "loop").symlink_to("loop")
    shared = tiny_overrides(tiny, Path("results"))
    names = {text.split("=")[0] for text in typed.split()}
    shared = [text for text in shared if text.split("=")[0] not in names]
    if "eval.zeroshot" in typed:
        shared += ["eval=mini"]
    refusal(dass_exp(*shared, *typed.split()), *MISTAKES[typed])


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_setting_that_a_launcher_refuses_is_no_loss_of_cells(dass_exp, tiny):
    shared = tiny_overrides(tiny, Path("results"))
    done = dass_exp("-m", "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0", *shared)
    assert done.code == 2, done.err
    assert "n_jobs" in done.err
    assert "squeue" not in done.err


def test_a_working_directory_that_hydra_reads_as_a_reference_is_refused(dass_exp, work, monkeypatch):
    (work / "${x}").mkdir()
    monkeypatch.chdir(work / "${x}")
    refusal(dass_exp("scope=wrong"), "working directory", "${")


SECRETS = {
    "+tracker.api_key=hunter2hunter2": "hunter2hunter2",
    "+model.token=hf_AbCdEfGh12345678": "hf_AbCdEfGh12345678",
    "model.name=hf_AbCdEfGh12345678": "hf_AbCdEfGh12345678",
    "tracker.project=0123456789abcdef0123456789abcdef01234567": "0123456789abcdef",
    "model.roles={password: hunter2hunter2}": "hunter2hunter2",
    "+hydra.job.env_set.HF_TOKEN=hunter2hunter2": "hunter2hunter2",
    "model.name=${oc.env:MY_SETTING}": "hunter2hunter2",
}


@pytest.mark.parametrize("typed", SECRETS)
def test_a_secret_is_refused_unseen(dass_exp, work, monkeypatch, typed):
    monkeypatch.setenv("MY_SETTING", "hunter2hunter2")
    done = dass_exp(typed)
    refusal(done)
    assert SECRETS[typed] not in done.err + done.out
    assert not any(path.is_file() for path in work.rglob("*"))


@pytest.mark.thorough
def test_a_run_is_repeated_from_its_config(dass_exp, tiny, work):
    shared = tiny_overrides(tiny, Path("results"))
    first = dass_exp("method=wanda", "seed=3", *shared)
    assert first.code == 0, first.err
    (key,) = [path for path in work.glob("results/runs/*/result.json") if "wanda" in path.read_text()]
    (kept,) = work.glob("results/hydra/*/*/.hydra")
    again = dass_exp("--config-path", str(kept.relative_to(work)))
    assert again.code == 0, again.err
    assert f"found {key.relative_to(work)}" in again.out
    other = dass_exp(f"--config-path={kept}", "-cn", "config", "seed=4")
    assert other.code == 0, other.err
    assert len(list(work.glob("results/runs/*/result.json"))) == 3
    refusal(dass_exp("--config-path", str(kept), "method=dass"), "method=dass", "keeps its choices")


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["[/x]", "[red]a", "a:smile:", "${", "[link=x]"])
def test_names_are_shown_as_they_are(dass_exp, tiny, work, name):
    quoted = name.replace("${", "\\${")
    shared = [text for text in tiny_overrides(tiny, Path("results")) if not text.startswith("model.name")]
    done = dass_exp(*shared, f"model.name='{quoted}'")
    assert done.code == 0, done.err
    assert name in done.out
    found = dass_exp(*shared, "model.name=other")
    assert found.code == 0, found.err
    assert "found" in found.out
    assert name not in found.out


PLUGIN = """
from dataclasses import dataclass
from dass_exp.methods.magnitude import Magnitude
{line}
@dataclass
class Mine(Magnitude):
    def score(self, *arguments):
        {body}
    def settings(self):
        return {{}}
"""
BROKEN = {
    "raises on import": ("raise RuntimeError('on import')", "pass"),
    "exits on import": ("raise SystemExit(0)", "pass"),
    "syntax error": ("def f(:", "pass"),
    "base exception on import": ("raise BaseException('on import')", "pass"),
    "raises": ("", "raise RuntimeError('inside')"),
    "exits": ("", "raise SystemExit(0)"),
    "base exception": ("", "raise BaseException('inside')"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_fails_its_cell_only(dass_exp, tiny, work, kind):
    line, body = BROKEN[kind]
    (work.parent / "my_plugin.py").write_text(PLUGIN.format(line=line, body=body))
    sys.modules.pop("my_plugin", None)
    shared = [*tiny_overrides(tiny, Path("results")), "method=magnitude", "plugins=[my_plugin]"]
    done = dass_exp("-m", "method._target_=my_plugin.Mine,dass_exp.methods.magnitude.Magnitude", *shared)
    sys.modules.pop("my_plugin", None)
    assert done.code == 1, done.err
    assert "Traceback" not in done.err
    assert "my_plugin.Mine" in done.err
    cells = [json.loads(path.read_text()) for path in sorted(work.glob("results/hydra/*/*/*/cell.json"))]
    assert [cell["status"] for cell in cells] == ["failed", "done"]
    assert "my_plugin.Mine" in cells[0]["error"]
    alone = dass_exp("method._target_=my_plugin.Mine", *shared)
    sys.modules.pop("my_plugin", None)
    assert alone.code == (2 if "import" in kind or "syntax" in kind else 1)
    assert "Traceback" not in alone.err
