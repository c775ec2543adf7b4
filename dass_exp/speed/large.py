"""What models need that fit into no memory: disk, memory and arithmetic, from shapes alone. Nothing is run."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import transformers

from dass_exp.api import method_of
from dass_exp.decoder import Decoder, decoder_of
from dass_exp.memory import Needs, Work, needs

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
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate, num_hidden_layers=self.blocks,
            num_attention_heads=self.heads, num_key_value_heads=self.key_value_heads, tie_word_embeddings=False,
        )  # fmt: skip


MODELS = (
    Large("LLaMA2-7B", 4096, 11008, 32, 32, 32, 32000),
    Large("LLaMA2-13B", 5120, 13824, 40, 40, 40, 32000),
    Large("LLaMA2-70B", 8192, 28672, 80, 64, 8, 32000),
    Large("Llama-3.1-405B", 16384, 53248, 126, 128, 8, 128256),
)


def planned(model: torch.nn.Module, decoder: Decoder, method: str, cache: str) -> Needs:
    """What a run in bfloat16, scope mlp, a sequence at a time, needs of memory."""
    work = Work("mlp", method_of(method).stat, 1, 1, torch.bfloat16, torch.device("cpu"), cache)
    return needs(decoder, model, (SAMPLES, LENGTH), (WINDOWS, LENGTH), work)


def passes(decoder: Decoder, vocabulary: int) -> float:
    """Floating-point operations of a streamed run with scope mlp, but for what a method solves.

    Calibration tokens pass once through a block and once more through its MLP; the windows pass it dense and pruned, and twice through the head.
    """
    config, every = decoder.config, len(decoder.blocks)
    block = sum(parameter.numel() for parameter in decoder.blocks[0].parameters() if parameter.ndim > 1)
    mlp = sum(site.matrix.out_features * site.matrix.in_features for site in decoder.sites(0, "mlp"))
    attention = 4 * LENGTH * config.num_attention_heads * config.head_dim  # queries by keys and weights by values, a token
    once, tokens, scored = 2 * block + attention, SAMPLES * LENGTH, WINDOWS * LENGTH
    return float(every * (tokens * (once + 2 * mlp) + 2 * scored * once) + 2 * scored * 2 * config.hidden_size * vocabulary)


def solved(decoder: Decoder) -> float:
    """Operations that SparseGPT adds with scope mlp: half a Gram matrix of each input, its Cholesky factor, and the feedback along each row."""
    total = 0.0
    inputs: dict[str, int] = {}
    for site in decoder.sites(0, "mlp"):
        inputs[site.source] = site.matrix.in_features
        total += site.matrix.out_features * site.matrix.in_features**2
    total += sum(SAMPLES * LENGTH * size**2 + size**3 / 3 for size in inputs.values())
    return total * len(decoder.blocks)


def table() -> str:
    """Markdown."""
    lines = [
        "| model | checkpoint GB, read and written | DaSS, Wanda GB | SparseGPT GB | with `calibration.cache=device` | activations on disk GB | state GB "
        "| passes PFLOP | SparseGPT's own PFLOP |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for large in MODELS:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(large.config)
        decoder = decoder_of(model)
        aside = planned(model, decoder, "dass", "disk")
        here = planned(model, decoder, "dass", "device")
        state = here.activations // 3 + here.windows
        lines.append(
            f"| {large.name} | {aside.model / 1e9:.0f} | {aside.streamed / 1e9:.1f} | {planned(model, decoder, 'sparsegpt', 'disk').streamed / 1e9:.1f} "
            f"| {(here.activations + here.windows) / 1e9:.1f} more | {(here.activations + here.windows) / 1e9:.1f} | {state / 1e9:.1f} "
            f"| {passes(decoder, large.vocabulary) / 1e15:.1f} | {solved(decoder) / 1e15:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Returns the exit code."""
    sys.stdout.write(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
