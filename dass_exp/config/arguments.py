"""The command line before Hydra reads it: former names, what is refused, and where the config comes from."""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.utils import get_args_parser

from dass_exp.config.redact import refuse_secrets
from dass_exp.config.rerun import SavedRun, saved_run
from dass_exp.errors import UserError
from dass_exp.paths import project_root

log = logging.getLogger(__name__)

TRACEBACKS = "DASS_EXP_TRACEBACKS"  # what the user set as HYDRA_FULL_ERROR, for the workers of a launcher too

_OF_A_FILE = {"calibration.text.path": "calibration=text_file", "eval.perplexity.text.path": "eval=ppl_text_file"}
_CHOOSERS = ("protocol", "variant", "sweeps")
_MULTIRUN = ("-m", "--multirun")


@dataclass(frozen=True)
class ConfigSource:
    """What the command line says about the config.

    Args:
        overrides: as typed.
        folder: of the primary config; None for what Hydra finds itself.
        saved: the run that is repeated.
    """

    overrides: tuple[str, ...] = ()
    folder: Path | None = None
    saved: SavedRun | None = None


def prepare(arguments: list[str]) -> list[str]:
    """Return the arguments as Hydra is to read them: present names, ``-m`` for a sweep, no launcher for a plan."""
    arguments = completed(arguments)
    arguments.sort(key=lambda argument: argument not in _MULTIRUN)  # Hydra reads no override behind an option
    if _names_a_sweep(arguments) and not {*_MULTIRUN} & {*arguments}:
        # the sweep's file says so too, but then Hydra hides mistakes in the overrides
        arguments.insert(0, "--multirun")
    if any(argument.lower() == "plan=true" for argument in arguments):  # nothing is run, so no launcher is needed
        launcher = ("hydra/launcher=", "hydra.launcher.")
        arguments = [text for text in arguments if not text.lstrip("+").startswith(launcher)]
    return arguments


def completed(overrides: Sequence[str]) -> list[str]:
    """Return overrides by their present names, with the config of a local file where only its path is given.

    A pattern may be written as tables show it: ``pattern=2:4``, or a share such as ``pattern=0.5``.

    Where anything else may choose that config (a protocol, a sweep, a saved run), the path belongs to it.
    """
    overrides = [each for text in overrides for each in _named_pattern(_present_name(text))]
    names = [text.partition("=")[0].lstrip("+") for text in overrides]
    if any(name in _CHOOSERS or name.startswith(("--config", "-c")) for name in names):
        return overrides
    texts: list[str] = []
    for name, text in zip(names, overrides, strict=True):
        config = _OF_A_FILE.get(name, "")
        texts += [config, text] if config and config.partition("=")[0] not in names else [text]
    return texts


def read(arguments: list[str]) -> ConfigSource:
    """Read where the config comes from.

    Raises:
        UserError: an argument that would load a pickle, a secret, several sweeps, or a folder that Hydra cannot use.
    """
    options = get_args_parser().parse_args(arguments)
    if options.experimental_rerun is not None:
        raise UserError(
            f"--experimental-rerun {options.experimental_rerun}: it loads a pickle, which can run any code; repeat the "
            "run from its config instead: --config-path RUN/.hydra"
        )
    if "${" in (folder := str(Path.cwd())):
        raise UserError(f"the working directory {folder}: Hydra reads ${{ as a reference; run from another folder")
    overrides = list(options.overrides)
    refuse_secrets(overrides, "typed overrides")
    _check_sweeps(overrides)
    if options.config_path is None or "://" in options.config_path:
        return ConfigSource(tuple(overrides))
    path = Path(options.config_path).absolute()
    if (saved := saved_run(path, overrides)) is not None:
        return ConfigSource(tuple(overrides), project_root() / "conf", saved)
    return ConfigSource(tuple(overrides), path if path.is_dir() else None)


def misread_choice(override: str) -> str | None:
    """Say that Hydra takes the choice of a group for a number; None if it does not."""
    group, _, choice = override.partition("=")
    folder = project_root() / "conf" / group
    if not re.fullmatch(r"\d[\d_]*|\d*\.\d+", choice) or not folder.is_dir():
        return None
    return f"{override}: Hydra reads {choice} as a number; the choices of {group} are the files in {folder}"


def _check_sweeps(overrides: list[str]) -> None:
    values = [value for name, _, value in (text.lstrip("+").partition("=") for text in overrides) if name == "sweeps"]
    if len(values) > 1 or any(set(value) & set(",[]{}()") for value in values):
        named = " ".join(f"sweeps={value}" for value in values)
        raise UserError(f"{named}: one command runs one sweep; run a command for each")


def _present_name(override: str) -> str:
    """Translate the former name of an override."""
    name, equals, value = override.partition("=")
    if name.lstrip("+") == "eval.tasks.num_fewshot":
        return f"eval.zeroshot.num_fewshot{equals}{value}"
    if name.lstrip("+") != "sweeps/cells":
        return override
    log.warning("%s is now called variant", name)
    return f"variant{equals}{value}"


def _named_pattern(override: str) -> list[str]:
    """Translate patterns that are written as N:M or as a share of zeros.

    Raises:
        UserError: several that no choice of files can name together.
    """
    name, _, value = override.partition("=")
    parts = [part.strip("'\"") for part in value.split(",")]
    shares = [part for part in parts if re.fullmatch(r"0?\.\d+", part)]
    groups = [part.split(":") for part in parts if re.fullmatch(r"\d+:\d+", part)]
    if name.lstrip("+") != "pattern" or not (shares or groups):
        return [override]
    if len(shares) == len(parts):
        return ["pattern=unstructured", f"pattern.sparsity={','.join(shares)}"]
    files = [re.sub(r"^(\d+):(\d+)$", r"\1of\2", part) for part in parts]
    if all((project_root() / "conf" / "pattern" / f"{file}.yaml").is_file() for file in files):
        return [f"pattern={','.join(files)}"]
    if len(parts) == 1:
        return ["pattern=nm", f"pattern.n={groups[0][0]}", f"pattern.m={groups[0][1]}"]
    raise UserError(
        f"{override}: one command takes shares, or patterns of conf/pattern; run one for each of the others"
    )


def _names_a_sweep(arguments: list[str]) -> bool:
    names = [text.partition("=")[2] for text in arguments if text.startswith("sweeps=")]
    paths = (Path(os.environ["DASS_EXP_ROOT"]) / "sweeps" / f"{name}.yaml" for name in names)
    return any(path.is_file() and "mode: MULTIRUN" in path.read_text(encoding="utf-8") for path in paths)
