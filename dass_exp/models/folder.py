"""Which files of a local model folder identify it: all that can change a number, by content."""

import fnmatch
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dass_exp.data import assets
from dass_exp.errors import DamagedFileError, UserError
from dass_exp.models.shards import INDEX, Shards
from dass_exp.paths import MASKS
from dass_exp.storage.checksum import digest_once, stamp
from dass_exp.storage.durable import read_json

MANIFEST = "dass_exp.json"
# Neither weights nor tokens nor the network depend on these; nor on hidden files, nor on compiled Python.
HARMLESS = (
    *("README*", "LICENSE*", "NOTICE*", "*.md", "chat_template.*", "generation_config.json"),
    *("pytorch_model*.bin*", MASKS, MANIFEST, assets.SIZES, assets.DIGESTS),
)


def folder_digest(folder: Path) -> str:
    """Return 16 hex digits of a SHA-256 over every file of a model folder that is not harmless, with their names.

    Raises:
        UserError: no safetensors, a file that is no regular one, a linked sub-folder, or a shard outside of the folder.
    """
    if not any(folder.glob("*.safetensors")) and not (folder / INDEX).exists():
        raise UserError(f"model.path={folder}: the folder holds no .safetensors file; other formats are not read")
    files = sorted({*identifying_files(folder), *(folder / file for file in Shards(folder).files)})
    return _digest(folder, tuple((file, stamp(file)) for file in files))


def identifying_files(folder: Path) -> Iterator[Path]:
    """Yield the files below a model folder that are not harmless by their name."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        if linked := [name for name in folders if Path(parent, name).is_symlink()]:
            problem = "is a link to a folder, whose files may change unseen; copy them, or link each file"
            raise UserError(f"model.path={folder}: {Path(parent, linked[0]).relative_to(folder)} {problem}")
        for name in files:
            if not _is_harmless(name):
                yield Path(parent, name)


@functools.lru_cache(maxsize=64)
def _digest(folder: Path, stamped: tuple[tuple[Path, tuple[int, ...]], ...]) -> str:
    """Hash files once per process while their stamps, which are part of the cache key, stay the same."""
    total = hashlib.sha256()
    for file, _ in stamped:
        entry = f"{file.relative_to(folder).as_posix()}:{assets.file_sha256(file)};"
        total.update(entry.encode(errors="surrogateescape"))
    return total.hexdigest()[:16]


def manifest_of(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint that :mod:`dass_exp.models.save` wrote; empty for any other folder.

    Raises:
        DamagedFileError: the manifest does not hold what was written into it.
    """
    try:
        manifest = read_json(folder / MANIFEST)
    except OSError:
        return {}
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}; save the model again, or remove the file") from error
    valid = isinstance(manifest, dict) and all(isinstance(manifest.get(name), str) for name in ("key", "told"))
    return manifest if valid else {}


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise a DamagedFileError if a file of a saved model that can change a number is not as its manifest says."""
    for name, digest in dict(manifest.get("files", {})).items():
        path = folder / name
        if not _is_harmless(path.name) and path.exists() and digest_once(path) != digest:
            advice = f"save it again, or remove {MANIFEST} if you changed the file yourself"
            raise DamagedFileError(f"model.path={folder}: {name} is not the file that was saved there; {advice}")


def _is_harmless(name: str) -> bool:
    return name.startswith(".") or any(fnmatch.fnmatchcase(name, pattern) for pattern in HARMLESS)
