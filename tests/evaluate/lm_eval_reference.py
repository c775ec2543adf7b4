"""lm-eval's own path, as a reference: its own task files, stock HFLM, simple_evaluate; only the hub is replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

from dass_exp.data import assets

# name on the hub and of its configuration, as lm-eval's files give them, of each offline asset that replaces it
ON_THE_HUB = {
    ("Rowan/hellaswag", None): "hellaswag",
    ("baber/piqa", None): "piqa",
    ("allenai/winogrande", "winogrande_xl"): "winogrande",
    ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
    ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
    ("aps/super_glue", "boolq"): "boolq",
    ("allenai/openbookqa", "main"): "openbookqa",
    ("allenai/sciq", None): "sciq",
    ("lighteval/siqa", None): "social_iqa",
    ("tau/commonsense_qa", None): "commonsense_qa",
    ("aps/super_glue", "copa"): "copa",
    ("nyu-mll/glue", "rte"): "rte",
    ("mandarjoshi/trivia_qa", "rc.nocontext"): "triviaqa",
    ("google-research-datasets/nq_open", None): "nq_open",
    **{("cais/mmlu", subject): f"mmlu_{subject}" for subject in assets.MMLU_SUBJECTS},
}


def from_assets(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
    """What ``datasets.load_dataset`` would give, from the offline files."""
    task = ON_THE_HUB[path, name]
    scored = read(assets.fetch(assets.TASKS[task]))
    if task == "boolq":  # its label has another name and type on the hub
        scored = scored.map(lambda row: {"label": int(row["answer"])})
    if task in assets.EXAMPLES:
        return datasets.DatasetDict(test=scored, dev=read(assets.fetch(assets.EXAMPLES[task])))
    return datasets.DatasetDict(train=scored, validation=scored, test=scored)


def read(path: Path) -> datasets.Dataset:
    return datasets.Dataset.from_file(str(path))


def stock(model: Any, tokenizer: Any, tasks: list[str], manager: Any, monkeypatch: Any, **settings: Any) -> Any:
    """The output of ``lm_eval.simple_evaluate`` with stock HFLM."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", from_assets)
        adapter = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4, softmax_dtype="float32")
        return simple_evaluate(adapter, tasks=tasks, task_manager=manager, bootstrap_iters=1000, **settings)
