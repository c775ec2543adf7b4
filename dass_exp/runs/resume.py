"""Keep on disk what a run needs to continue after its last finished block: results so far, masks, hidden states."""

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dass_exp.engine.callbacks import BlockReport, Callback, LoopState, Stopwatch
from dass_exp.engine.capture import restore_hidden
from dass_exp.engine.verify import Layer, LoadedZeros, Verification
from dass_exp.errors import DamagedFileError, UserError
from dass_exp.evaluate.streamed import StreamedPerplexity
from dass_exp.methods.base import LinearView
from dass_exp.models.save import REPLACED
from dass_exp.retrain.checkpoints import is_resumable
from dass_exp.runs.resolved_run import ResolvedRun
from dass_exp.storage.checksum import require_regular
from dass_exp.storage.mask_file import PackedMask, read_packed, write_masks
from dass_exp.storage.record_schema import flatten
from dass_exp.storage.tensor_file import read_tensors, write_tensors

log = logging.getLogger(__name__)

STATE = "state.safetensors"
TRAINING = "training"  # the folder of the checkpoints of a retraining
_PLACEMENT = "model.placement"
_SLOW_S = 1.0  # seconds; a state that is written faster is written behind every block
# no other is written for so many times as long as a slow one took, but for ten minutes at the most
_SHARE, _LONGEST_S = 9, 600.0


@dataclass
class State:
    """The state of a run after some blocks.

    Args:
        blocks: how many are done.
        returns_tuple: whether blocks return a tuple.
        hidden: hidden states [sequences, tokens, features] of the calibration sequences and of the scored windows, by
            name, one tensor per batch; a later start may use other batch sizes.
        results: ``layers``, ``starved`` and ``seconds`` so far, as JSON values.
    """

    blocks: int
    returns_tuple: bool
    hidden: dict[str, list[Tensor]]
    results: dict[str, Any] = field(default_factory=dict)


def load_state(folder: Path, identity: Mapping[str, Any], placement: str) -> State | None:
    """Load the state of an earlier start from ``folder``, its tensors memory-mapped; None if there is none.

    Args:
        folder: the work folder.
        identity: of this run, as its record will hold it.
        placement: of this run; a resident and a streamed model leave different files behind.

    Raises:
        UserError: it belongs to a run with other settings, which are named, or it is damaged.
    """
    path, expected = folder / STATE, _with_placement(identity, placement)
    if not os.path.lexists(path):
        return None
    with as_user_error(path, folder):
        tensors, metadata = read_tensors(path)
        stored = json.loads(metadata["dass_exp"])
    if stored["identity"] != expected:
        raise UserError(
            f"{folder}: an interrupted run is stored there with {_differences(stored['identity'], expected)}; "
            "set it back, or remove the folder"
        )
    hidden: dict[str, list[Tensor]] = {}
    for name in sorted(tensors):
        hidden.setdefault(name.rpartition("/")[0], []).append(tensors[name])
    return State(stored["blocks"], stored["returns_tuple"], hidden, stored["results"])


def placement_in(folder: Path, identity: Mapping[str, Any]) -> str | None:
    """Return the placement of an interrupted run with this identity in ``folder``; None if there is none."""
    try:
        require_regular(folder / STATE)
        with safe_open(folder / STATE, framework="pt") as file:
            stored = json.loads(file.metadata()["dass_exp"])["identity"]
            placement = str(stored[_PLACEMENT])
            return placement if stored == _with_placement(identity, placement) else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def save_state(folder: Path, identity: Mapping[str, Any], placement: str, state: State) -> None:
    """Replace the state in ``folder`` durably.

    Raises:
        OSError: the disk is full.
    """
    metadata = {
        "identity": _with_placement(identity, placement),
        "blocks": state.blocks,
        "returns_tuple": state.returns_tuple,
        "results": state.results,
    }
    hidden = {
        f"{owner}/{number:08d}": tensor
        for owner, tensors in state.hidden.items()
        for number, tensor in enumerate(tensors)
    }
    write_tensors(hidden, folder / STATE, {"dass_exp": json.dumps(metadata)})


def discard(folder: Path) -> None:
    """Delete a work folder; the state goes first, so that a kill in between leaves nothing to resume from."""
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def discard_unless_resumable(folder: Path) -> None:
    """Delete a work folder unless another start could resume from it, or it holds a replaced checkpoint."""
    kept = os.path.lexists(folder / STATE) or (folder / REPLACED).exists() or is_resumable(folder / TRAINING)
    if not kept:
        discard(folder)


class MaskFiles(Callback):
    """Write the masks of each block to a file of its own.

    Args:
        folder: the work folder.
        done: blocks whose masks an earlier start has written.

    Raises:
        UserError: one of those files is damaged.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        self._folder, self._blocks = folder, done
        for index in range(done):
            with as_user_error(_masks_file(folder, index), folder):
                read_packed(_masks_file(folder, index))

    @staticmethod
    def complete(folder: Path, blocks: int) -> bool:
        """Check whether the masks of the first ``blocks`` blocks were written."""
        return all(os.path.lexists(_masks_file(folder, index)) for index in range(blocks))

    def on_block_end(self, report: BlockReport) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        masks = {linear.name: _packed(report, linear) for linear in report.linears}
        write_masks(masks, _masks_file(self._folder, report.index))
        self._blocks = report.index + 1

    def read(self) -> dict[str, PackedMask]:
        """Return all masks by linear, memory-mapped."""
        masks: dict[str, PackedMask] = {}
        for index in range(self._blocks):
            with as_user_error(_masks_file(self._folder, index), self._folder):
                masks |= read_packed(_masks_file(self._folder, index))
        return masks


def _packed(report: BlockReport, linear: LinearView) -> PackedMask:
    """Pack the mask of a linear, with the order of its rows or columns if it was changed."""
    keep = report.results[linear.name].keep
    if linear.name not in report.orders:
        return PackedMask.pack(keep)
    axis, order = report.orders[linear.name]
    return PackedMask.pack(keep, order, axis)


class ResumeState(Callback):
    """Write the state after a block, and continue from that of an earlier start.

    Files of a block are on disk before the state that counts it as done, so it is the last callback that writes.
    Hidden states of a large model take longer to write than a block takes to prune: after a state that took more than
    a second, none is written for nine times as long, ten minutes at the most, but behind the last block.

    Args:
        run: gives work folder, identity, placement, and whether to keep a state.
        earlier: the state of an earlier start.
        verification, scorers, stopwatch, loaded: whose results belong to the state; scorers by name of their windows.
    """

    def __init__(
        self,
        run: ResolvedRun,
        earlier: State | None,
        verification: Verification,
        scorers: Mapping[str, StreamedPerplexity],
        stopwatch: Stopwatch,
        loaded: LoadedZeros,
    ) -> None:
        self._run, self._earlier, self._folder = run, earlier, run.work_folder
        self._verification, self._stopwatch, self._loaded = verification, stopwatch, loaded
        # the hidden states of the first set have no prefix, as before there were several
        self._scorers = {f"{name}: " * (number > 0): scorer for number, (name, scorer) in enumerate(scorers.items())}
        self._loop: LoopState | None = None
        self._next_at = 0.0  # on the clock of time.perf_counter
        self._stored = 0  # blocks whose weights are on disk
        if earlier is not None:
            verification.layers += [Layer(**layer) for layer in earlier.results["layers"]]
            verification.starved += earlier.results["starved"]
            stopwatch.add(earlier.results["seconds"])
            self._loaded.matrices += map(tuple, earlier.results.get("loaded_zeros", ()))
            self._loaded.counts = bool(self._loaded.matrices)  # a state of an earlier version has not counted them

    def on_start(self, loop: LoopState) -> None:
        self._loop = loop
        if (earlier := self._earlier) is None:
            return
        if loop.batches:
            restore_hidden(loop.batches, earlier.hidden["calibration"])
        for prefix, scorer in self._scorers.items():
            own = {name: parts for name, parts in earlier.hidden.items() if name.startswith(prefix)}
            scorer.hidden = {name.removeprefix(prefix): parts for name, parts in own.items()}
        if not self._run.streams:
            for index, block in enumerate(loop.decoder.blocks[: earlier.blocks]):
                with as_user_error(_weights_file(self._folder, index), self._folder):
                    block.load_state_dict(read_tensors(_weights_file(self._folder, index))[0])
        loop.first_block = self._stored = earlier.blocks
        earlier.hidden.clear()
        log.info("continuing after block %d of an interrupted run", earlier.blocks - 1)

    def on_block_end(self, report: BlockReport) -> None:
        if not self._run.resumable or self._loop is None:
            return
        start, blocks = time.perf_counter(), self._loop.decoder.blocks
        if start < self._next_at and report.index + 1 < len(blocks):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        if not self._run.streams:  # a streamed block is in the growing checkpoint, if it is saved at all
            for index in range(self._stored, report.index + 1):
                write_tensors(blocks[index].state_dict(), _weights_file(self._folder, index))
            self._stored = report.index + 1
        save_state(self._folder, self._run.identity, str(self._run.placement), self._state(report, self._loop))
        seconds = time.perf_counter() - start
        if seconds > _SLOW_S:
            self._next_at = start + seconds + min(_SHARE * seconds, _LONGEST_S)

    def _state(self, report: BlockReport, loop: LoopState) -> State:
        batches = loop.batches
        hidden = {"calibration": [batch.cached.stored() for batch in batches]} if batches else {}
        for prefix, scorer in self._scorers.items():
            hidden |= {prefix + name: parts for name, parts in scorer.hidden.items()}
        known = [batches[0].returns_tuple] if batches else [scorer.returns_tuple for scorer in self._scorers.values()]
        returns_tuple = next(iter(known), False)
        results = {
            "layers": [dataclasses.asdict(layer) for layer in self._verification.layers],
            "starved": self._verification.starved,
            "seconds": self._stopwatch.read(),
            "loaded_zeros": self._loaded.matrices,
        }
        return State(report.index + 1, returns_tuple, hidden, results)


@contextmanager
def as_user_error(path: Path, folder: Path) -> Iterator[None]:
    """Turn the errors of a missing or damaged file of an interrupted run into a one-line DamagedFileError."""
    try:
        yield
    except (OSError, RuntimeError, UserError, KeyError) as error:
        raise DamagedFileError(
            f"{path} is missing or damaged, and the run that wrote it cannot go on; remove {folder} to begin again"
        ) from error


def _masks_file(folder: Path, index: int) -> Path:
    return folder / f"masks-{index:05d}.safetensors"


def _weights_file(folder: Path, index: int) -> Path:
    return folder / f"block-{index:05d}.safetensors"


def _with_placement(identity: Mapping[str, Any], placement: str) -> dict[str, Any]:
    """Return the identity with the placement, as it is read back from JSON."""
    tagged: dict[str, Any] = json.loads(json.dumps({**identity, _PLACEMENT: placement}))
    return tagged


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = flatten(before), flatten(now)
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return ", ".join(f"{name}={old.get(name)} (now {new.get(name)})" for name in names)
