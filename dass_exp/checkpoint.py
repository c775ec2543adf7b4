"""Save a pruned model as others load it: dense safetensors with its zeros, tokenizer, packed masks, and a manifest that says how it was made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dass_exp.assets import temporary_folder
from dass_exp.digest import MANIFEST, manifest_of
from dass_exp.errors import UserError
from dass_exp.maskfile import MASKS, PackedMask, write_masks
from dass_exp.record import write_json

_SPARE = 1 << 28  # bytes that must stay free beside the weights: tokenizer, masks, and room for other programs


def is_saved(folder: str | Path, key: str) -> bool:
    """Whether the checkpoint of this run lies in ``folder``. It is renamed into place when it is whole, so a folder that is there is.

    Raises:
        UserError: something else lies there.
    """
    place = Path(folder).expanduser()
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return False
    if (found := manifest_of(place).get("key")) == key:
        return True
    what = f"the checkpoint of run {found}" if found else "what is no checkpoint of this project"
    raise UserError(f"save={folder}: it holds {what}; remove it or name another folder")


def check_room(folder: str | Path, model: Any) -> None:
    """See that the weights fit on the disk.

    Raises:
        UserError: they do not.
    """
    place = Path(folder).expanduser().absolute()
    there = next(parent for parent in (place, *place.parents) if parent.exists())
    needed, free = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters()) + _SPARE, shutil.disk_usage(there).free
    if needed > free:
        raise UserError(f"save={folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free on that disk; make room or name another folder")


def save_checkpoint(folder: str | Path, model: Any, tokenizer: Any, masks: Mapping[str, PackedMask], manifest: Mapping[str, Any]) -> Path:
    """Write a model as ``from_pretrained`` loads it, under a temporary name beside its place, synced, then renamed.

    Its config.json says nothing of sparsity: servers refuse a ``sparsity_config``.

    Args:
        folder: where it will lie; one of the same run is replaced.
        model: a transformers causal language model.
        tokenizer: of the model.
        masks: by linear.
        manifest: ``key`` of the run, ``told`` in a line, and whatever else a reader should know.

    Raises:
        OSError: the disk is full, or the folder cannot be written to; nothing is left behind.
    """
    place = Path(folder).expanduser().absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(place.parent) as scratch:
        made = scratch / "made"
        try:
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
        except SafetensorError as error:
            raise OSError(f"{place}: {error}") from error
        write_masks(masks, made / MASKS)
        for path in made.iterdir():
            path.chmod(0o644)  # safetensors makes files that only their owner can read
            with path.open("rb") as file:
                os.fsync(file.fileno())
        write_json(made / MANIFEST, {"schema": 1, **manifest})
        if place.exists():
            place.rename(scratch / "before")
        made.rename(place)
    return place
