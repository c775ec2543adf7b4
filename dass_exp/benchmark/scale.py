"""Peak memory of streamed runs on random LLaMA-shaped checkpoints of several sizes, each run in its own process."""

import argparse
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from dass_exp.benchmark.large import LlamaShape, planned_memory
from dass_exp.models.decoder import decoder_of
from dass_exp.models.locate import offline_folder
from dass_exp.models.save import CheckpointWriter
from dass_exp.report.write import markdown_table
from dass_exp.storage.durable import now, write_json, write_text
from dass_exp.storage.environment import environment, process_memory
from dass_exp.storage.records import RecordStore

log = logging.getLogger("dass_exp.benchmark")

METHODS = ("dass", "wanda", "sparsegpt")
SHAPES = {
    LlamaShape("0.5 GB", 1024, 2816, 12, 16): METHODS,
    LlamaShape("1 GB", 1024, 2816, 32, 16): METHODS,
    LlamaShape("1.7 GB", 1024, 2816, 60, 16): METHODS,
    LlamaShape("2 GB", 2048, 5504, 16, 16): METHODS,
}
SEVEN_B = {  # SparseGPT takes a minute or two per block there
    LlamaShape("7B", 4096, 11008, 32, 32): ("dass", "wanda"),
    LlamaShape("7B, 4 blocks", 4096, 11008, 4, 32): METHODS,
}
RUN = "model.dtype=bfloat16 model.placement=stream calibration.batch_size=1 eval.batch_size=1 eval=ppl_mini"
SAMPLES, LENGTH = 4, 128  # calibration sequences and scored windows, and tokens in each


def write_checkpoint(shape: LlamaShape, folder: Path) -> Path:
    """Write a checkpoint of random weights block by block; it is never in memory as a whole."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(offline_folder("smollm2_135m"))
    model, generator = shape.empty_model(), torch.Generator().manual_seed(0)
    partial = folder.with_name(f".{folder.name}.partial")
    writer = CheckpointWriter(folder, partial)
    writer.begin(dict, shape.blocks)
    outside = model.state_dict()
    for index, block in enumerate(decoder_of(model).names):
        inside = {name: outside.pop(name) for name in list(outside) if name.startswith(f"{block}.")}
        writer.add(index, _random_weights(inside, generator))
    model.load_state_dict(_random_weights(outside, generator), strict=False, assign=True)
    writer.finish(model, tokenizer, {}, {"key": "random", "told": "random weights"})
    shutil.rmtree(partial)
    return folder


def _random_weights(like: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Ones for norms and small normal numbers for matrices, in bfloat16."""
    weights = {name: torch.ones(tensor.shape, dtype=torch.bfloat16) for name, tensor in like.items()}
    for weight in weights.values():
        if weight.ndim > 1:
            weight.normal_(std=0.02, generator=generator)
    return weights


def measure_run(model: Path, method: str, results: Path, samples: int, length: int) -> dict[str, Any]:
    """Prune, score and save a model block by block in its own process, sampling its anonymous memory every 20 ms.

    It calibrates on ``samples`` sequences of ``length`` tokens, and scores as many windows.
    """
    overrides = [*RUN.split(), f"model.path={model}", f"method={method}", "tracker=none"]
    overrides += [f"results_dir={results}", f"save={results / 'saved'}"]
    overrides += [f"calibration.num_samples={samples}", f"calibration.seq_len={length}"]
    overrides += [f"eval.perplexity.max_windows={samples}", f"eval.perplexity.context={length}"]
    start, peak, log_path = time.perf_counter(), 0, results.with_suffix(".log")
    with log_path.open("w") as log_file:
        process = subprocess.Popen([sys.executable, "-m", "dass_exp", *overrides], stdout=log_file, stderr=log_file)
    while process.poll() is None:
        peak = max(peak, process_memory("RssAnon", process.pid) or 0)  # None once the process has ended
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(log_path.read_text()[-2000:])
    seconds = time.perf_counter() - start
    record = next(entry for entry in RecordStore(results).records() if entry["config"]["method"]["name"] == method)
    shutil.rmtree(results / "saved")
    perplexity = record["metrics"]["perplexity"]
    return {"method": method, "peak_bytes": peak, "seconds": seconds, "perplexity": perplexity}


def measure_shape(shape: LlamaShape, methods: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measure a run of each method on a random checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_checkpoint(shape, Path(scratch) / "model")
        gigabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
        for method in methods:
            run = measure_run(folder, method, Path(scratch) / "results", SAMPLES, LENGTH)
            log.info("%s %s: %.2f GB at peak, %.0f s", shape.name, method, run["peak_bytes"] / 1e9, run["seconds"])
            planned = planned_memory(shape.empty_model(), method, (SAMPLES, LENGTH), (SAMPLES, LENGTH))
            minimum = planned.block + planned.ahead + planned.outside
            described = {**vars(shape), "methods": methods}
            yield {"shape": described, "gigabytes": gigabytes, "least": minimum, "planned": planned.streamed, **run}


def table(rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], command: str) -> str:
    """Return the measurements as a Markdown page."""
    cells = [_row(row) for row in rows]
    paragraphs = [
        f"# Peak anonymous memory of a streamed run, {now()[:10]}",
        f"{machine['cpu']}, {machine['threads']} threads; bfloat16, scope mlp, 2:4, {SAMPLES} sequences of {LENGTH} "
        f"tokens for calibration and {SAMPLES} for scoring; the dense and the pruned model are scored in the same "
        f"walk, and the pruned one is saved. Made by `{command}`.\n"
        "`planned` is what `plan=true` says and `model.placement=auto` goes by.",
        markdown_table(list(cells[0]), (list(row.values()) for row in cells)),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _row(run: Mapping[str, Any]) -> dict[str, str]:
    return {
        "checkpoint": f"{run['gigabytes']:.2f} GB",
        **{size: str(run["shape"][size]) for size in ("hidden", "intermediate", "blocks")},
        "method": run["method"],
        "two blocks and outside GB": f"{run['least'] / 1e9:.2f}",
        "planned GB": f"{run['planned'] / 1e9:.2f}",
        "peak GB": f"{run['peak_bytes'] / 1e9:.2f}",
        "seconds": f"{run['seconds']:.0f}",
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dass_exp.benchmark.scale", description=__doc__)
    parser.add_argument("--seven", action="store_true", help="also the shape of a 7B model: 28 GB of disk, ten minutes")
    parser.add_argument("--output", type=Path, default=Path("results/bench"), help="folder of the results")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    shapes = {**SHAPES, **(SEVEN_B if options.seven else {})}
    rows = [row for shape, methods in shapes.items() for row in measure_shape(shape, methods)]
    typed = sys.argv[1:] if arguments is None else arguments
    text = table(rows, environment(), shlex.join(["python", "-m", "dass_exp.benchmark.scale", *typed]))
    path = options.output / f"memory-{now()[:10]}.json"
    write_json(path, rows)
    write_text(path.with_suffix(".md"), text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
