"""What a run writes down while it prunes, so that it can go on behind its last block: what was done, the masks, where the activations stand."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dass_exp.engine.block_report import BlockReport
from dass_exp.engine.capture import Batch, put
from dass_exp.engine.verify import Layer, verify
from dass_exp.errors import UserError
from dass_exp.evaluate.streamed import StreamedPerplexity
from dass_exp.masks import Pattern
from dass_exp.runs.progress import Step, load_step, save_step
from dass_exp.storage.durable import write_tensors
from dass_exp.storage.mask_file import PackedMask, mask_names, read_packed, write_masks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keeps:
    """What a journal holds.

    Args:
        state: after each block, whatever is needed to go on.
        masks: of each block.
        blocks: whose weights belong to the state, since a model in memory is gone with its run; empty where something else keeps them.
    """

    state: bool
    masks: bool
    blocks: Sequence[nn.Module] = ()


@dataclass
class Journal:
    """The journal of one run, in a folder of its own. Files of a block are on the disk before the state that counts it as done.

    Args:
        folder: where it lies.
        identity: of the run.
        placement: ``resident`` or ``stream``.
        keeps: what it holds.
        beside: what is scored on the way, if anything is.
        layers: verified, one a linear.
        starved: experts that saw too few tokens.

    Raises:
        UserError: the folder holds the journal of a run with other settings, or a damaged one.
    """

    folder: Path
    identity: Mapping[str, Any]
    placement: str
    keeps: Keeps
    beside: StreamedPerplexity | None = None
    layers: list[Layer] = field(default_factory=list)
    starved: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._start, self._spent = time.perf_counter(), dict.fromkeys(("prune", "dense", "pruned"), 0.0)
        self._step = load_step(self.folder, self.identity, self.placement)
        if (
            self._step is not None
            and self.keeps.masks
            and not all(self._masks(index).is_file() for index in range(self._step.blocks))
        ):
            log.warning("%s: the interrupted run kept no masks, so the run begins again", self.folder)
            self._step = None
        if self._step is not None:
            self.layers += [Layer(**layer) for layer in self._step.told["layers"]]
            self.starved += self._step.told["starved"]
            self._spent = self._step.told["seconds"]
        for index in range(self.blocks if self.keeps.masks else 0):
            with self._explained(self._masks(index)):
                mask_names(self._masks(index))  # a damaged file is found before the work, not behind it
        self._written = self.blocks

    @property
    def returns_tuple(self) -> bool | None:
        """As :class:`dass_exp.runs.progress.Progress` has it."""
        return None if self._step is None else self._step.returns_tuple

    @property
    def blocks(self) -> int:
        """How many blocks an earlier start has done."""
        return 0 if self._step is None else self._step.blocks

    @property
    def seconds(self) -> dict[str, float]:
        """What ``prune``, and scoring the ``dense`` and the ``pruned`` model, took so far, earlier starts included."""
        return {**self._spent, "prune": self._spent["prune"] + time.perf_counter() - self._start}

    @contextmanager
    def scoring(self, whose: str) -> Iterator[None]:
        """What is done while it is open is no pruning, but scoring of the ``dense`` or the ``pruned`` model."""
        start = time.perf_counter()
        yield
        self._spent[whose] += time.perf_counter() - start
        self._spent["prune"] -= time.perf_counter() - start

    def begin(self, batches: Sequence[Batch]) -> int:
        """As :class:`dass_exp.runs.progress.Progress` has it."""
        if self._step is None:
            return 0
        if batches:
            put(batches, self._step.hidden["calibration"])
        if self.beside is not None:
            self.beside.hidden = self._step.hidden
        for index, block in enumerate(self.keeps.blocks[: self.blocks]):
            with self._explained(self._weights(index)):
                block.load_state_dict(load_file(self._weights(index)))
        self._step.hidden.clear()
        log.info("going on behind block %d of an interrupted run", self.blocks - 1)
        return self.blocks

    def note(self, report: BlockReport, pattern: Pattern) -> None:
        """Verify a block that was pruned, and write its masks down."""
        self.layers.extend(verify(report, pattern))
        self.starved.extend(report.starved)
        if self.keeps.masks:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_masks(
                {name: PackedMask.of(cut.keep) for name, cut in report.cuts.items()}, self._masks(self._written)
            )
            self._written += 1

    def done(self, index: int, batches: Sequence[Batch]) -> None:
        """As :class:`dass_exp.runs.progress.Progress` has it."""
        if not self.keeps.state:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.keeps.blocks:
            write_tensors(self.keeps.blocks[index].state_dict(), self._weights(index))
        hidden = {"calibration": [batch.held.at_rest() for batch in batches]} if batches else {}
        hidden |= self.beside.hidden if self.beside is not None else {}
        returns_tuple = (
            batches[0].returns_tuple if batches else self.beside.returns_tuple if self.beside is not None else False
        )
        told = {
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "starved": self.starved,
            "seconds": self.seconds,
        }
        save_step(self.folder, self.identity, self.placement, Step(index + 1, returns_tuple, hidden, told))

    def masks(self) -> dict[str, PackedMask] | None:
        """Of all blocks, by linear, mapped from their files; None where they are not kept."""
        if not self.keeps.masks:
            return None
        found: dict[str, PackedMask] = {}
        for index in range(self._written):
            with self._explained(self._masks(index)):
                found |= read_packed(self._masks(index))
        return found

    @contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, RuntimeError, UserError) as error:
            raise UserError(
                f"{path} is missing or damaged, and the run that wrote it cannot go on; remove {self.folder} to begin again"
            ) from error

    def _masks(self, index: int) -> Path:
        return self.folder / f"masks-{index:05d}.safetensors"

    def _weights(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"
