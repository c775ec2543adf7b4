"""What models need that fit into no memory: disk, memory and arithmetic, from shapes alone. Nothing is run."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass

import torch
import transformers

from dass_exp.api import method_of
from dass_exp.models.decoder import Decoder, decoder_of
from dass_exp.runs.memory import MemoryNeeds, Workload, needs

SAMPLES, LENGTH = 128, 2048  # calibration, as in the papers
WINDOWS = 166  # of 2048 tokens: WikiText2's test split as LLaMA 2 reads it


@dataclass(frozen=True)
class Large:
    """The shape of a published LLaMA, from its config.json."""

    name: str
    hidden: int
    intermediate: int
    blocks: int
    heads: int
    key_value_heads: int
    vocabulary: int

    @property
    def config(self) -> transformers.LlamaConfig:
        """Of transformers."""
        return transformers.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            tie_word_embeddings=False,
        )


MODELS = (
    Large("LLaMA2-7B", 4096, 11008, 32, 32, 32, 32000),
    Large("LLaMA2-13B", 5120, 13824, 40, 40, 40, 32000),
    Large("LLaMA2-70B", 8192, 28672, 80, 64, 8, 32000),
    Large("Llama-3.1-405B", 16384, 53248, 126, 128, 8, 128256),
)


def planned(model: torch.nn.Module, decoder: Decoder, method: str, cache: str) -> MemoryNeeds:
    """What a run in bfloat16, scope mlp, a sequence at a time, needs of memory."""
    work = Workload("mlp", method_of(method).stat, 1, 1, torch.bfloat16, torch.device("cpu"), cache)
    return needs(decoder, model, (SAMPLES, LENGTH), (WINDOWS, LENGTH), work)


def passes(decoder: Decoder, vocabulary: int) -> float:
    """Floating-point operations of a streamed run with scope mlp, but for what a method solves.

    Calibration tokens pass once through a block and once more through its MLP; the windows pass it dense and pruned, and twice through the head.
    """
    config, every = decoder.config, len(decoder.blocks)
    block = sum(parameter.numel() for parameter in decoder.blocks[0].parameters() if parameter.ndim > 1)
    mlp = sum(site.matrix.out_features * site.matrix.in_features for site in decoder.sites(0, "mlp"))
    attention = (
        4 * LENGTH * config.num_attention_heads * config.head_dim
    )  # queries by keys and weights by values, a token
    once, tokens, scored = 2 * block + attention, SAMPLES * LENGTH, WINDOWS * LENGTH
    return float(
        every * (tokens * (once + 2 * mlp) + 2 * scored * once) + 2 * scored * 2 * config.hidden_size * vocabulary
    )


def solved(decoder: Decoder) -> float:
    """Operations that SparseGPT adds with scope mlp: half a Gram matrix of each input, its Cholesky factor, and the feedback along each row."""
    total = 0.0
    inputs: dict[str, int] = {}
    for site in decoder.sites(0, "mlp"):
        inputs[site.source] = site.matrix.in_features
        total += site.matrix.out_features * site.matrix.in_features**2
    total += sum(SAMPLES * LENGTH * size**2 + size**3 / 3 for size in inputs.values())
    return total * len(decoder.blocks)


def through_the_disk(decoder: Decoder, here: MemoryNeeds) -> float:
    """Bytes that a run with ``calibration.cache=disk`` reads and writes: the checkpoint twice, and for each block the state once and what waits.

    Of the calibration tokens a block reads its inputs twice and its dense outputs and those of its attention once, and writes three tensors of that size;
    windows are read and written for both models.
    """
    tokens, windows = here.activations / 3, here.windows / 2
    return 2 * here.model + len(decoder.blocks) * (tokens + 2 * windows + 7 * tokens + 4 * windows)


def table() -> str:
    """Markdown."""
    lines = [
        "| model | checkpoint GB | DaSS, Wanda: memory GB | SparseGPT GB | activations GB | state GB | through the disk TB | PFLOP | SparseGPT's own PFLOP "
        "| hours at 100 TFLOP/s | hours at 1 GB/s of disk |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for large in MODELS:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(large.config)
        decoder = decoder_of(model)
        dass, solver = (planned(model, decoder, method, "disk").streamed / 1e9 for method in ("dass", "sparsegpt"))
        here = planned(model, decoder, "dass", "device")
        work, disk = passes(decoder, large.vocabulary), through_the_disk(decoder, here)
        lines.append(
            f"| {large.name} | {here.model / 1e9:.0f} | {dass:.1f} | {solver:.1f} | {(here.activations + here.windows) / 1e9:.0f} "
            f"| {(here.activations / 3 + here.windows) / 1e9:.0f} | {disk / 1e12:.1f} | {work / 1e15:.0f} | {solved(decoder) / 1e15:.0f} "
            f"| {work / 1e14 / 3600:.2f} | {disk / 1e9 / 3600:.1f} |"
        )
    return "\n".join(lines) + "\n"


def rate(repeats: int = 5) -> float:
    """Operations a second of this machine's processor in a product of [2048, 4096] by [4096, 11008] in bfloat16, the median of some."""
    one, other = torch.randn(2048, 4096, dtype=torch.bfloat16), torch.randn(4096, 11008, dtype=torch.bfloat16)
    seconds = []
    for _ in range(repeats + 1):  # the first is slower
        start = time.perf_counter()
        one @ other
        seconds.append(time.perf_counter() - start)
    return 2 * 2048 * 4096 * 11008 / statistics.median(seconds[1:])


def main() -> int:
    """Returns the exit code."""
    sys.stdout.write(
        f"{table()}\nthis processor: {rate() / 1e12:.2f} TFLOP/s in a large product in bfloat16, {torch.get_num_threads()} threads\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
