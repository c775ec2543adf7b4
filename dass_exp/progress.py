"""How far a run has come, on disk: after each block, what is needed to go on from there is replaced as a whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dass_exp.capture import Batch
from dass_exp.errors import UserError
from dass_exp.schema import flattened

STATE = "state.safetensors"


class Progress(Protocol):
    """Asked where a run is to begin, and told after each block."""

    @property
    def wrapped(self) -> bool | None:
        """Whether blocks give a tuple; None where no earlier run found out."""

    def begin(self, batches: Sequence[Batch]) -> int:
        """Put the hidden states of an earlier run into ``batches``; the index of the first block that is still to be done."""

    def done(self, index: int, batches: Sequence[Batch]) -> None:
        """Block ``index`` is done, and ``batches`` are behind it."""


class FromTheStart:
    """Nothing is kept."""

    wrapped: bool | None = None

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
        wrapped: whether blocks give a tuple.
        hidden: by whose they are, [sequences, tokens, features]: one tensor whatever the batch size.
        told: what was found out about the blocks that are done, as JSON holds it.
    """

    blocks: int
    wrapped: bool
    hidden: dict[str, Tensor]
    told: dict[str, Any] = field(default_factory=dict)


def load_step(folder: Path, identity: Mapping[str, Any]) -> Step | None:
    """The state of an earlier run in ``folder``; None where there is none.

    Args:
        folder: where it lies.
        identity: of this run, as its record will hold it.

    Raises:
        UserError: it is of a run with other settings, which are named, or it is damaged.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            known = json.loads(file.metadata()["dass_exp"])
            if known["identity"] != json.loads(json.dumps(identity)):
                raise UserError(
                    f"{folder}: an interrupted run lies there that had {_differences(known['identity'], identity)}; set it back, or remove the folder"
                )
            hidden = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return Step(known["blocks"], known["wrapped"], hidden, known["told"])
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: the state of an interrupted run cannot be read ({error}); remove the folder to begin again") from error


def is_of(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the state of a run with this identity lies in ``folder``."""
    try:
        with safe_open(folder / STATE, framework="pt") as file:
            return bool(json.loads(file.metadata()["dass_exp"])["identity"] == json.loads(json.dumps(identity)))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return False


def save_step(folder: Path, identity: Mapping[str, Any], step: Step) -> None:
    """Replace the state in ``folder``, durably.

    Raises:
        OSError: the disk is full.
    """
    scratch = folder / f"{STATE}.partial"
    about = {"identity": identity, "blocks": step.blocks, "wrapped": step.wrapped, "told": step.told}
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in step.hidden.items()}, scratch, {"dass_exp": json.dumps(about)})
    except SafetensorError as error:
        raise OSError(f"{scratch}: {error}") from error
    with scratch.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(scratch, folder / STATE)


def discard(folder: Path) -> None:
    """Let the state of a finished run go: first that which says that there is one, so that a kill in between leaves nothing to stumble over."""
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    flat = [flattened(part) for part in (before, now)]
    names = sorted(name for name in {*flat[0], *flat[1]} if flat[0].get(name) != flat[1].get(name))
    return ", ".join(f"{name}={flat[0].get(name)} (now {flat[1].get(name)})" for name in names)
