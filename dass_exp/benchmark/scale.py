"""Peak memory of a streamed run against depth and size: random LLaMA-shaped checkpoints, pruned and scored in processes of their own."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from dass_exp.api import method_of
from dass_exp.data import assets
from dass_exp.models.decoder import decoder_of
from dass_exp.models.locate import convert_gguf
from dass_exp.models.save import CheckpointWriter
from dass_exp.runs.memory import MemoryNeeds, Workload, needs
from dass_exp.storage.records import Store, environment, write_json

log = logging.getLogger("dass_exp.benchmark")


@dataclass(frozen=True)
class Shape:
    """A LLaMA of random weights in bfloat16, with SmolLM2's tokenizer."""

    name: str
    hidden: int
    intermediate: int
    blocks: int
    heads: int
    methods: tuple[str, ...] = ("dass", "wanda", "sparsegpt")

    @property
    def config(self) -> transformers.LlamaConfig:
        """Of transformers."""
        return transformers.LlamaConfig(
            vocab_size=49152,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            tie_word_embeddings=False,
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=0,
            dtype="bfloat16",
        )


SHAPES = (
    Shape("0.5 GB", 1024, 2816, 12, 16),
    Shape("1 GB", 1024, 2816, 32, 16),
    Shape("1.7 GB", 1024, 2816, 60, 16),
    Shape("2 GB", 2048, 5504, 16, 16),
)
SEVEN_B = (
    Shape("7B", 4096, 11008, 32, 32, ("dass", "wanda")),
    Shape("7B, 4 blocks", 4096, 11008, 4, 32),
)  # SparseGPT takes a minute or two a block there
SAMPLES, LENGTH = 4, 128  # sequences of calibration, windows that are scored, and tokens of each


def make(shape: Shape, folder: Path) -> Path:
    """Write a random checkpoint, a block at a time: it is never in memory as a whole."""
    source = assets.converted("smollm2_135m", convert_gguf)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shape.config)
    draw = torch.Generator().manual_seed(0)
    growing = CheckpointWriter(folder, folder.with_name(f".{folder.name}.partial"))
    growing.begin(dict, shape.blocks)
    names = decoder_of(model).names
    for index, block in enumerate(names):
        growing.add(
            index,
            _random(
                {name: tensor for name, tensor in model.state_dict().items() if name.startswith(f"{block}.")}, draw
            ),
        )
    outside = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(tuple(f"{block}." for block in names))
    }
    model.load_state_dict(_random(outside, draw), strict=False, assign=True)
    growing.finish(model, tokenizer, {}, {"key": "random", "told": "random weights"})
    shutil.rmtree(folder.with_name(f".{folder.name}.partial"))
    return folder


def _random(shapes: Mapping[str, Tensor], draw: torch.Generator) -> dict[str, Tensor]:
    """Norms of ones, matrices of small normal numbers, all bfloat16."""
    found = {}
    for name, tensor in shapes.items():
        whole = torch.ones(tensor.shape, dtype=torch.bfloat16)
        found[name] = whole if tensor.ndim == 1 else whole.normal_(std=0.02, generator=draw)
    return found


def measure(model: Path, method: str, results: Path, samples: int, length: int) -> dict[str, Any]:
    """Prune, score and save a model block by block in a process of its own.

    Args:
        model: folder of the checkpoint.
        method: name of its file in conf/method.
        results: a folder for the record.
        samples: calibration sequences; as many windows are scored.
        length: tokens of each.

    Returns:
        peak anonymous memory in bytes (sampled every 20 ms from ``/proc``), seconds, and both perplexities.
    """
    overrides = [
        f"model.path={model}",
        "model.dtype=bfloat16",
        "model.placement=stream",
        f"method={method}",
        f"results_dir={results}",
        "tracker=none",
        "eval=ppl_mini",
        f"eval.perplexity.context={length}",
        f"eval.perplexity.max_windows={samples}",
        f"calibration.num_samples={samples}",
        f"calibration.seq_len={length}",
        "calibration.batch_size=1",
        "eval.batch_size=1",
        f"save={results / 'saved'}",
    ]
    start = time.perf_counter()
    told = results.with_suffix(".log")
    with told.open("w") as log_file:
        running = subprocess.Popen([sys.executable, "-m", "dass_exp", *overrides], stdout=log_file, stderr=log_file)
    peak = 0
    while running.poll() is None:
        peak = max(peak, _anonymous(running.pid))
        time.sleep(0.02)
    if running.returncode:
        raise RuntimeError(told.read_text()[-2000:])
    record = next(record for record in Store(results).records() if record["config"]["method"]["name"] == method)
    shutil.rmtree(results / "saved")
    return {
        "method": method,
        "peak_bytes": peak,
        "seconds": time.perf_counter() - start,
        "perplexity": record["metrics"]["perplexity"],
    }


def _anonymous(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
    except OSError:
        return 0  # it has just ended


def table(rows: list[dict[str, Any]], machine: Mapping[str, Any], command: str) -> str:
    """Markdown."""
    lines = [
        f"# Peak anonymous memory of a streamed run, {datetime.now(UTC).date().isoformat()}",
        "",
        f"{machine['cpu']}, {machine['threads']} threads; bfloat16, scope mlp, 2:4, 4 sequences of 128 tokens for calibration and 4 for scoring; the dense "
        f"and the pruned model are scored in the same walk, and the pruned one is saved. Made by `{command}`.",
        "`planned` is what `plan=true` says and `model.placement=auto` goes by.",
        "",
        "| checkpoint | hidden | intermediate | blocks | method | two blocks and outside GB | planned GB | peak GB | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shape: Shape = row["shape"]
        lines.append(
            f"| {row['gigabytes']:.2f} GB | {shape.hidden} | {shape.intermediate} | {shape.blocks} | {row['method']} | {row['least'] / 1e9:.2f} "
            f"| {row['planned'] / 1e9:.2f} | {row['peak_bytes'] / 1e9:.2f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dass_exp.benchmark.scale", description=__doc__)
    parser.add_argument(
        "--seven", action="store_true", help="the shape of a 7B model too: 28 GB of disk, some ten minutes"
    )
    parser.add_argument("--output", type=Path, default=Path("results/bench"))
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for shape in (*SHAPES, *(SEVEN_B if asked.seven else ())):
        with tempfile.TemporaryDirectory() as place:
            folder = make(shape, Path(place) / "model")
            gigabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
            for method in shape.methods:
                found = measure(folder, method, Path(place) / "results", SAMPLES, LENGTH)
                rows.append(
                    {
                        "shape": shape,
                        "gigabytes": gigabytes,
                        "least": _least(shape),
                        "planned": planned(shape.config, method).streamed,
                        **found,
                    }
                )
                log.info(
                    "%s %s: %.2f GB at its peak, %.0f s",
                    shape.name,
                    method,
                    found["peak_bytes"] / 1e9,
                    found["seconds"],
                )
    command = shlex.join(
        ["python", "-m", "dass_exp.benchmark.scale", *(sys.argv[1:] if arguments is None else arguments)]
    )
    text, name = table(rows, environment(), command), f"memory-{datetime.now(UTC).date().isoformat()}"
    write_json(asked.output / f"{name}.json", [{**row, "shape": vars(row["shape"])} for row in rows])
    (asked.output / f"{name}.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


def planned(config: transformers.PretrainedConfig, method: str) -> MemoryNeeds:
    """What a run on a model of these shapes needs, as it is planned."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    size = (SAMPLES, LENGTH)
    work = Workload("mlp", method_of(method).stat, 1, 1, torch.bfloat16, torch.device("cpu"))
    return needs(decoder_of(model), model, size, size, work)


def _least(shape: Shape) -> int:
    """Bytes of two blocks and of what lies outside the blocks, in bfloat16."""
    block = 4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden
    return 2 * (2 * block + 2 * 49152 * shape.hidden + shape.hidden)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
