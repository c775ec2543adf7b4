"""Tasks of lm-eval whose documents are offline assets: a generated YAML includes the installed one.

Prompt, choices, target, metrics and filters are lm-eval's own; only the source of the documents is replaced.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from dass_exp.data import assets

# lm-eval's file of each task
_INSTALLED = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "sciq": "sciq/sciq.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "rte": "glue/rte/default.yaml",
    "triviaqa": "triviaqa/default.yaml",
    "nq_open": "nq_open/nq_open.yaml",
    **{f"mmlu_{name}": f"mmlu/default/mmlu_{name}.yaml" for name in assets.MMLU_SUBJECTS},
}
# and of each group: itself, and the groups inside it
_GROUP_FILES = {
    "mmlu": [f"mmlu/default/_mmlu{part}.yaml" for part in ("", "_stem", "_other", "_social_sciences", "_humanities")]
}
# what else must change for the local data: BoolQ's labels are booleans in this copy
_OVERRIDES = {"boolq": {"doc_to_target": "{{answer|int}}"}}

GROUPS = {"mmlu": tuple(f"mmlu_{name}" for name in assets.MMLU_SUBJECTS)}
NAMES = (*(name for name in _INSTALLED if name not in GROUPS["mmlu"]), "mmlu", *GROUPS["mmlu"])
EXAMPLES = 5  # that each subject of MMLU has


def members(tasks: Iterable[str]) -> list[str]:
    """Return the tasks, and in place of a group those in it."""
    return [member for task in tasks for member in GROUPS.get(task, (task,))]


def documents_identity(tasks: Iterable[str]) -> dict[str, str]:
    """Return the digest of the documents of each task; tasks that are not offline ones are known by their name."""
    known = {task: assets.TASKS.get(task) for task in members(tasks)}
    return {task: asset.sha256 if asset else "own" for task, asset in known.items()}


def write_tasks(tasks: Iterable[str], folder: Path, installed: Path) -> None:
    """Write YAML files of offline tasks and groups for lm-eval, whose own are in ``installed``.

    Raises:
        UserError: documents cannot be fetched.
    """
    for name in tasks:
        for number, file in enumerate(_GROUP_FILES.get(name, ())):
            _write({"include": str(installed / file)}, folder / f"{name}-group-{number}.yaml")
        for task in members([name]):
            config = {"include": str(installed / _INSTALLED[task]), "task": task, **_data(task)}
            _write({**config, **_OVERRIDES.get(task, {})}, folder / f"{task}.yaml")


def _data(task: str) -> dict[str, Any]:
    """Return the settings of a task that say where its documents are."""
    scored, shown = str(assets.fetch(assets.TASKS[task])), assets.EXAMPLES.get(task)
    splits = dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split"))
    if shown is None:  # examples are other documents of the same file, as lm-eval takes them
        files, own = {"validation": scored}, {"validation_split": "validation"}
    else:
        files = {"test": scored, "dev": str(assets.fetch(shown))}
        own = {"test_split": "test", "fewshot_split": "dev"}
    return {"dataset_path": "arrow", "dataset_name": None, "dataset_kwargs": {"data_files": files}, **splits, **own}


def _write(config: dict[str, Any], path: Path) -> None:
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
