"""Save a pruned model as others load it: dense safetensors with its zeros, tokenizer, packed masks, and a manifest that says how it was made."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.dynamic_module_utils import custom_object_save

from dass_exp.errors import UserError
from dass_exp.models.locate import MANIFEST, manifest_of
from dass_exp.models.shards import INDEX
from dass_exp.runs.progress import BEFORE, STATE
from dass_exp.storage.durable import as_os_error, sync, write_tensors
from dass_exp.storage.mask_file import MASKS, PackedMask, write_masks
from dass_exp.storage.records import write_json

_SPARE = 1 << 28  # bytes that must stay free beside the weights: tokenizer, masks, and room for other programs


def is_saved(folder: str | Path, key: str) -> bool:
    """Whether the checkpoint of this run lies in ``folder``. It is renamed into place when it is whole, so a folder that is there is.

    Raises:
        UserError: something else lies there.
    """
    place = place_of(folder)
    if place.is_mount():
        raise UserError(f"save={folder}: it is a mount point, which cannot be renamed into; name a folder inside it")
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return False
    if (found := manifest_of(place).get("key")) == key:
        return True
    what = f"the checkpoint of run {found}" if found else "what is no checkpoint of this project"
    raise UserError(f"save={folder}: it holds {what}; remove it or name another folder")


@contextmanager
def writing(folder: str | Path | None) -> Iterator[None]:
    """Hold a folder against other runs that would save into it.

    Raises:
        UserError: another run holds it.
    """
    if folder is None:
        yield
        return
    lock = scratch_of(folder).with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            try:
                _put_back(place_of(folder), scratch_of(folder) / BEFORE)
                yield
            finally:
                with suppress(OSError):
                    lock.unlink()  # only by who holds it: a run that was turned away must not let the next one in
    except Timeout as error:
        raise UserError(f"save={folder}: another run is writing to it; wait for it, or name another folder") from error


def check_room(folder: str | Path, size: int) -> None:
    """See that so many bytes of weights fit on the disk.

    Raises:
        UserError: they do not.
    """
    place = place_of(folder)
    there = next(parent for parent in (place, *place.parents) if parent.exists())
    needed, free = size + _SPARE, shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"save={folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free on that disk; make room or name another folder"
        )


def save_checkpoint(
    folder: str | Path, model: Any, tokenizer: Any, masks: Mapping[str, PackedMask], manifest: Mapping[str, Any]
) -> Path:
    """Write a model as ``from_pretrained`` loads it, into :func:`scratch_of` the folder, synced, then renamed.

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
    place = place_of(folder)
    made = scratch_of(folder) / "made"
    shutil.rmtree(made, ignore_errors=True)  # of a run that was killed
    made.mkdir(parents=True)
    try:
        with as_os_error(place):
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
        return _put_inplace_of(made, place, masks, manifest)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        with suppress(OSError):
            made.parent.rmdir()  # unless the state of the run lies there


class CheckpointWriter:
    """A checkpoint that is written while a model is read: a file for each block, in another folder until it is whole.

    Args:
        folder: where it will lie; one of the same run is replaced.
        scratch: where it grows, on the same disk; what is there already is gone on with.
    """

    def __init__(self, folder: str | Path, scratch: Path) -> None:
        self.folder = folder
        self._scratch = scratch
        self._made = scratch / "made"
        self._stored: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
        self._files: dict[str, str] = {}
        self._blocks, self._bytes = 0, 0

    @property
    def written(self) -> int:
        """Bytes of blocks that an earlier run has written."""
        return sum(path.stat().st_size for path in self._made.glob("model-*.safetensors"))

    def placed(self, key: str) -> bool:
        """Whether the checkpoint of this run is in place, and what it grew from is still there."""
        return (self._scratch / STATE).is_file() and not self._made.exists() and is_saved(self.folder, key)

    def begin(self, stored: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], blocks: int, done: int = 0) -> None:
        """What is to be written.

        Args:
            stored: gives tensors of the model, by its own names, as a checkpoint holds them, by the names there.
            blocks: how many blocks there are.
            done: how many of them an earlier run has written.

        Raises:
            UserError: one of those is not there any more.
        """
        self._stored, self._blocks = stored, blocks
        if not done:
            shutil.rmtree(self._made, ignore_errors=True)  # of a run that was killed before it had a state
        self._made.mkdir(parents=True, exist_ok=True)
        for index in range(done):
            path = self._made / self._name(index + 2)
            if not path.is_file():
                raise UserError(
                    f"{path} is missing, and the run that wrote it cannot go on; remove {self._scratch} to begin again"
                )
            try:
                with safe_open(path, framework="pt") as file:
                    self._note(path.name, {name: file.get_tensor(name) for name in file.keys()})
            except SafetensorError as error:
                raise UserError(
                    f"{path} is damaged ({error}), and the run that wrote it cannot go on; remove {self._scratch} to begin again"
                ) from error

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
        self._write(1, {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta})
        write_json(self._made / INDEX, {"metadata": {"total_size": self._bytes}, "weight_map": self._files})
        model.config.architectures = [type(model).__name__]
        with as_os_error(self._made):
            if model._auto_class is not None:
                custom_object_save(model, self._made, config=model.config)
            model.config.save_pretrained(self._made)
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.save_pretrained(self._made)
            tokenizer.save_pretrained(self._made)
        return _put_inplace_of(self._made, place_of(self.folder), masks, manifest)

    def _name(self, number: int) -> str:
        return f"model-{number:05d}-of-{self._blocks + 1:05d}.safetensors"

    def _write(self, number: int, weights: Mapping[str, Tensor]) -> None:
        name = self._name(number)
        stored = self._stored(weights)
        write_tensors(stored, self._made / name, {"format": "pt"})
        self._note(name, stored)

    def _note(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        self._files |= dict.fromkeys(tensors, file)
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def place_of(folder: str | Path) -> Path:
    """Where a folder really lies: a link is followed, so that the disk behind it is the one that is filled."""
    return Path(folder).expanduser().resolve()


def scratch_of(folder: str | Path) -> Path:
    """Where a checkpoint grows: beside its place, so that it can be renamed into it."""
    place = place_of(folder)
    return place.with_name(f".{place.name}.partial")


def _put_inplace_of(made: Path, place: Path, masks: Mapping[str, PackedMask], manifest: Mapping[str, Any]) -> Path:
    """Add masks and manifest, sync, rename; a checkpoint that was there before goes."""
    write_masks(masks, made / MASKS)
    for path in (path for path in made.rglob("*") if path.is_file()):
        path.chmod(0o644)  # safetensors makes files that only their owner can read
        sync(path)
    write_json(made / MANIFEST, {"schema": 1, **manifest})
    is_saved(place, manifest["key"])  # whatever else has come to lie there meanwhile is not ours
    before = made.with_name(BEFORE)
    shutil.rmtree(before, ignore_errors=True)
    if place.exists():
        place.rename(before)
    try:
        made.rename(place)
    finally:
        _put_back(place, before)
    with suppress(OSError):
        sync(place.parent)
    shutil.rmtree(before, ignore_errors=True)
    return place


def _put_back(place: Path, before: Path) -> None:
    """The checkpoint that was to be replaced is there again, if nothing has taken its place."""
    if before.exists() and not place.exists():
        before.rename(place)
