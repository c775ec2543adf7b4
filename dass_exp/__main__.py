"""The command ``dass-exp``: Hydra composes the settings, we validate and run."""

import importlib.util
import logging
import os
import re
import sys

from dass_exp.paths import project_root
from dass_exp.report import streams  # first: it opens the standard streams that are closed

os.environ.setdefault("DASS_EXP_ROOT", str(project_root()))  # conf/config.yaml looks for sweeps/ there
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow small products down
os.environ.setdefault("TQDM_DISABLE", "1")  # the progress bars of libraries; ours show what a run is doing

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dass_exp.config import arguments, loader
from dass_exp.config.choices import complete
from dass_exp.config.components import admitted_packages
from dass_exp.config.help import help_text, version_line
from dass_exp.config.redact import redact_text
from dass_exp.config.settings import register
from dass_exp.errors import UserError, one_line, os_error_line

log = logging.getLogger("dass_exp")
logging.raiseExceptions = False  # a log file on a full disk would print a traceback for every line

_ADMITTED = admitted_packages(sys.argv[1:])  # before any config file can add to it

# launchers that are extras: the Hydra plugin of each, and the extra of dass_exp that installs it
_LAUNCHERS = {"slurm": "submitit", "submitit_slurm": "submitit", "submitit_local": "submitit", "ray": "ray"}
_GROUPS = ("model", "method", "pattern", "calibration", "eval", "protocol", "tracker")  # that need a choice
_EXTRAS = {"submitit": "slurm", "ray": "ray"}


@hydra.main(version_base="1.3", config_path=str(project_root() / "conf"), config_name="config")
def _cell(composed: DictConfig) -> None:
    from dass_exp.cell import run_cell  # here: help and completion need no torch

    run_cell(composed, _ADMITTED)


def _explain_override() -> str | None:
    """Explain a mistake in the typed overrides where Hydra's own message does not help; None if there is none."""
    for override in sys.argv[1:]:
        group, _, choice = override.partition("=")
        folder = project_root() / "conf" / group
        if (misread := arguments.misread_choice(override)) is not None:
            return misread
        if choice.lower() in ("null", "") and group in _GROUPS:
            known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
            return f"{override}: expected one of {known}"
        plugin = _LAUNCHERS.get(choice) if group == "hydra/launcher" else None
        if plugin and importlib.util.find_spec(f"hydra_plugins.hydra_{plugin}_launcher") is None:
            extra = _EXTRAS[plugin]
            return (
                f"{override}: this launcher is an extra; pip install 'dass_exp[{extra}]' (in a checkout: pip install "
                f"-e '.[{extra}]')"
            )
    return None


def _explain_missing(reason: str) -> str | None:
    """Say which setting the chosen files have no place for, and what has; None if that is no issue."""
    if "Unexpected type for root: NoneType" in reason:
        deep = [text for text in sys.argv[1:] if re.match(r"\w+\.\w+\.[\w.]+=", text)]
        parents = {text.partition("=")[0].rpartition(".")[0]: text.partition(".")[0] for text in deep}
        advice = f"leave it out, or choose another {' or '.join(dict.fromkeys(parents.values()))}"
        return f"{' or '.join(deep)}: {' or '.join(parents)} is null in what was chosen; {advice}" if deep else None
    found = re.search(r"Could not override '(\w+)\.(\w+)'", reason)
    folder = project_root() / "conf" / (found[1] if found else "")
    if found is None or not folder.is_dir():
        return None
    group, setting = found.groups()
    having = [path.stem for path in sorted(folder.glob("*.yaml")) if f"\n{setting}:" in path.read_text("utf-8")]
    advice = f"choose one that has it: {group}={', '.join(having)}" if having else f"no choice of {group} has it"
    return f"{group}.{setting}: the chosen {group} has no such setting; {advice}"


def _with_override(reason: str) -> str:
    """Add the overrides that may be meant to what Hydra says, if it names none of their settings."""
    typed = [text.partition("=") for text in sys.argv[1:] if "=" in text]
    meant = [parts for parts in typed if len(parts[2]) > 2 and parts[2] in reason] or typed
    if not meant or any(name.lstrip("+~") in reason for name, _, _ in meant):
        return reason
    return f"{reason} (in {' or '.join(map(''.join, meant))})"


def _explain(error: BaseException) -> int:
    """Log why Hydra or the launcher of a sweep failed; return the exit code."""
    parts = (part for part in (error, error.__cause__) if part is not None)
    reason = " ".join(" ".join(str(part).partition("Config search path")[0].split()) for part in parts)
    mistake = _explain_override() or _explain_missing(reason)
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        reason = os_error_line(error)
    log.error("%s", mistake or redact_text(_with_override(reason)) or one_line(error))
    from dass_exp.report.sweep_callback import Sweep

    if mistake or not Sweep.started or isinstance(error, (HydraException, OmegaConfBaseException, UserError)):
        return 2
    if "sbatch: error" in str(error):
        log.error("Slurm refused the jobs: see the settings in conf/hydra/launcher/slurm.yaml")
        return 2
    if isinstance(error, (ValueError, TypeError, AssertionError)) and not Sweep.has_cells():
        return 2  # the sweeper or launcher refused its settings
    Sweep.show_finished()
    log.error(
        "the launcher ended before the sweep did; the results of its cells are kept. Some may still run elsewhere "
        "(squeue): once they have ended, run the same command again"
    )
    return 1


def main() -> None:
    """Entry point. Exit code 2: a setting is wrong; 1: a run or a cell of a sweep failed; 130: interrupted."""
    streams.protect()
    typed = sys.argv[1:]
    if {"--version", "--help", "-h"} & {*typed}:
        sys.stdout.write(version_line() if "--version" in typed else help_text())
        return
    register()
    if any(text.startswith(("-sc", "--shell-completion", "--shell_completion")) for text in typed):
        if found := complete(os.environ.get("COMP_LINE", "")):
            sys.stdout.write(("\n" if "query=fish" in typed else " ").join(found) + "\n")
        else:
            _cell()  # the shell waits for it: no torch
        return
    from dass_exp.report.sweep_callback import Sweep
    from dass_exp.runs import workers

    try:
        workers.set_environment()
        sys.argv[1:] = arguments.prepare(sys.argv[1:])
        source = arguments.read(sys.argv[1:])
    except UserError as error:
        log.error("%s", error)
        raise SystemExit(2) from None
    os.environ["DASS_EXP_PLUGINS"] = " ".join(_ADMITTED)  # a worker of a launcher has another command line
    os.environ[arguments.TRACEBACKS] = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing a traceback
    try:
        with loader.checked(_ADMITTED, source):
            _cell()
    except KeyboardInterrupt:
        log.error(
            "stopped; finished cells are kept, and the same command continues from there. Cells on other machines "
            "were not stopped"
        )
        raise SystemExit(130) from None
    except Exception as error:
        if os.environ[arguments.TRACEBACKS] == "1":
            raise
        raise SystemExit(_explain(error)) from None
    finally:
        os.environ["HYDRA_FULL_ERROR"] = os.environ.pop(arguments.TRACEBACKS)
        unwritten = streams.problem()
    if unwritten is not None:
        log.error("standard output cannot be written: %s; the records are kept", unwritten)
    if Sweep.failed or unwritten is not None:
        sys.exit(1)


if __name__ == "__main__":
    main()
