"""The command ``dass-exp``: Hydra composes the settings, we validate and run."""

import dataclasses
import importlib.util
import logging
import os
import sys
from pathlib import Path

from dass_exp.paths import project_root

os.environ.setdefault("DASS_EXP_ROOT", str(project_root()))  # conf/config.yaml looks for sweeps/ there
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow small products down
os.environ.setdefault("TQDM_DISABLE", "1")  # the progress bars of libraries; ours show what a run is doing

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dass_exp.config.components import admitted_packages
from dass_exp.config.settings import register, validate
from dass_exp.errors import NumericalError, UserError, os_error_line
from dass_exp.report.console import TerminalReporter, show_plan, show_run
from dass_exp.report.sweep_callback import Sweep, note_cell
from dass_exp.runs import workers
from dass_exp.runs.context import RunContext, cache_of_process
from dass_exp.runs.failed_cell import describe_failed
from dass_exp.runs.plan import Plan, plan
from dass_exp.runs.run import Outcome, run

log = logging.getLogger("dass_exp")
logging.raiseExceptions = False  # a log file on a full disk would print a traceback for every line

_ADMITTED = admitted_packages(sys.argv[1:])  # before any config file can add to it

# launchers that are extras: the Hydra plugin of each, and the extra of dass_exp that installs it
_LAUNCHERS = {"slurm": "submitit", "submitit_slurm": "submitit", "submitit_local": "submitit", "ray": "ray"}
_EXTRAS = {"submitit": "slurm", "ray": "ray"}


class _Startup:
    """Whether Hydra has called our code: an exit before that is about a setting that Hydra refused."""

    finished = False


@hydra.main(version_base="1.3", config_path=str(project_root() / "conf"), config_name="config")
def _cell(composed: DictConfig) -> None:
    _Startup.finished = True
    job = HydraConfig.get()
    overrides, in_sweep = list(job.overrides.task), job.mode == RunMode.MULTIRUN
    context = RunContext(TerminalReporter(), cache_of_process() if in_sweep else None)
    folder = job.runtime.output_dir
    try:
        if in_sweep:
            workers.acquire_slot(job.launcher, Path(job.sweep.dir))
        elif launchers := [text for text in job.overrides.hydra if text.startswith("hydra/launcher=")]:
            raise UserError(
                f"{launchers[0]}: a launcher runs the cells of a sweep, and this is one run; leave it out, or add -m "
                "or sweeps=NAME"
            )
        config = validate(composed, _ADMITTED, job.runtime.choices)
        if config.plan:
            _report_planned(plan(config, context), folder, overrides, alone=not in_sweep)
            return
        outcome = run(config, context)
    except Exception as error:
        status = "unplanned" if composed.get("plan") else "failed"
        described = describe_failed(composed, job.runtime.choices, context, _ADMITTED)
        note_cell(folder, {"status": status, "overrides": overrides, "error": _one_line(error), **described})
        if in_sweep:  # the other cells continue; the exit code of the sweep reports the failure
            log.error("%s: %s", " ".join(overrides), _one_line(error), exc_info=None if _is_expected(error) else error)
            return
        if _is_expected(error):
            log.error("%s", _one_line(error))
            raise SystemExit(2 if isinstance(error, UserError) else 1) from None
        raise
    _report_done(outcome, folder, overrides, alone=not in_sweep)


def _report_planned(planned: Plan, folder: str, overrides: list[str], alone: bool) -> None:
    note_cell(folder, {"status": "planned", "overrides": overrides, **dataclasses.asdict(planned)})
    if alone:
        show_plan([{"overrides": overrides, **dataclasses.asdict(planned)}])


def _report_done(outcome: Outcome, folder: str, overrides: list[str], alone: bool) -> None:
    record = {"key": outcome.record["key"], "record": str(outcome.path.resolve())}
    note_cell(folder, {"status": "done", "overrides": overrides, **record})
    if alone:
        show_run(outcome.record, outcome.dense, outcome.path, outcome.found)
    else:
        log.info("%s %s", "found" if outcome.found else "wrote", outcome.path)


def _is_expected(error: Exception) -> bool:
    return isinstance(error, (UserError, NumericalError, OSError))


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError):
        return os_error_line(error)
    kind = "" if _is_expected(error) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())


def _explain_override() -> str | None:
    """Explain a mistake in the typed overrides where Hydra's own message does not help; None if there is none."""
    for override in sys.argv[1:]:
        group, _, choice = override.partition("=")
        folder = project_root() / "conf" / group
        if choice.replace("_", "").isdigit() and folder.is_dir():
            return f"{override}: Hydra reads {choice} as a number; the choices of {group} are the files in {folder}"
        plugin = _LAUNCHERS.get(choice) if group == "hydra/launcher" else None
        if plugin and importlib.util.find_spec(f"hydra_plugins.hydra_{plugin}_launcher") is None:
            extra = _EXTRAS[plugin]
            return (
                f"{override}: this launcher is an extra; pip install 'dass_exp[{extra}]' (in a checkout: pip install "
                f"-e '.[{extra}]')"
            )
    return None


def _present_name(override: str) -> str:
    """Translate the former name of an override."""
    name, equals, value = override.partition("=")
    if name.lstrip("+") != "sweeps/cells":
        return override
    log.warning("%s is now called variant", name)
    return f"variant{equals}{value}"


def _explain(error: Exception) -> int:
    """Log why Hydra or the launcher of a sweep failed; return the exit code."""
    mistake = _explain_override()
    parts = (part for part in (error, error.__cause__) if part is not None)
    reason = " ".join(" ".join(str(part).partition("Config search path")[0].split()) for part in parts)
    log.error("%s", mistake or reason)
    if mistake or not Sweep.started or isinstance(error, (HydraException, OmegaConfBaseException)):
        return 2
    if "sbatch: error" in str(error):
        log.error("Slurm refused the jobs: see the settings in conf/hydra/launcher/slurm.yaml")
        return 2
    Sweep.show_finished()
    log.error(
        "the launcher ended before the sweep did; the results of its cells are kept. Some may still run elsewhere "
        "(squeue): once they have ended, run the same command again"
    )
    return 1


def _names_a_sweep() -> bool:
    names = [text.partition("=")[2] for text in sys.argv[1:] if text.startswith("sweeps=")]
    paths = (Path(os.environ["DASS_EXP_ROOT"]) / "sweeps" / f"{name}.yaml" for name in names)
    return any(path.is_file() and "mode: MULTIRUN" in path.read_text(encoding="utf-8") for path in paths)


def main() -> None:
    """Entry point. Exit code 2: a setting is wrong; 1: a run or a cell of a sweep failed; 130: interrupted."""
    register()
    try:
        workers.set_environment()
    except UserError as error:
        log.error("%s", error)
        raise SystemExit(2) from None
    sys.argv[1:] = [_present_name(override) for override in sys.argv[1:]]
    os.environ["DASS_EXP_PLUGINS"] = " ".join(_ADMITTED)  # a worker of a launcher has another command line
    if _names_a_sweep() and not {"-m", "--multirun"} & {*sys.argv}:
        sys.argv.insert(1, "--multirun")  # the sweep's file says so too, but then Hydra hides mistakes in the overrides
    if any(override.lower() == "plan=true" for override in sys.argv):  # nothing is run, so no launcher is needed
        launcher = ("hydra/launcher=", "hydra.launcher.")
        sys.argv[1:] = [text for text in sys.argv[1:] if not text.lstrip("+").startswith(launcher)]
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing a traceback
    try:
        _cell()
    except KeyboardInterrupt:
        log.error(
            "stopped; finished cells are kept, and the same command continues from there. Cells on other machines "
            "were not stopped"
        )
        raise SystemExit(130) from None
    except Exception as error:
        if _Startup.finished or full:
            raise
        raise SystemExit(_explain(error)) from None
    if Sweep.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
