"""The command ``dass-exp``: Hydra composes, we validate and run."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import sys
from pathlib import Path

from dass_exp.paths import project_root

os.environ.setdefault("DASS_EXP_ROOT", str(project_root()))  # conf/config.yaml finds sweeps/ by it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # threads that spin at each barrier make small products many times slower on busy cores
os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of the libraries below; ours say what a run is doing

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dass_exp.config.components import admitted_packages
from dass_exp.config.settings import register, validate
from dass_exp.errors import NumericalError, UserError
from dass_exp.report.console import TerminalReporter, show, show_plan
from dass_exp.report.sweep_callback import Sweep, note_cell
from dass_exp.runs import workers
from dass_exp.runs.context import shelf_of_process
from dass_exp.runs.plan import Plan, plan
from dass_exp.runs.run import Outcome, run
from dass_exp.runs.sketch import sketch

log = logging.getLogger("dass_exp")

_ADMITTED = admitted_packages(sys.argv[1:])  # before any config file has had its say


class _Progress:
    """Whether Hydra got as far as our code: until then an exit is about a setting that it refused."""

    started = False


@hydra.main(version_base="1.3", config_path=str(project_root() / "conf"), config_name="config")
def _cell(composed: DictConfig) -> None:
    _Progress.started = True
    context = HydraConfig.get()
    overrides = list(context.overrides.task)
    shelf = shelf_of_process() if context.mode == RunMode.MULTIRUN else None
    try:
        if shelf is not None:
            workers.join(context.launcher, Path(context.sweep.dir))
        elif launchers := [text for text in context.overrides.hydra if text.startswith("hydra/launcher=")]:
            raise UserError(
                f"{launchers[0]}: a launcher runs the cells of a sweep, and this is one run; leave it out, or add -m or sweeps=NAME"
            )
        settings = validate(composed, _ADMITTED)
        if settings.config.plan:
            _planned(plan(settings, shelf), context.runtime.output_dir, overrides, alone=shelf is None)
            return
        outcome = run(settings, TerminalReporter(), shelf)
    except Exception as error:
        meant, status = (
            sketch(composed, context.runtime.choices, _ADMITTED),
            "unplanned" if composed.get("plan") else "failed",
        )
        note_cell(
            context.runtime.output_dir,
            {"status": status, "overrides": overrides, "error": _line(error), "config": meant},
        )
        if context.mode == RunMode.MULTIRUN:  # the other cells go on; the exit code at the end tells
            log.error("%s: %s", " ".join(overrides), _line(error), exc_info=None if _expected(error) else error)
            return
        if _expected(error):
            log.error("%s", _line(error))
            raise SystemExit(2 if isinstance(error, UserError) else 1) from None
        raise
    _done(outcome, context.runtime.output_dir, overrides, alone=context.mode != RunMode.MULTIRUN)


def _planned(planned: Plan, folder: str, overrides: list[str], alone: bool) -> None:
    note_cell(folder, {"status": "planned", "overrides": overrides, **dataclasses.asdict(planned)})
    if alone:
        show_plan([{"overrides": overrides, **dataclasses.asdict(planned)}])


def _done(outcome: Outcome, folder: str, overrides: list[str], alone: bool) -> None:
    note_cell(folder, {"status": "done", "overrides": overrides, "record": str(outcome.path.resolve())})
    if alone:
        show(outcome.record, outcome.dense, outcome.path, outcome.found)
    else:
        log.info("%s %s", "found" if outcome.found else "wrote", outcome.path)


def _expected(error: Exception) -> bool:
    return isinstance(error, (UserError, NumericalError, OSError))


def _line(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"a file cannot be read or written: {error}; check results_dir, DASS_EXP_CACHE and the room on the disk"
    kind = "" if _expected(error) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())


_LAUNCHERS = {"slurm": "submitit", "submitit_slurm": "submitit", "submitit_local": "submitit", "ray": "ray"}
_EXTRAS = {"submitit": "slurm", "ray": "ray"}


def _mistyped() -> str | None:
    """What is wrong with the overrides that were typed, where Hydra's own words do not help."""
    for override in sys.argv[1:]:
        group, _, choice = override.partition("=")
        if choice.replace("_", "").isdigit() and (project_root() / "conf" / group).is_dir():
            return f"{override}: Hydra reads {choice} as a number; the choices of {group} are the files in {project_root() / 'conf' / group}"
        plugin = _LAUNCHERS.get(choice) if group == "hydra/launcher" else None
        if plugin and importlib.util.find_spec(f"hydra_plugins.hydra_{plugin}_launcher") is None:
            return f"{override}: this launcher is an extra; pip install 'dass_exp[{_EXTRAS[plugin]}]' (in a checkout: pip install -e '.[{_EXTRAS[plugin]}]')"
    return None


def _explained(error: Exception) -> int:
    """Say why Hydra, or the launcher of a sweep, gave up; the exit code."""
    mistake = _mistyped()
    told = (
        " ".join(str(part).partition("Config search path")[0].split())
        for part in (error, error.__cause__)
        if part is not None
    )
    log.error("%s", mistake or " ".join(told))
    if mistake or not Sweep.started or isinstance(error, (HydraException, OmegaConfBaseException)):
        return 2
    if "sbatch: error" in str(error):
        log.error("Slurm refused the jobs: see the settings in conf/hydra/launcher/slurm.yaml")
        return 2
    Sweep.show_finished()
    log.error(
        "the launcher ended before the sweep did; what its cells have written is kept. Some may still run elsewhere (squeue): once they have ended, "
        "give the same command again"
    )
    return 1


def _names_a_sweep() -> bool:
    names = [text.partition("=")[2] for text in sys.argv[1:] if text.startswith("sweeps=")]
    paths = (Path(os.environ["DASS_EXP_ROOT"]) / "sweeps" / f"{name}.yaml" for name in names)
    return any(path.is_file() and "mode: MULTIRUN" in path.read_text(encoding="utf-8") for path in paths)


def main() -> None:
    """Entry point. Exit code 2: a setting is wrong; 1: a run failed, or cells of a sweep did."""
    register()
    try:
        workers.announce()
    except UserError as error:
        log.error("%s", error)
        raise SystemExit(2) from None
    os.environ["DASS_EXP_PLUGINS"] = " ".join(_ADMITTED)  # a worker of a launcher has another command line
    if _names_a_sweep() and not {"-m", "--multirun"} & {*sys.argv}:
        sys.argv.insert(
            1, "--multirun"
        )  # the sweep's file says so too, but Hydra then reports its own guess instead of a mistake in the overrides
    if any(override.lower() == "plan=true" for override in sys.argv):  # it runs nothing, so it needs no worker
        sys.argv[1:] = [
            text for text in sys.argv[1:] if not text.lstrip("+").startswith(("hydra/launcher=", "hydra.launcher."))
        ]
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors to us instead of printing a traceback
    try:
        _cell()
    except KeyboardInterrupt:
        log.error(
            "stopped; what is finished is kept, and the same command goes on from there. Cells on other machines were not stopped"
        )
        raise SystemExit(130) from None
    except Exception as error:
        if _Progress.started or full:
            raise
        raise SystemExit(_explained(error)) from None
    if Sweep.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
