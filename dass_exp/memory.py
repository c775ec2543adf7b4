"""What a run needs of memory, from shapes alone: computed before anything is loaded, by the code that also decides where the model goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dass_exp.decoder import Decoder
from dass_exp.errors import UserError
from dass_exp.evaluate.head import LOGITS
from dass_exp.stats import Gram, Stat

_SHARE = 0.9  # of the free memory that a model may take before it is read block by block
BASE = 700_000_000  # bytes of the interpreter, torch and transformers themselves


@dataclass(frozen=True)
class Needs:
    """Bytes, by what they are for.

    Args:
        model: all weights.
        block: those of the largest block.
        outside: those outside the blocks: embedding, norm, head.
        activations: of the calibration tokens: what goes into a block, what it gives dense, and what its attention gives.
        windows: of the windows that are scored beside them, for the dense and for the pruned model.
        solver: statistics, factors and masks of one block.
        batch: what one batch needs inside a block, and the logits that are held at once.
    """

    model: int
    block: int
    outside: int
    activations: int
    windows: int
    solver: int
    batch: int

    @property
    def resident(self) -> int:
        """With the whole model in memory."""
        return BASE + self.model + self.activations + self.solver + self.batch

    @property
    def scored(self) -> int:
        """With the whole model in memory and nothing to prune."""
        return BASE + self.model + self.batch

    @property
    def streamed(self) -> int:
        """With two blocks in memory, the one that computes and the one that is read ahead."""
        return BASE + 2 * self.block + self.outside + self.activations + self.windows + self.solver + self.batch

    def told(self) -> str:
        """The parts in a line, in GB."""
        parts = ("model", "block", "outside", "activations", "windows", "solver", "batch")
        return ", ".join(f"{name} {getattr(self, name) / 1e9:.2f}" for name in parts) + " GB"


def needs(decoder: Decoder, model: Any, calibration: tuple[int, int], windows: tuple[int, int], work: Work) -> Needs:
    """Bytes that pruning and scoring a model take.

    Args:
        decoder: of the model.
        model: on the meta device is enough.
        calibration: sequences and tokens of each; zeros without calibration.
        windows: that are scored, and tokens of each; zeros without.
        work: what is done to the model.
    """
    width, config = work.dtype.itemsize, decoder.config
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in decoder.blocks]
    whole = sum(parameter.numel() for parameter in model.parameters())
    features = int(config.hidden_size)
    sites = [site for index in range(len(decoder.blocks)) for site in decoder.sites(index, work.scope)] if work.scope else []
    widest = max((site.matrix.out_features * site.matrix.in_features for site in sites), default=0)
    inputs = {site.source: site.matrix.in_features for site in sites}
    solver = 10 * widest  # scores in float32, their comparison, the mask
    if work.stat is not None and issubclass(work.stat, Gram):
        solver += 4 * sum(size**2 for size in inputs.values()) + 8 * max(inputs.values(), default=0) ** 2
    inside = max((site.matrix.out_features for site in sites), default=features)
    longest = max(work.batch_size * calibration[1], work.batch_size * windows[1])
    return Needs(
        model=whole * width,
        block=max(blocks) * width,
        outside=(whole - sum(blocks)) * width,
        activations=3 * calibration[0] * calibration[1] * features * width,
        windows=2 * windows[0] * windows[1] * features * width,
        solver=solver,
        batch=longest * (4 * inside + 8 * features) * width + 8 * LOGITS,
    )


@dataclass(frozen=True)
class Work:
    """What is done to a model: ``scope`` None prunes nothing."""

    scope: str | None
    stat: type[Stat] | None
    batch_size: int
    dtype: torch.dtype


def available(device: torch.device) -> int:
    """Bytes that are free where the model computes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 62  # nobody says: the user decides


def placed(asked: str, needs: Needs, free: int) -> tuple[str, str]:
    """Where the model goes, ``resident`` or ``stream``, and why in a line (empty where the user said so).

    Args:
        asked: ``auto``, ``resident`` or ``stream``.
        needs: of the run.
        free: bytes at hand.

    Raises:
        UserError: it fits in neither way; the message holds the numbers.
    """
    told = f"{needs.resident / 1e9:.1f} GB with the whole model in memory, {needs.streamed / 1e9:.1f} GB block by block, {free / 1e9:.1f} GB are free"
    wanted = {"resident": needs.resident, "stream": needs.streamed, "auto": min(needs.resident, needs.streamed)}[asked]
    if wanted > free:
        raise UserError(
            f"model.placement={asked}: this run needs {told} ({needs.told()}); take fewer or shorter sequences, a smaller batch, model.dtype=bfloat16, "
            "or a larger machine"
        )
    if asked != "auto":
        return asked, ""
    return ("resident", "") if needs.resident <= _SHARE * free else ("stream", f"the model is read block by block: {told}")
