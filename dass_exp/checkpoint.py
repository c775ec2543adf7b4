"""Save a pruned model as others load it: dense safetensors with its zeros, tokenizer, packed masks, and a manifest that says how it was made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dass_exp.assets import temporary_folder
from dass_exp.digest import MANIFEST, manifest_of
from dass_exp.errors import UserError
from dass_exp.maskfile import MASKS, PackedMask, write_masks
from dass_exp.record import write_json
from dass_exp.shards import INDEX

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
    with _made(folder) as (made, finish):
        with _as_os_error(Path(folder)):
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
        return finish(masks, manifest)


class Growing:
    """A checkpoint that is written while a model is read: a file for each block, under a temporary name until it is whole.

    Args:
        folder: where it will lie; one of the same run is replaced.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder
        self._made: Path = Path()
        self._finish: Callable[[Mapping[str, PackedMask], Mapping[str, Any]], Path] | None = None
        self._stored: Mapping[str, str] = {}
        self._files: dict[str, str] = {}
        self._blocks, self._bytes = 0, 0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While it is open, blocks may be added; what was not finished at the end is removed."""
        with _made(self.folder) as (made, finish):
            made.mkdir()
            self._made, self._finish = made, finish
            yield

    def begin(self, stored: Mapping[str, str], blocks: int) -> None:
        """What is to be written.

        Args:
            stored: by the model's own name of each tensor, the one under which checkpoints hold it.
            blocks: how many blocks will be added.
        """
        self._stored, self._blocks = stored, blocks

    def add(self, index: int, weights: Mapping[str, Tensor]) -> None:
        """Write the weights of a block, by the model's own names.

        Raises:
            OSError: the disk is full.
        """
        self._write(index + 2, weights)

    def finish(self, model: Any, tokenizer: Any, masks: Mapping[str, PackedMask], manifest: Mapping[str, Any]) -> Path:
        """Write what lies outside the blocks, and rename the whole into place.

        Raises:
            OSError: the disk is full.
        """
        if self._finish is None:
            raise RuntimeError("finish() outside of opened()")
        written = set(self._files)
        self._write(1, {name: tensor for name, tensor in model.state_dict().items() if self._stored.get(name, name) not in written and name in self._stored})
        write_json(self._made / INDEX, {"metadata": {"total_size": self._bytes}, "weight_map": self._files})
        model.config.save_pretrained(self._made)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(self._made)
        tokenizer.save_pretrained(self._made)
        return self._finish(masks, manifest)

    def _write(self, number: int, weights: Mapping[str, Tensor]) -> None:
        name = f"model-{number:05d}-of-{self._blocks + 1:05d}.safetensors"
        kept = {self._stored[own]: tensor.detach().cpu().contiguous() for own, tensor in weights.items() if own in self._stored}
        with _as_os_error(self._made / name):
            save_file(kept, self._made / name, metadata={"format": "pt"})
        _sync(self._made / name)
        self._files |= dict.fromkeys(kept, name)
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


@contextmanager
def _made(folder: str | Path) -> Iterator[tuple[Path, Callable[[Mapping[str, PackedMask], Mapping[str, Any]], Path]]]:
    """A folder to fill, and what puts it into its place with masks and manifest; left without that, it is removed."""
    place = Path(folder).expanduser().absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(place.parent) as scratch:
        made = scratch / "made"

        def finish(masks: Mapping[str, PackedMask], manifest: Mapping[str, Any]) -> Path:
            write_masks(masks, made / MASKS)
            for path in made.iterdir():
                path.chmod(0o644)  # safetensors makes files that only their owner can read
                _sync(path)
            write_json(made / MANIFEST, {"schema": 1, **manifest})
            if place.exists():
                place.rename(scratch / "before")
            made.rename(place)
            return place

        yield made, finish


@contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """What safetensors raises on a full disk is its own."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
