"""What ``dass-exp --help`` and ``--version`` print; nothing here imports torch."""

import shutil
import textwrap
from dataclasses import fields
from importlib.metadata import version
from typing import Any

import yaml

from dass_exp.config.settings import RunConfig, nested_schema
from dass_exp.paths import project_root

_LEFT = 32  # columns of the names

_ABOUT = (
    "dass-exp prunes a language model in one shot, scores it beside the dense one, and records every number with how "
    "it was made."
)
_USAGE = """\
dass-exp [GROUP=NAME ...] [setting=value ...]     one run
dass-exp -m method=wanda,dass seed=0,1,2          a grid: comma-separated values
dass-exp sweeps=NAME                              a table of the docs; dass-report NAME writes it
dass-exp ... plan=true                            what would run, its memory and time; runs nothing
"""
GROUPS = {
    "model": "what is pruned",
    "method": "how the masks are chosen",
    "pattern": "which weights of a group stay",
    "allocation": "how much each block loses",
    "permute": "which neurons stand side by side",
    "refine": "better masks from a mask",
    "repair": "better surviving weights under a mask",
    "retrain": "training of the pruned model under its masks",
    "calibration": "the text that methods look at",
    "eval": "what is scored",
    "protocol": "calibration, evaluation and scale of the sweeps together",
    "tracker": "where runs are logged",
    "variant": "a method with settings and stages, as one name",
}
SETTINGS = {
    "model.path": "hub id, folder, offline:NAME or tiny:NAME",
    "model.name": "name in tables",
    "model.revision": "commit, branch or tag on the hub",
    "model.dtype": "auto, float32, bfloat16 or float16",
    "model.device": "auto, cpu, cuda or cuda:N",
    "model.placement": "auto, resident, or stream: block by block from disk",
    "model.bos": "beginning-of-sequence token: auto, never, stream or window",
    "model.training_seed": "which training of a tiny model",
    "model.roles": "where the linears are in an unknown family",
    "model.accept_license": "accept the license of an offline model that asks for it",
    "model.trust_remote_code": "run code from the model's repository",
    "model.license": "shown by plan=true",
    "model.parameters": "shown by plan=true",
    "model.context": "shown by plan=true",
    "scope": "which linears are pruned: mlp, attention or all",
    "seed": "of the calibration sample and of random numbers",
    "calibration.name": "name in tables",
    "calibration.text": "where the text comes from",
    "calibration.sampling": "joined: windows of all documents; document: of single ones",
    "calibration.separator": "text between joined documents",
    "calibration.num_samples": "number of sequences",
    "calibration.seq_len": "tokens of a sequence",
    "calibration.batch_size": "sequences that pass through a block together; on a CPU it changes no number",
    "calibration.cache": "where activations wait between blocks: device, cpu or disk",
    "experts.min_tokens": "an expert that sees fewer calibration tokens is starved",
    "experts.starved": "uniform: its inputs count alike; raise: stop the run",
    "eval.name": "name in tables",
    "eval.perplexity.name": "name in tables",
    "eval.perplexity.text": "the text that is scored",
    "eval.perplexity.context": "tokens of a window",
    "eval.perplexity.max_windows": "number of windows; null: all",
    "eval.extra_perplexity": "further sets of windows by name",
    "eval.divergence": "how far the pruned model is from the dense one, on the same windows",
    "eval.cache": "where the dense model's hidden states are kept: memory or disk",
    "eval.zeroshot.tasks": "tasks of lm-eval",
    "eval.zeroshot.limit": "documents of each task; null: all",
    "eval.zeroshot.data": "offline or hub",
    "eval.zeroshot.num_fewshot": "examples before each question",
    "eval.zeroshot.include_path": "folder of your own tasks",
    "eval.generation": "{prompts: 16, tokens: 32}: greedy text compared with the dense model's",
    "eval.batch_size": "windows or requests that are scored together",
    "name": "of the run, in its record and in lists",
    "tags": "words to find its record by: tags=[first,second]",
    "notes": "a sentence that its record keeps",
    "threads": "CPU threads",
    "rerun": "run again even if the record exists",
    "plan": "print what would run, and run nothing",
    "repeat": "numbers runs of one cell whose cost is measured several times",
    "save_masks": "store the packed masks next to the record",
    "save": "folder for the pruned model",
    "resume": "keep state on disk to resume a killed run; null: if the model is streamed",
    "results_dir": "folder of records, logs and tables",
    "plugins": "your own packages to build classes from",
}
_OPTIONS = {
    "--version": "version of dass_exp, torch and transformers",
    "--cfg job": "print the composed settings",
    "--config-dir FOLDER": "a folder of your own configs, beside those of dass_exp",
    "--config-path RUN/.hydra": "repeat a run from the config that was kept of it",
    "--hydra-help": "options of Hydra",
    "-sc install=bash": 'TAB completion: eval "$(dass-exp -sc install=bash)" (or zsh, fish)',
}


def version_line() -> str:
    """Return the versions of this package and of those that numbers depend on most."""
    return "dass_exp {} (torch {}, transformers {})\n".format(*map(version, ("dass_exp", "torch", "transformers")))


def help_text(width: int | None = None) -> str:
    """Return the help, as wide as the terminal."""
    columns = width or min(shutil.get_terminal_size().columns, 120)
    conf, sweeps = project_root() / "conf", project_root() / "sweeps"
    choices = {
        f"{group}=": f"{about}: {', '.join(sorted(path.stem for path in (conf / group).glob('*.yaml')))}"
        for group, about in GROUPS.items()
    }
    launchers = sorted(path.stem for path in (conf / "hydra" / "launcher").glob("*.yaml"))
    defaults = _defaults(conf)
    settings = {f"{name}={defaults[name]}" if name in defaults else name: about for name, about in SETTINGS.items()}
    parts = [
        textwrap.fill(_ABOUT, columns),
        "Usage\n" + textwrap.indent(_USAGE.rstrip(), "  "),
        _section("Groups: GROUP=NAME takes a file of conf/GROUP", choices, columns),
        _section("Sweeps: sweeps=NAME", {path.stem: _title(path) for path in sorted(sweeps.glob("*.yaml"))}, columns),
        _section("Launchers of sweeps", {"hydra/launcher=": ", ".join(["basic", *launchers])}, columns),
        _section("Settings, with their defaults", settings, columns),
        _section("Options", _OPTIONS, columns),
        textwrap.fill("Settings of methods and stages, exit codes, examples: docs/settings.md", columns),
    ]
    return "\n\n".join(parts) + "\n"


def settings_of_schema(schema: type = RunConfig, path: str = "") -> set[str]:
    """Return the dotted names of all settings that are no group and no former name."""
    found: set[str] = set()
    for entry in fields(schema):
        name = path + entry.name
        if (nested := nested_schema(schema, entry.name)) is not None:
            found |= settings_of_schema(nested, f"{name}.")
        elif path or name not in (*GROUPS, "sweep", "checkpoint"):
            found.add(name)
    return found


def _defaults(conf: Any) -> dict[str, str]:
    """Return the plain values of conf/config.yaml by dotted name."""
    content = yaml.safe_load((conf / "config.yaml").read_text(encoding="utf-8"))
    nested = {f"experts.{name}": value for name, value in content["experts"].items()}
    plain = {name: value for name, value in content.items() if not isinstance(value, dict)} | nested
    return {name: yaml.safe_dump(value).split("\n")[0] for name, value in plain.items() if name in SETTINGS}


def _title(path: Any) -> str:
    return str(((yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("sweep") or {}).get("title", ""))


def _section(title: str, lines: dict[str, str], columns: int) -> str:
    """Return a heading and two columns, the second one wrapped."""
    left = min(_LEFT, columns // 3)
    shown = [title]
    for name, about in lines.items():
        wrapped = textwrap.wrap(about, max(columns - left - 2, 20)) or [""]
        first = f"  {name}".ljust(left + 1)
        if len(first) > left + 1:
            shown.append(first)
            first = " " * (left + 1)
        shown += [f"{first} {wrapped[0]}".rstrip(), *(" " * (left + 2) + line for line in wrapped[1:])]
    return "\n".join(shown)
