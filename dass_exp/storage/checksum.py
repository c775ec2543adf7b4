"""Checksums of what is written and read again, so that a damaged file is named instead of believed."""

import functools
import json
import stat
from pathlib import Path
from typing import Any

import xxhash

from dass_exp.errors import DamagedFileError

PREFIX = "xxh3_128:"
_CHUNK = 1 << 24


def file_digest(path: Path) -> str:
    """Return the checksum of a regular file.

    Raises:
        DamagedFileError: it is no regular file; a pipe or device would block or never end.
        OSError: it cannot be read.
    """
    require_regular(path)
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return PREFIX + digest.hexdigest()


def digest_once(path: Path) -> str:
    """Return the checksum of a regular file, read once per process while its :func:`stamp` stays the same."""
    return _digest_of(path, stamp(path))


@functools.lru_cache(maxsize=256)
def _digest_of(path: Path, stamped: tuple[int, ...]) -> str:
    del stamped
    return file_digest(path)


def stamp(path: Path) -> tuple[int, ...]:
    """Return what changes when the content of a regular file is changed; raises as :func:`file_digest`."""
    require_regular(path)
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def folder_digest(folder: Path) -> str:
    """Return the checksum of the files below a folder and of their names, hidden ones and compiled code apart."""
    files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    seen = [file for file in files if not any(part.startswith((".", "__pycache__")) for part in file.parts)]
    return json_digest({file.as_posix(): digest_once(folder / file) for file in sorted(seen)})


def json_digest(content: Any) -> str:
    """Return the checksum of a JSON value, whatever the order of its keys and its white space."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return PREFIX + xxhash.xxh3_128_hexdigest(canonical.encode("ascii"))


def require_regular(path: Path) -> None:
    """Raise a DamagedFileError if ``path`` is there but is no regular file; an OSError if it is not there."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a socket or device"
        raise DamagedFileError(f"{path}: expected a file, found {kind}")
