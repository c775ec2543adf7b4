"""Estimate the memory of a run from shapes alone, and choose where its model is placed."""

import math
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from dass_exp.engine.repair_passes import MAX_KEPT_NEURONS
from dass_exp.engine.stages import Stages
from dass_exp.errors import UserError
from dass_exp.evaluate.head import MAX_LOGITS
from dass_exp.models.decoder import Decoder, LinearSite
from dass_exp.models.families import READER_OF, Role
from dass_exp.retrain.base import NoRetraining, Retraining
from dass_exp.statistics import Gram, Statistic

_SHARE = 0.9  # of the free memory; a run that needs more is streamed
_CGROUP_FILES = (  # version 2 and version 1: usage, lines of memory.stat that count page cache, limits
    ("memory.current", ("inactive_file", "active_file"), ("memory.max", "memory.high")),
    ("memory.usage_in_bytes", ("total_inactive_file", "total_active_file"), ("memory.limit_in_bytes",)),
)
_UNLIMITED = 1 << 62
# on an accelerator: bytes a weight that a sort takes, those of all pairs of a group of 16, and their limit
_SORT, _PAIRS, _MOST_PAIRS = 24, 84, 1 << 30
# limit, what counts towards it, and the share left for tensors: the files that are read count as addresses too
_LIMITS = (("Max address space", "VmSize", 0.5), ("Max data size", "VmData", 1.0))
BASE = 700_000_000  # bytes of the interpreter, torch and transformers themselves


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes, by what they are for."""

    model: int  # all weights
    block: int  # the largest block
    ahead: int  # the prefetched block; twice where experts that are stored one by one are joined
    outside: int  # weights outside the blocks: embedding, norm, head
    activations: int  # calibration: inputs, dense outputs and attention outputs of a block, unless cached elsewhere
    windows: int  # hidden states of the windows that are scored while streaming, dense and pruned
    solver: int  # statistics, factors and masks of one block
    batch: int  # one batch inside a block, and the logits that are computed at a time
    copy: int = 0  # dense weights in the scope, from which a sweep restores the shared model
    tokens: int = 0  # ids of calibration and windows, twice while they are put together
    training: int = 0  # what is trained, its gradients and moments, weights before, activations for gradients, logits
    before: int = 0  # kept of the dense model for retraining, while it is pruned too: weights in the scope, its states
    host: int = 0  # not memory of an accelerator: activations that wait on its host, targets of training
    host_windows: int = 0  # the same of scored windows: where the model is streamed
    host_dense: int = 0  # the dense model's last states: where the model is in memory, and the divergence is scored
    disk: int = 0  # not memory: activations cached on disk, masks, and the resume state, twice while it is replaced

    @property
    def resident(self) -> int:
        """With the whole model in memory."""
        windows = self.windows // 2  # of the dense model alone
        pruning = self.activations + self.solver + self.batch
        return BASE + self.model + self.copy + windows + max(pruning, self.training) + self.before + self.tokens

    @property
    def scored(self) -> int:
        """With the whole model in memory and nothing to prune."""
        return BASE + self.model + self.batch

    @property
    def streamed(self) -> int:
        """With two blocks in memory: the current one and the prefetched one."""
        blocks = self.block + self.ahead + self.outside
        return BASE + blocks + self.activations + self.windows + self.solver + self.batch + self.tokens

    def summary(self) -> str:
        """Both totals, in GB."""
        return (
            f"{self.resident / 1e9:.1f} GB with the whole model in memory, {self.streamed / 1e9:.1f} GB block by block"
        )

    def parts(self) -> str:
        """All parts that are not nothing in one line, in GB."""
        sizes = {part.name: getattr(self, part.name) / 1e9 for part in fields(self)}
        return ", ".join(f"{name} {size:.2f}" for name, size in sizes.items() if size) + " GB"


@dataclass(frozen=True)
class Workload:
    """What a run does to a model, as far as it takes memory."""

    scope: str | None  # what is pruned, None for nothing
    kinds: Callable[[Role], Iterable[type[Statistic] | None]]  # the statistics at the input of a role's linear
    batch_size: int  # calibration sequences that pass through a block together
    scoring_batch_size: int  # windows that do
    dtype: torch.dtype
    device: torch.device
    cache: str = "device"  # where activations wait: device, cpu or disk
    shared: bool = False  # whether other runs use the same model afterwards
    resumable: bool = False  # whether the state behind each block is kept
    stages: Stages = field(default_factory=Stages)  # around the method
    solver_bytes: tuple[int, int] = (10, 8)  # of the method or a stage, whichever takes more
    retrain: Retraining = field(default_factory=NoRetraining)
    training_windows: int = 0  # of the text that is trained on


def memory_needs(
    decoder: Decoder, model: Any, calibration: tuple[int, int], windows: tuple[int, int], workload: Workload
) -> MemoryNeeds:
    """Estimate the bytes that pruning and scoring a model take.

    Args:
        decoder: of the model.
        model: may be on the meta device.
        calibration: number of sequences and their length; zeros without calibration.
        windows: number of scored windows and their length; zeros without.
        workload: what is done to the model.
    """
    width, features = workload.dtype.itemsize, int(decoder.config.hidden_size)
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in decoder.blocks]
    whole = sum(parameter.numel() for parameter in model.parameters())
    indices = range(len(decoder.blocks))
    sites = [list(decoder.sites(index, workload.scope)) if workload.scope else [] for index in indices]
    scope = [sum(site.matrix.out_features * site.matrix.in_features for site in block) for block in sites]
    calibration_bytes, window_bytes = (features * width * count * length for count, length in (calibration, windows))
    in_memory = workload.cache == "device" or (workload.cache == "cpu" and workload.device.type == "cpu")
    batches = ((workload.batch_size, calibration[1]), (workload.scoring_batch_size, windows[1]))
    on_disk = (workload.cache == "disk") * (3 * calibration_bytes + 2 * window_bytes)
    repair = workload.stages.repair
    recorded = (repair.follows_inputs or repair.needs_mlp_tokens) + repair.needs_mlp_tokens
    state = 2 * workload.resumable * (calibration_bytes + 2 * window_bytes)
    activations = (3 + recorded) * in_memory * calibration_bytes + _kept_neurons(sites, calibration, workload)
    activations += 2 * (repair.needs_mlp_tokens and not in_memory) * calibration_bytes  # they are loaded together
    solver = max(_solver_bytes(block, workload) for block in sites) + max(scope)
    batch = max(_batch_bytes(decoder, workload, *shape) for shape in batches) + 16 * MAX_LOGITS
    training = _training_bytes(decoder, model, sites, workload)
    if workload.retrain.active and workload.retrain.relevance:  # masks are chosen again, along the curve or at the end
        again = activations + solver + batch + 3 * sum(scope) * width  # weights pruned, trained, and moved
        training = training + again if workload.retrain.curve else max(training, again)
    return MemoryNeeds(
        model=whole * width,
        block=max(blocks) * width,
        ahead=(1 if decoder.family.experts is None else 2) * max(blocks) * width,
        outside=(whole - sum(blocks)) * width,
        activations=activations,
        windows=2 * in_memory * window_bytes,
        solver=solver,
        batch=batch,
        copy=workload.shared * sum(scope) * width,
        tokens=16 * sum(count * length for count, length in (calibration, windows)),
        # the host runs ahead of the accelerator: what a batch gives is stored before what it has read is free
        host=_waiting_on_host(workload, features, workload.batch_size, calibration, 4 + recorded)
        + (workload.device.type != "cpu") * _target_states(workload, features),
        host_dense=(workload.device.type != "cpu") * window_bytes,
        host_windows=_waiting_on_host(workload, features, workload.scoring_batch_size, windows, 4),
        disk=on_disk + sum(scope) // 8 + state + 2 * 12 * _trained_numbers(model, sites, workload.retrain),
        training=training,
        before=_kept_for_training(sum(scope), features, workload),
    )


def _waiting_on_host(workload: Workload, features: int, batch_size: int, tokens: tuple[int, int], copies: int) -> int:
    """Return the bytes of page-locked memory for ``copies`` of the activations of so many sequences and tokens.

    torch gives it out in powers of two, a batch at a time.
    """
    (count, length), width = tokens, workload.dtype.itemsize
    batch = min(batch_size, count) * length * features * width
    if workload.cache != "cpu" or workload.device.type == "cpu" or not batch:
        return 0
    return copies * math.ceil(count / batch_size) * (1 << (batch - 1).bit_length())


def _target_states(workload: Workload, features: int) -> int:
    """Return the bytes of the dense model's last states that training with ``loss=kl`` takes as its target."""
    retraining = workload.retrain
    if not retraining.active or retraining.loss != "kl":
        return 0
    windows = min(retraining.steps * retraining.batch_size, workload.training_windows)
    return workload.dtype.itemsize * windows * retraining.seq_len * features


def _kept_for_training(scope: int, features: int, workload: Workload) -> int:
    """Return the bytes that are kept of the dense model: its weights, and its last states if they are the target."""
    retraining = workload.retrain
    if not retraining.active:
        return 0
    states = _target_states(workload, features) if workload.device.type == "cpu" else 0  # else they wait on the host
    return workload.dtype.itemsize * retraining.relevance * scope + states


def _trained_numbers(model: Any, sites: list[list[LinearSite]], retraining: Retraining) -> int:
    """Return how many numbers a retraining trains."""
    if not retraining.active:
        return 0
    if retraining.trains_vectors:
        return sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    tensors = {id(site.matrix.parameter): site.matrix.parameter for block in sites for site in block}
    return sum(retraining.trained_numbers(tensor.shape) for tensor in tensors.values())


def _training_bytes(decoder: Decoder, model: Any, sites: list[list[LinearSite]], workload: Workload) -> int:
    """Estimate retraining.

    Value, gradient and two moments of what is trained, float32; masks, and pruned weights to compare masks; the
    tensors that are put in place; activations kept for gradients; logits with their gradients.
    """
    retraining, config, width = workload.retrain, decoder.config, workload.dtype.itemsize
    if not retraining.active:
        return 0
    scope = sum(site.matrix.out_features * site.matrix.in_features for block in sites for site in block)
    tokens = retraining.batch_size * retraining.seq_len
    intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    kept = tokens * len(decoder.blocks) * (12 * config.hidden_size + 5 * intermediate) * width
    copies = (1 + width * retraining.relevance + 3 * max(width, 4)) * scope
    return int(16 * _trained_numbers(model, sites, retraining) + copies + kept + 5 * 4 * MAX_LOGITS)


def _solver_bytes(sites: list[LinearSite], workload: Workload) -> int:
    """Estimate pruning one block: the work on its largest matrix, Gram matrices, and what is derived from one.

    Refinement and repair need the dense weights too.
    """
    per_weight, per_entry = workload.solver_bytes
    inputs = {site.source: site.matrix.in_features for site in sites}
    of_gram = {
        site.source: site.matrix.in_features
        for site in sites
        if any(kind is not None and issubclass(kind, Gram) for kind in workload.kinds(site.role))
    }
    sizes = [site.matrix.out_features * site.matrix.in_features for site in sites]
    largest = max(sizes, default=0)
    ranking = max(_SORT * largest, min(_PAIRS * largest, _MOST_PAIRS)) if workload.device.type != "cpu" else 0
    total = ranking + per_weight * largest + 4 * sum(size**2 for size in of_gram.values())
    if of_gram:
        total += per_entry * max(inputs.values(), default=0) ** 2
    if workload.stages.need_dense_weights:
        total += sum(sizes) * workload.dtype.itemsize
    return total


def _kept_neurons(sites: list[list[LinearSite]], calibration: tuple[int, int], workload: Workload) -> int:
    """Return the bytes of the intermediate activations that a repair keeps for the pass on."""
    readers = {*READER_OF.values()}
    widths = [
        sum(site.matrix.in_features for site in block if site.role in readers and site.matrix.expert is None)
        for block in sites
    ]
    size = max(widths, default=0) * calibration[0] * calibration[1] * workload.dtype.itemsize
    return size if workload.stages.repair.follows_inputs and size <= MAX_KEPT_NEURONS else 0


def _batch_bytes(decoder: Decoder, workload: Workload, sequences: int, length: int) -> int:
    """Estimate one batch inside a block: hidden states, those inside the MLP, and the scores of an eager attention."""
    config, width = decoder.config, workload.dtype.itemsize
    intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    if decoder.family.experts is not None:
        widest = max(intermediate, getattr(config, "moe_intermediate_size", 0))
        intermediate = 2 * widest * config.num_experts_per_tok
    eager = config._attn_implementation == "eager"
    scores = eager * config.num_attention_heads * length * (4 + 3 * width)  # a float32 softmax, and copies in dtype
    return int(sequences * length * ((4 * intermediate + 8 * config.hidden_size) * width + scores))


def available_memory(device: torch.device, system: Path = Path("/")) -> int:
    """Return the free bytes of a device, within the limits of a shell, batch system or container.

    Args:
        device: of the model.
        system: the folder that holds ``proc`` and ``sys``.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept  # torch's allocator gives out again what it keeps
    free = [_UNLIMITED]  # if nothing is known, assume that it fits
    with suppress(OSError, StopIteration):
        lines = (system / "proc/meminfo").read_text(encoding="ascii").splitlines()
        free.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    free += _left_of_limits(system / "proc/self")
    with suppress(OSError):
        for line in (system / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                group, root = Path(path.lstrip("/")), system / "sys/fs/cgroup" / controllers
                free += [_left_in(root / part, bool(controllers)) for part in (group, *group.parents)]
    return min(free)


def _left_of_limits(process: Path) -> list[int]:
    """Return the bytes that this process may still take under its limits (ulimit -v and -d); empty without any."""
    left = []
    with suppress(OSError, ValueError):
        limits = (process / "limits").read_text(encoding="ascii")
        status = dict(line.split(":", 1) for line in (process / "status").read_text(encoding="utf-8").splitlines())
        for name, usage, share in _LIMITS:
            if found := re.search(rf"^{name} +(\d+)", limits, re.MULTILINE):
                left.append(int(share * (int(found[1]) - 1024 * int(status[usage].split()[0]))))
    return left


def _left_in(group: Path, first_version: bool) -> int:
    """Return the bytes that a control group and every group below it may still take; page cache counts as free."""
    usage, caches, limits = _CGROUP_FILES[first_version]
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        stat = dict(line.split() for line in lines if line)
        used = int((group / usage).read_text(encoding="ascii")) - sum(int(stat[cache]) for cache in caches)
        texts = [(group / name).read_text(encoding="ascii").strip() for name in limits]
        return min((int(text) - used for text in texts if text != "max"), default=_UNLIMITED)
    except (OSError, KeyError, ValueError):
        return _UNLIMITED


def check_host(needs: MemoryNeeds, placement: str, keeps_dense: bool, free: int) -> None:
    """Raise a UserError unless what waits on the host of an accelerator fits into its ``free`` bytes.

    ``keeps_dense``: whether the dense model's last states of a model in memory are computed and kept.
    """
    needed = needs.host + (needs.host_windows if placement == "stream" else keeps_dense * needs.host_dense)
    if needed > free:
        raise UserError(
            f"{needed / 1e9:.1f} GB wait in the memory of the host while the model is pruned, where {free / 1e9:.1f} "
            "GB are free; take calibration.cache=disk or device, fewer or shorter sequences, or retrain.loss=next_token"
        )


def choose_placement(requested: str, needs: MemoryNeeds, free: int) -> tuple[str, str]:
    """Choose the placement, ``resident`` or ``stream``; return it and the sizes in one line.

    Args:
        requested: ``auto``, ``resident`` or ``stream``.
        needs: of the run.
        free: bytes available.

    Raises:
        UserError: it fits in neither way; the message holds the numbers.
    """
    sizes = f"{needs.summary()}, {free / 1e9:.1f} GB are free"
    smallest = min(needs.resident, needs.streamed)
    needed = {"resident": needs.resident, "stream": needs.streamed, "auto": smallest}[requested]
    if needed > free:
        raise UserError(
            f"model.placement={requested}: this run needs {sizes} ({needs.parts()}); take fewer or shorter sequences, "
            "a smaller batch, calibration.cache=disk, model.dtype=bfloat16, or a larger machine"
        )
    exceeds = needs.resident > _SHARE * free and needs.streamed <= free
    if requested == "stream" or (requested == "auto" and exceeds):
        return "stream", f"the model is read block by block: {sizes} ({needs.parts()})"
    return "resident", sizes
