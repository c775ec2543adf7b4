"""Save a pruned model as ``from_pretrained`` loads it: safetensors with zeros, tokenizer, packed masks, manifest."""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor
from transformers.dynamic_module_utils import custom_object_save

from dass_exp.errors import DamagedFileError, UserError
from dass_exp.models.folder import MANIFEST, manifest_of
from dass_exp.models.locate import quiet_libraries
from dass_exp.models.shards import INDEX
from dass_exp.paths import MASKS
from dass_exp.storage.checksum import file_digest
from dass_exp.storage.durable import (
    as_os_error,
    fsync,
    new_file_mode,
    refuse_links,
    remove_partial_files,
    write_json,
    write_text,
)
from dass_exp.storage.mask_file import PackedMask, write_masks
from dass_exp.storage.tensor_file import read_tensors, write_tensors

CARD = "README.md"
STAGING = "made"  # in a partial folder: the checkpoint that is being written
REPLACED = "before"  # in a partial folder: the checkpoint that is being replaced, which must not be deleted
_SPARE = 1 << 28  # bytes that must stay free besides the weights: tokenizer, masks, and room for other programs


def is_saved(folder: str | Path, key: str) -> bool:
    """Check whether ``folder`` holds the complete checkpoint of this run, which is moved there as a whole.

    Raises:
        UserError: the folder holds something else.
    """
    target = target_of(folder)
    if target.is_mount():
        raise UserError(f"save={folder}: it is a mount point, which cannot be renamed into; name a folder inside it")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if (saved := manifest_of(target).get("key")) == key:
        return True
    content = f"the checkpoint of run {saved}" if saved else "what is no checkpoint of this project"
    raise UserError(f"save={folder}: it holds {content}; remove it or name another folder")


@contextmanager
def locked(folder: str | Path | None) -> Iterator[None]:
    """Lock a save folder against other runs; None locks nothing.

    Raises:
        UserError: another run holds it, or a link stands where this one would write.
    """
    if folder is None:
        yield
        return
    partial = partial_folder_of(folder)
    lock = partial.with_suffix(".lock")
    for path in (lock, partial / STAGING, partial / REPLACED):
        refuse_links(path, partial.parent)
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            try:
                _restore_replaced(target_of(folder), partial / REPLACED)
                yield
            finally:
                with suppress(OSError):
                    lock.unlink()  # only by its holder: a run that was refused must not let the next one in
    except Timeout as error:
        raise UserError(f"save={folder}: another run is writing to it; wait for it, or name another folder") from error


def check_room(folder: str | Path, size: int) -> None:
    """Raise a UserError unless ``size`` bytes of weights fit on the disk of ``folder``."""
    target = target_of(folder)
    existing = next(parent for parent in (target, *target.parents) if parent.exists())
    needed, free = size + _SPARE, shutil.disk_usage(existing).free
    if needed > free:
        problem = f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free on that disk"
        raise UserError(f"save={folder}: {problem}; make room or name another folder")


def save_checkpoint(
    folder: str | Path, model: Any, tokenizer: Any, masks: Mapping[str, PackedMask], manifest: Mapping[str, Any]
) -> Path:
    """Write a model that is in memory to the partial folder, sync it, and rename it into place.

    A checkpoint of the same run is replaced. Its config.json says nothing of sparsity: servers refuse a
    ``sparsity_config``. ``masks`` are by linear; ``manifest`` has the ``key`` of the run, a one-line description
    ``told``, and more.

    Raises:
        OSError: the disk is full, or the folder is not writable; nothing is left behind.
    """
    target = target_of(folder)
    staging = partial_folder_of(folder) / STAGING
    shutil.rmtree(staging, ignore_errors=True)  # left by a killed run
    staging.mkdir(parents=True)
    try:
        with as_os_error(target), quiet_libraries():
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        return _move_into_place(staging, target, masks, manifest)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):
            staging.parent.rmdir()  # unless it holds the state of the run


class CheckpointWriter:
    """A checkpoint written block by block, one file each, in a partial folder until it is complete.

    Args:
        folder: the target; a checkpoint of the same run is replaced.
        partial: where it is written first, on the same disk; files of an earlier start are kept.
    """

    def __init__(self, folder: str | Path, partial: Path) -> None:
        self.folder = folder
        self._partial = partial
        self._staging = partial / STAGING
        self._to_stored: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
        self._files: dict[str, str] = {}
        self._blocks, self._bytes = 0, 0

    @property
    def written(self) -> int:
        """Bytes of the blocks that an earlier start has written."""
        return sum(path.lstat().st_size for path in self._staging.glob("model-*.safetensors"))

    def in_place(self, key: str) -> bool:
        """Whether the checkpoint of this run was moved into place by an earlier start."""
        return not self._staging.exists() and is_saved(self.folder, key)

    def begin(
        self, to_stored: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], blocks: int, done: int = 0
    ) -> None:
        """Prepare the partial folder, of whose ``blocks`` an earlier start has written ``done``.

        ``to_stored`` translates the model's tensors into those of the checkpoint, by the names there.

        Raises:
            DamagedFileError: a block that an earlier start has written is missing or damaged.
        """
        self._to_stored, self._blocks = to_stored, blocks
        if not done:
            shutil.rmtree(self._staging, ignore_errors=True)  # left by a run that was killed before it had a state
        self._staging.mkdir(parents=True, exist_ok=True)
        advice = f"and the run that wrote it cannot go on; remove {self._partial} to begin again"
        for index in range(done):
            path = self._staging / self._file_name(index + 2)
            try:
                self._index(path.name, read_tensors(path)[0])
            except FileNotFoundError as error:
                raise DamagedFileError(f"{path} is missing, {advice}") from error
            except (OSError, DamagedFileError) as error:
                raise DamagedFileError(f"{error}, {advice}") from error

    def add(self, index: int, weights: Mapping[str, Tensor]) -> None:
        """Write the weights of block ``index``, by the model's own names; raise an OSError if the disk is full."""
        self._write(index + 2, weights)

    def finish(self, model: Any, tokenizer: Any, masks: Mapping[str, PackedMask], manifest: Mapping[str, Any]) -> Path:
        """Write what is outside the blocks and rename the folder into place; raise an OSError if the disk is full."""
        self._write(1, {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta})
        write_json(
            self._staging / INDEX, {"metadata": {"total_size": self._bytes}, "weight_map": self._files}, checksum=False
        )
        model.config.architectures = [type(model).__name__]
        with as_os_error(self._staging):
            if model._auto_class is not None:
                custom_object_save(model, self._staging, config=model.config)
            model.config.save_pretrained(self._staging)
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.save_pretrained(self._staging)
            tokenizer.save_pretrained(self._staging)
        return _move_into_place(self._staging, target_of(self.folder), masks, manifest)

    def _file_name(self, number: int) -> str:
        return f"model-{number:05d}-of-{self._blocks + 1:05d}.safetensors"

    def _write(self, number: int, weights: Mapping[str, Tensor]) -> None:
        name, stored = self._file_name(number), self._to_stored(weights)
        write_tensors(stored, self._staging / name, {"format": "pt"})
        self._index(name, stored)

    def _index(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        self._files |= dict.fromkeys(tensors, file)
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def target_of(folder: str | Path) -> Path:
    """The real path of a save folder: links are followed, so that the right disk is measured."""
    return Path(folder).expanduser().resolve()


def partial_folder_of(folder: str | Path) -> Path:
    """Where a checkpoint is written: on the disk of its target, so that it can be renamed into place."""
    target = target_of(folder)
    return target.with_name(f".{target.name}.partial")


def _move_into_place(staging: Path, target: Path, masks: Mapping[str, PackedMask], manifest: Mapping[str, Any]) -> Path:
    """Add masks and manifest, sync, rename; an earlier checkpoint of the run is removed."""
    write_masks(masks, staging / MASKS)
    write_text(staging / CARD, _card(target, manifest))
    remove_partial_files(staging)
    paths, mode = sorted(path for path in staging.rglob("*") if path.is_file()), new_file_mode(staging)
    for path in paths:
        path.chmod(mode)  # safetensors makes files that only their owner can read
        fsync(path)
    digests = {path.relative_to(staging).as_posix(): file_digest(path) for path in paths}
    write_json(staging / MANIFEST, {"schema": 1, **manifest, "files": digests})
    is_saved(target, manifest["key"])  # raises if another program has written there meanwhile
    replaced = staging.with_name(REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    try:
        staging.rename(target)
    finally:
        _restore_replaced(target, replaced)
    with suppress(OSError):
        fsync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def _card(target: Path, manifest: Mapping[str, Any]) -> str:
    """Return the model card: what the weights are, how they came about, how to load them."""
    sparsity = manifest.get("sparsity", {})
    linears, share = sparsity.get("linears", {}), sparsity.get("scope", 0.0)
    shares = sorted({f"{100 * each:.1f} %" for each in linears.values()})
    among = f" (by linear: {shares[0]} to {shares[-1]})" if len(shares) > 1 else ""
    base = str(manifest.get("config", {}).get("model", {}).get("path", ""))
    of_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    head = ["---", "library_name: transformers", "tags: [pruned, sparse]"]
    head += [f"base_model: {base}", "---"] if of_hub else ["---"]
    paragraphs = [
        "\n".join(head),
        f"# {target.name}",
        f"{manifest['told']}.",
        f"{100 * share:.1f} % of the weights of the pruned linears are zero{among}; the zeros are stored as zeros.\n"
        f"`{MASKS}` holds the masks, one bit a weight; `{MANIFEST}` says how this model was made, with a checksum of\n"
        "every file.",
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{target.name}")  # the path of this folder\n```',
        f"Written by dass_exp {version('dass_exp')}. The dense model's license applies.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _restore_replaced(target: Path, replaced: Path) -> None:
    """Move the replaced checkpoint back unless something has taken its place."""
    if replaced.exists() and not target.exists():
        replaced.rename(target)
