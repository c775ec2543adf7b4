"""``make bench``: measure, compare with the targets, write ``results/bench/<date>.json``, a table and a figure."""

import argparse
import copy
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as __main__.py does, before a library reads them
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers

from dass_exp.api import load, method_of
from dass_exp.benchmark.measure import PruningJob, compare_methods, time_floor, time_mask, time_pruning
from dass_exp.benchmark.report import draw, markdown
from dass_exp.benchmark.scoring import divergence_ratio, perplexity_ratio, zero_shot_ratio
from dass_exp.benchmark.sweep import sweep_ratio
from dass_exp.config.settings import CalibrationConfig
from dass_exp.data.texts import OfflineText
from dass_exp.data.tokens import calibration_tokens, evaluation_windows
from dass_exp.errors import UserError
from dass_exp.masks import NM
from dass_exp.storage.durable import now, write_json
from dass_exp.storage.environment import environment

log = logging.getLogger("dass_exp.benchmark")

MODEL = "smollm2_135m"
SAMPLES, LENGTH = 16, 512
SHAPES = ((4, 512), (8, 512), (16, 128), (16, 256))  # other numbers of sequences and tokens
DEPTHS = (8, 16, 30)
TASKS = ("hellaswag", "winogrande", "arc_easy", "arc_challenge", "piqa")


def measure(repeats: int) -> dict[str, Any]:
    """Measure all figures of ``make bench``; takes minutes."""
    model, tokenizer = load(MODEL)
    calibration = CalibrationConfig(sampling="joined", num_samples=SAMPLES, seq_len=LENGTH)
    tokens = calibration_tokens(OfflineText("c4"), calibration, tokenizer, "never", seed=0).ids
    windows = evaluation_windows(OfflineText("wikipedia", "even"), 512, 16, tokenizer, "never").ids
    methods = [method_of(name) for name in ("dass", "wanda", "sparsegpt", "magnitude")]
    job = PruningJob(model, tokens)
    time_floor(PruningJob(model, tokens[:2]))  # warm-up: the first pass of a process is slower
    measured = compare_methods(job, methods, repeats, log.info)
    measured["masks"] = time_mask(NM(2, 4), repeats)
    measured["growth"] = list(_growth(model, tokens))
    log.info("scoring")
    measured["perplexity"] = perplexity_ratio(model, windows, 4, repeats)
    measured["divergence"] = divergence_ratio(model, windows, 4, repeats)
    measured["zero_shot"] = zero_shot_ratio(model, tokenizer, TASKS, 20, repeats)
    overrides = [f"model={MODEL}", "protocol=demo", "eval=ppl_mini"]
    floor_s, plain_s = measured["floor_s"]["median"], measured["perplexity"]["plain_s"]
    measured["sweep"] = sweep_ratio(overrides, floor_s, plain_s, log.info)
    sizes = {"model": MODEL, "samples": SAMPLES, "length": LENGTH, "batch_size": job.batch_size, "repeats": repeats}
    settings = {**sizes, "scope": job.scope, "pattern": "2:4", "dtype": "float32"}
    return {"schema": 1, "created": now(), "machine": environment(), "settings": settings, **measured}


def _growth(model: Any, tokens: torch.Tensor) -> Iterator[dict[str, float]]:
    """Time the floor and DaSS with fewer sequences, shorter ones, and models of the same shape with fewer blocks."""
    jobs = [(model.config.num_hidden_layers, PruningJob(model, tokens[:count, :length])) for count, length in SHAPES]
    for depth in DEPTHS:
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = depth
        shallow = transformers.AutoModelForCausalLM.from_config(config).eval()
        jobs.append((depth, PruningJob(shallow, tokens[:4])))
    for depth, job in jobs:
        floor, dass = time_floor(job), time_pruning(job, method_of("dass"))["total"]
        samples, length = job.tokens.shape
        times = {"floor_s": floor, "dass_s": dass, "ratio": dass / floor}
        run = {"samples": samples, "length": length, "blocks": depth, **times}
        log.info("growth: %s", run)
        yield run


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dass_exp.benchmark", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="number of rounds, of which medians are shown")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--output", type=Path, default=Path("results/bench"), help="folder of the results")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    try:
        measured = measure(options.repeats)
    except UserError as error:
        log.error("%s", error)
        return 1
    path, table = options.output / f"{measured['created'][:10]}.json", markdown(measured)
    write_json(path, measured, checksum=False)
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    draw(measured, options.output)
    sys.stdout.write(f"{table}\nwrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
