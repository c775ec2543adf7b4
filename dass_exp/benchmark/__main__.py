"""``make bench``: measure, print a table against the targets, write ``results/bench/<date>.json``."""

from __future__ import annotations

import argparse
import copy
import logging
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as the command sets them, before a library reads them
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers

from dass_exp.api import load, method_of
from dass_exp.benchmark.measure import Workload, floor_seconds, masks_alone, prune_seconds, rounds
from dass_exp.benchmark.picture import draw
from dass_exp.benchmark.scoring import perplexity_ratio, zero_shot_ratio
from dass_exp.benchmark.sweep import sweep_ratio
from dass_exp.benchmark.table import markdown
from dass_exp.data import texts
from dass_exp.data import tokens as data
from dass_exp.errors import UserError
from dass_exp.masks import NM
from dass_exp.storage.records import environment, write_json

log = logging.getLogger("dass_exp.benchmark")

MODEL = "smollm2_135m"
SHAPES = ((4, 512), (8, 512), (16, 128), (16, 256))  # sequences x tokens, beside 16 x 512
DEPTHS = (8, 16, 30)
TASKS = ("hellaswag", "winogrande", "arc_easy", "arc_challenge", "piqa")


def measure(repeats: int) -> dict[str, Any]:
    """All figures of ``make bench``, minutes of work."""
    model, tokenizer = load(MODEL)
    text = texts.OfflineText("c4")
    tokens = data.calibration_tokens(text, data.Cut("joined", 16, 512), tokenizer, "never", seed=0).ids
    windows = data.evaluation_windows(texts.OfflineText("wikipedia", "even"), 512, 16, tokenizer, "never").ids
    methods = [method_of(name) for name in ("dass", "wanda", "sparsegpt", "magnitude")]
    work = Workload(model, tokens)
    floor_seconds(Workload(model, tokens[:2]))  # the first pass of a process is slower
    found = rounds(work, methods, repeats, log.info)
    found["masks"] = masks_alone(NM(2, 4), repeats)
    found["growth"] = _growth(model, tokens)
    log.info("scoring")
    found["perplexity"] = perplexity_ratio(model, windows, 4, repeats)
    found["zero_shot"] = zero_shot_ratio(model, tokenizer, TASKS, 20, repeats)
    overrides = [f"model={MODEL}", "protocol=demo", "eval=ppl_mini"]
    found["sweep"] = sweep_ratio(overrides, found["floor_s"]["median"], found["perplexity"]["plain_s"], log.info)
    settings = {
        "model": MODEL,
        "samples": 16,
        "length": 512,
        "scope": "mlp",
        "pattern": "2:4",
        "batch_size": 4,
        "dtype": "float32",
        "repeats": repeats,
    }
    return {
        "schema": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": environment(),
        "settings": settings,
        **found,
    }


def _growth(model: Any, tokens: torch.Tensor) -> list[dict[str, float]]:
    """Floor and DaSS with fewer sequences, shorter ones, and a model of the same shape with fewer blocks."""
    works = [(model.config.num_hidden_layers, Workload(model, tokens[:samples, :length])) for samples, length in SHAPES]
    for depth in DEPTHS:
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = depth
        works.append((depth, Workload(transformers.AutoModelForCausalLM.from_config(config).eval(), tokens[:4])))
    lines = []
    for depth, work in works:
        floor, dass = floor_seconds(work), prune_seconds(work, method_of("dass"))["total"]
        lines.append(
            {
                "samples": work.tokens.shape[0],
                "length": work.tokens.shape[1],
                "blocks": depth,
                "floor_s": floor,
                "dass_s": dass,
                "ratio": dass / floor,
            }
        )
        log.info("growth: %s", lines[-1])
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dass_exp.benchmark", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="rounds; medians are shown")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument(
        "--output", type=Path, default=Path("results/bench"), help="folder of the JSON, the table and the picture"
    )
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(asked.threads)
    try:
        found = measure(asked.repeats)
    except UserError as error:
        log.error("%s", error)
        return 1
    path, table = asked.output / f"{found['created'][:10]}.json", markdown(found)
    write_json(path, found)
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    draw(found, asked.output)
    sys.stdout.write(f"{table}\nwrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
