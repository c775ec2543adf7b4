"""What models too large for this machine need in disk, memory and arithmetic, from their shapes alone."""

import statistics
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers

from dass_exp.api import method_of
from dass_exp.benchmark.measure import time_call
from dass_exp.engine.stages import Stages
from dass_exp.models.decoder import Decoder, decoder_of
from dass_exp.report.write import markdown_table
from dass_exp.runs.memory import MemoryNeeds, Workload, memory_needs


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a LLaMA; by default with the vocabulary of SmolLM2 and as many key-value heads as query heads."""

    name: str
    hidden: int
    intermediate: int
    blocks: int
    heads: int
    key_value_heads: int | None = None
    vocabulary: int = 49152

    def empty_model(self) -> Any:
        """Build the model in bfloat16 on the meta device."""
        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads or self.heads,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
            dtype="bfloat16",
        )
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)


SAMPLES, LENGTH = 128, 2048  # calibration, as in the papers
WINDOWS = 166  # of 2048 tokens: the test split of WikiText-2 with LLaMA 2's tokenizer
MODELS = (
    LlamaShape("LLaMA2-7B", 4096, 11008, 32, 32, 32, 32000),
    LlamaShape("LLaMA2-13B", 5120, 13824, 40, 40, 40, 32000),
    LlamaShape("LLaMA2-70B", 8192, 28672, 80, 64, 8, 32000),
    LlamaShape("Llama-3.1-405B", 16384, 53248, 126, 128, 8, 128256),
)


def planned_memory(
    model: Any,
    method: str,
    calibration: tuple[int, int],
    windows: tuple[int, int],
    cache: str = "device",
    device: str = "cpu",
) -> MemoryNeeds:
    """Plan a run with bfloat16, scope mlp, one sequence at a time; calibration and windows are (sequences, tokens)."""
    kinds = partial(Stages().kinds, method_of(method))
    workload = Workload("mlp", kinds, 1, 1, torch.bfloat16, torch.device(device), cache)
    return memory_needs(decoder_of(model), model, calibration, windows, workload)


def forward_operations(decoder: Decoder, vocabulary: int) -> float:
    """Floating-point operations of the forward passes of a streamed run with scope mlp.

    Calibration tokens pass once through each block and once more through its MLP; scored windows pass each block, and
    the head, dense and pruned.
    """
    config, blocks = decoder.config, len(decoder.blocks)
    weights = sum(parameter.numel() for parameter in decoder.blocks[0].parameters() if parameter.ndim > 1)
    mlp_weights = sum(site.matrix.out_features * site.matrix.in_features for site in decoder.sites(0, "mlp"))
    attention = 4 * LENGTH * config.num_attention_heads * config.head_dim  # per token: queries x keys, weights x values
    per_token, calibrated, scored = 2 * weights + attention, SAMPLES * LENGTH, WINDOWS * LENGTH
    in_blocks = blocks * (calibrated * (per_token + 2 * mlp_weights) + 2 * scored * per_token)
    return float(in_blocks + 2 * scored * 2 * config.hidden_size * vocabulary)


def solver_operations(decoder: Decoder) -> float:
    """Operations that SparseGPT adds with scope mlp: half a Gram matrix per input, its Cholesky factor, the updates."""
    sites = list(decoder.sites(0, "mlp"))
    inputs = {site.source: site.matrix.in_features for site in sites}
    updates = sum(site.matrix.out_features * site.matrix.in_features**2 for site in sites)
    gram = sum(SAMPLES * LENGTH * size**2 + size**3 / 3 for size in inputs.values())
    return len(decoder.blocks) * (updates + gram)


def disk_traffic(blocks: int, needs: MemoryNeeds) -> float:
    """Bytes read and written with ``calibration.cache=disk``: the checkpoint twice, activations and state per block.

    Of the calibration activations a block reads its inputs twice, its dense and attention outputs once, and writes
    three tensors of that size; scored windows are read and written for both models.
    """
    tokens, windows = needs.activations / 3, needs.windows / 2
    state = tokens + 2 * windows
    return 2 * needs.model + blocks * (state + 7 * tokens + 4 * windows)


def table() -> str:
    """Return the needs of all models as a Markdown table."""
    rows = [_row(shape) for shape in MODELS]
    return markdown_table(list(rows[0]), (list(row.values()) for row in rows)) + "\n"


def _row(shape: LlamaShape) -> dict[str, str]:
    model, sizes = shape.empty_model(), ((SAMPLES, LENGTH), (WINDOWS, LENGTH))
    decoder, needs = decoder_of(model), planned_memory(model, "dass", *sizes)
    dass, sparsegpt = (planned_memory(model, method, *sizes, "disk").streamed for method in ("dass", "sparsegpt"))
    operations, disk = forward_operations(decoder, shape.vocabulary), disk_traffic(shape.blocks, needs)
    return {
        "model": shape.name,
        "checkpoint GB": f"{needs.model / 1e9:.0f}",
        "DaSS, Wanda: memory GB": f"{dass / 1e9:.1f}",
        "SparseGPT GB": f"{sparsegpt / 1e9:.1f}",
        "activations GB": f"{(needs.activations + needs.windows) / 1e9:.0f}",
        "state GB": f"{(needs.activations / 3 + needs.windows) / 1e9:.0f}",
        "through the disk TB": f"{disk / 1e12:.1f}",
        "PFLOP": f"{operations / 1e15:.0f}",
        "SparseGPT's own PFLOP": f"{solver_operations(decoder) / 1e15:.0f}",
        "hours at 100 TFLOP/s": f"{operations / 1e14 / 3600:.2f}",
        "hours at 1 GB/s of disk": f"{disk / 1e9 / 3600:.1f}",
    }


def card_table() -> str:
    """Return as a Markdown table what a graphics card needs, DaSS / SparseGPT: planned memory, bounds of its work."""
    rows = [_card_row(shape) for shape in MODELS[:3]]
    return markdown_table(list(rows[0]), (list(row.values()) for row in rows)) + "\n"


def _card_row(shape: LlamaShape) -> dict[str, str]:
    model, sizes = shape.empty_model(), ((SAMPLES, LENGTH), (WINDOWS, LENGTH))
    inputs = [site.matrix.in_features for site in decoder_of(model).sites(0, "mlp")]
    columns, linears = shape.blocks * sum(inputs), shape.blocks * len(inputs)
    kept, waiting = (
        {method: planned_memory(model, method, *sizes, cache, "cuda") for method in ("dass", "sparsegpt")}
        for cache in ("device", "cpu")
    )
    return {
        "model": shape.name,
        "in memory GB": " / ".join(f"{needs.resident / 1e9:.0f}" for needs in kept.values()),
        "in memory, `cache=cpu` GB": " / ".join(f"{needs.resident / 1e9:.0f}" for needs in waiting.values()),
        "streamed GB": " / ".join(f"{needs.streamed / 1e9:.0f}" for needs in kept.values()),
        "streamed, `cache=cpu` GB": " / ".join(f"{needs.streamed / 1e9:.0f}" for needs in waiting.values()),
        "host for it, in memory / streamed GB": " / ".join(
            f"{size / 1e9:.0f}" for size in (waiting["dass"].host, waiting["dass"].host + waiting["dass"].host_windows)
        ),
        "launches, thousands": f"{40 * linears / 1e3:.0f} / {5 * columns / 1e3:,.0f}",
        "waits": f"{3 * shape.blocks} / {5 * shape.blocks}",
    }


def operations_per_second(repeats: int = 5) -> float:
    """Measure this processor in a bfloat16 product of [2048, 4096] by [4096, 11008], median of ``repeats``."""
    left, right = torch.randn(2048, 4096, dtype=torch.bfloat16), torch.randn(4096, 11008, dtype=torch.bfloat16)
    seconds = [time_call(lambda: left @ right) for _ in range(repeats + 1)]
    return 2 * 2048 * 4096 * 11008 / statistics.median(seconds[1:])  # the first product is slower


def main() -> int:
    """Print the table and the speed of this processor; return the exit code."""
    speed = f"{operations_per_second() / 1e12:.2f} TFLOP/s in a large product in bfloat16"
    sys.stdout.write(f"{table()}\n{card_table()}\nthis processor: {speed}, {torch.get_num_threads()} threads\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
