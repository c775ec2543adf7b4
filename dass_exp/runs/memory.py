"""What a run needs of memory, from shapes alone: computed before anything is loaded, by the code that also decides where the model goes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from dass_exp.errors import UserError
from dass_exp.evaluate.head import LOGITS
from dass_exp.models.decoder import Decoder, LinearSite
from dass_exp.statistics import Gram, Statistic

_SHARE = 0.9  # of the free memory that a model may take before it is read block by block
_FILES = (  # of a control group, version 2 and version 1: what is used, lines of memory.stat for what is only cached, limits
    ("memory.current", ("inactive_file", "active_file"), ("memory.max", "memory.high")),
    ("memory.usage_in_bytes", ("total_inactive_file", "total_active_file"), ("memory.limit_in_bytes",)),
)
BASE = 700_000_000  # bytes of the interpreter, torch and transformers themselves


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes, by what they are for.

    Args:
        model: all weights.
        block: those of the largest block.
        ahead: of the block that is read ahead; one whose experts are stored one by one is there twice while they are joined.
        outside: those outside the blocks: embedding, norm, head.
        activations: of the calibration tokens: what goes into a block, what it gives dense, and what its attention gives; none that wait elsewhere.
        windows: of the windows that are scored beside them, for the dense and for the pruned model.
        solver: statistics, factors and masks of one block.
        batch: what one batch needs inside a block, and the logits that are held at once.
        copy: of the weights in the scope, from which a sweep gives the shared model back dense.
        disk: not of memory: activations that wait on the disk, masks, and the state of a run that can go on, twice while it is replaced.
    """

    model: int
    block: int
    ahead: int
    outside: int
    activations: int
    windows: int
    solver: int
    batch: int
    copy: int = 0
    disk: int = 0

    @property
    def resident(self) -> int:
        """With the whole model in memory."""
        return BASE + self.model + self.copy + self.activations + self.solver + self.batch

    @property
    def scored(self) -> int:
        """With the whole model in memory and nothing to prune."""
        return BASE + self.model + self.batch

    @property
    def streamed(self) -> int:
        """With two blocks in memory, the one that computes and the one that is read ahead."""
        return (
            BASE + self.block + self.ahead + self.outside + self.activations + self.windows + self.solver + self.batch
        )

    def told(self) -> str:
        """The parts in a line, in GB."""
        return ", ".join(f"{part.name} {getattr(self, part.name) / 1e9:.2f}" for part in fields(self)) + " GB"


def needs(
    decoder: Decoder, model: Any, calibration: tuple[int, int], windows: tuple[int, int], work: Workload
) -> MemoryNeeds:
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
    sites = [list(decoder.sites(index, work.scope)) if work.scope else [] for index in range(len(decoder.blocks))]
    scope = [sum(site.matrix.out_features * site.matrix.in_features for site in block) for block in sites]
    tokens = features * width * calibration[0] * calibration[1], features * width * windows[0] * windows[1]
    waiting = work.cache == "device" or (work.cache == "cpu" and work.device.type == "cpu")
    return MemoryNeeds(
        model=whole * width,
        block=max(blocks) * width,
        ahead=(1 if decoder.family.experts is None else 2) * max(blocks) * width,
        outside=(whole - sum(blocks)) * width,
        activations=3 * waiting * tokens[0],
        windows=2 * waiting * tokens[1],
        solver=max(_solver(block, work) for block in sites) + max(scope),
        batch=max(
            _batch(decoder, work, *shape)
            for shape in ((work.batch_size, calibration[1]), (work.scoring_batch_size, windows[1]))
        )
        + 8 * LOGITS,
        copy=work.shared * sum(scope) * width,
        disk=(work.cache == "disk") * (3 * tokens[0] + 2 * tokens[1])
        + sum(scope) // 8
        + 2 * work.kept * (tokens[0] + 2 * tokens[1]),
    )


def _solver(sites: list[LinearSite], work: Workload) -> int:
    """What pruning one block takes: the scores of a matrix in float32, their comparison and its mask; the Gram matrix of each input, and two more while
    the largest is factorised.
    """
    inputs = {site.source: site.matrix.in_features for site in sites}
    found = 10 * max((site.matrix.out_features * site.matrix.in_features for site in sites), default=0)
    if work.stat is not None and issubclass(work.stat, Gram):
        found += 4 * sum(size**2 for size in inputs.values()) + 8 * max(inputs.values(), default=0) ** 2
    return found


def _batch(decoder: Decoder, work: Workload, sequences: int, length: int) -> int:
    """What a batch takes inside a block: hidden states, those inside the MLP, and the scores of an attention that is computed by plain products."""
    config, width = decoder.config, work.dtype.itemsize
    inside = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    if decoder.family.experts is not None:
        inside = 2 * max(inside, getattr(config, "moe_intermediate_size", 0)) * config.num_experts_per_tok
    plain = config._attn_implementation == "eager"
    scores = (
        plain * config.num_attention_heads * length * (4 + 3 * width)
    )  # a softmax in float32, and copies in the model's own dtype
    return int(sequences * length * ((4 * inside + 8 * config.hidden_size) * width + scores))


@dataclass(frozen=True)
class Workload:
    """What is done to a model.

    Args:
        scope: that is pruned; None for nothing.
        stat: that the method gathers; None for none.
        batch_size: sequences that pass through a block together.
        scoring_batch_size: windows that do.
        dtype, device: in which and where the model computes.
        cache: where activations wait: ``device``, ``cpu`` or ``disk``.
        shared: whether other runs use the same model afterwards.
        kept: whether the state behind each block is kept.
    """

    scope: str | None
    stat: type[Statistic] | None
    batch_size: int
    scoring_batch_size: int
    dtype: torch.dtype
    device: torch.device
    cache: str = "device"
    shared: bool = False
    kept: bool = False


def available_memory(device: torch.device, system: Path = Path("/")) -> int:
    """Bytes that are free where the model computes; of a machine's memory, no more than a batch system or a container leaves to this process.

    Args:
        device: of the model.
        system: where ``proc`` and ``sys`` lie.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [1 << 62]  # where nobody says, the user decides
    with suppress(OSError, StopIteration):
        lines = (system / "proc/meminfo").read_text(encoding="ascii").splitlines()
        free.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    with suppress(OSError):
        for line in (system / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                group, files = Path(path.lstrip("/")), _FILES[bool(controllers)]
                free += [
                    _left(system / "sys/fs/cgroup" / controllers / part, *files) for part in (group, *group.parents)
                ]
    return min(free)


def _left(group: Path, usage: str, caches: tuple[str, ...], limits: tuple[str, ...]) -> int:
    """Bytes that a control group may still take, and with it all groups below it; what it only caches from the disk is free."""
    try:
        most = [text for name in limits if (text := (group / name).read_text(encoding="ascii").strip()) != "max"]
        taken = int((group / usage).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines() if line)
        return min((int(text) - taken + sum(int(stat[cache]) for cache in caches) for text in most), default=1 << 62)
    except (OSError, KeyError, ValueError):
        return 1 << 62


def choose_placement(asked: str, needs: MemoryNeeds, free: int) -> tuple[str, str]:
    """Where the model goes, ``resident`` or ``stream``, and the sizes in a line.

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
            f"model.placement={asked}: this run needs {told} ({needs.told()}); take fewer or shorter sequences, a smaller batch, calibration.cache=disk, "
            "model.dtype=bfloat16, or a larger machine"
        )
    streams = asked == "stream" or (asked == "auto" and needs.resident > _SHARE * free and needs.streamed <= free)
    return ("stream", f"the model is read block by block: {told} ({needs.told()})") if streams else ("resident", told)
