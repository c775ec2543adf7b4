"""How far a run has come, on disk: after each block, what is needed to go on from there is replaced as a whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dass_exp.engine.capture import Batch
from dass_exp.errors import UserError
from dass_exp.storage.durable import settle, write_tensors
from dass_exp.storage.record_schema import flattened

STATE = "state.safetensors"
BEFORE = "before"  # a checkpoint while it is replaced, which nobody may remove
_PLACEMENT = "model.placement"


class Progress(Protocol):
    """Asked where a run is to begin, and told after each block."""

    @property
    def returns_tuple(self) -> bool | None:
        """Whether blocks give a tuple; None where no earlier run found out."""

    def begin(self, batches: Sequence[Batch]) -> int:
        """Put the hidden states of an earlier run into ``batches``; the index of the first block that is still to be done."""

    def done(self, index: int, batches: Sequence[Batch]) -> None:
        """Block ``index`` is done, and ``batches`` are behind it."""


class FromTheStart:
    """Nothing is kept."""

    returns_tuple: bool | None = None

    def begin(self, batches: Sequence[Batch]) -> int:
        """The first block."""
        del batches
        return 0

    def done(self, index: int, batches: Sequence[Batch]) -> None:
        """Nothing to keep."""


@dataclass
class Step:
    """The state behind some blocks.

    Args:
        blocks: how many are done.
        returns_tuple: whether blocks give a tuple.
        hidden: hidden states by whose they are, [sequences, tokens, features], a tensor for each batch; another run may cut its batches otherwise.
        told: what was found out about the blocks that are done, as JSON holds it.
    """

    blocks: int
    returns_tuple: bool
    hidden: dict[str, list[Tensor]]
    told: dict[str, Any] = field(default_factory=dict)


def load_step(folder: Path, identity: Mapping[str, Any], placement: str) -> Step | None:
    """The state of an earlier run in ``folder``, its tensors mapped; None where there is none.

    Args:
        folder: where it lies.
        identity: of this run, as its record will hold it.
        placement: of this run: a model that is in memory and one that is read block by block leave different things behind.

    Raises:
        UserError: it is of a run with other settings, which are named, or it is damaged.
    """
    path, wanted = folder / STATE, _wanted(identity, placement)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            known = json.loads(file.metadata()["dass_exp"])
            if known["identity"] != wanted:
                raise UserError(
                    f"{folder}: an interrupted run lies there that had {_differences(known['identity'], wanted)}; set it back, or remove the folder"
                )
            hidden: dict[str, list[Tensor]] = {}
            for name in sorted(file.keys()):
                hidden.setdefault(name.rpartition("/")[0], []).append(file.get_tensor(name))
            return Step(known["blocks"], known["returns_tuple"], hidden, known["told"])
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: the state of an interrupted run cannot be read ({error}); remove the folder to begin again"
        ) from error


def placement_of(folder: Path, identity: Mapping[str, Any]) -> str | None:
    """Where the model went in the run with this identity whose state lies in ``folder``; None where no such state is."""
    try:
        with safe_open(folder / STATE, framework="pt") as file:
            known = json.loads(file.metadata()["dass_exp"])["identity"]
            placement = str(known[_PLACEMENT])
            return placement if known == _wanted(identity, placement) else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def save_step(folder: Path, identity: Mapping[str, Any], placement: str, step: Step) -> None:
    """Replace the state in ``folder``, durably.

    Raises:
        OSError: the disk is full.
    """
    scratch = folder / f"{STATE}.partial"
    about = {
        "identity": _wanted(identity, placement),
        "blocks": step.blocks,
        "returns_tuple": step.returns_tuple,
        "told": step.told,
    }
    hidden = {
        f"{whose}/{number:08d}": tensor
        for whose, tensors in step.hidden.items()
        for number, tensor in enumerate(tensors)
    }
    write_tensors(hidden, scratch, {"dass_exp": json.dumps(about)}, durable=False)
    settle(scratch, folder / STATE)


def _wanted(identity: Mapping[str, Any], placement: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps({**identity, _PLACEMENT: placement}))
    return found


def discard(folder: Path) -> None:
    """Let the state of a finished run go: first that which says that there is one, so that a kill in between leaves nothing to stumble over."""
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Remove what a run wrote down on its way, unless another start could go on with it."""
    if not (folder / STATE).is_file() and not (folder / BEFORE).exists():
        discard(folder)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    flat = [flattened(part) for part in (before, now)]
    names = sorted(name for name in {*flat[0], *flat[1]} if flat[0].get(name) != flat[1].get(name))
    return ", ".join(f"{name}={flat[0].get(name)} (now {flat[1].get(name)})" for name in names)
