"""Write text and JSON so that they survive a crash, and read them again only as they were written. Imports no torch."""

import json
import os
import re
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dass_exp.errors import DamagedFileError, UserError
from dass_exp.storage.checksum import json_digest, require_regular

CHECKSUM = "checksum"

# our scratch files, those of versions before, and those of safetensors
_SCRATCH = re.compile(r".+\.([0-9a-f]{32}|\d+)\.partial|(state|masks)\.safetensors\.partial|\.tmp[A-Za-z0-9]{6,10}")
_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)")  # as Rust appends it


def write_json(path: Path, content: Any, checksum: bool = True) -> None:
    """Write JSON like :func:`write_text`; an object with a ``checksum`` of its other fields, unless others read it."""
    if checksum and isinstance(content, Mapping):
        content = {**content, CHECKSUM: json_digest(json.loads(json.dumps(content)))}
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON without its checksum, which is compared if there is one; lone surrogates come back escaped.

    Raises:
        DamagedFileError: it is no JSON or not what was written, or it is a folder, a pipe or a device.
        OSError: it is missing or cannot be read.
    """
    require_regular(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: it is damaged: no JSON ({' '.join(str(error).split())})") from error
    expected = content.pop(CHECKSUM, None) if isinstance(content, dict) else None
    if expected is not None and expected != json_digest(content):
        raise DamagedFileError(f"{path}: it is damaged: its content does not match its checksum")
    return _encodable(content) if "\\ud" in text.lower() else content


def write_text(path: Path, content: str) -> Path:
    """Write a text file atomically and durably, creating missing parent folders; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch_file(path) as scratch:
        scratch.write_text(content, encoding="utf-8", errors="backslashreplace")
    return path


@contextmanager
def scratch_file(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a path beside ``path`` to be written, which then takes its place atomically; removed if the body raises.

    Its name is of this call alone, and :func:`remove_partial_files` knows it should the process be killed.
    """
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield scratch
        if durable:
            replace_durably(scratch, path)
        else:
            os.replace(scratch, path)
    finally:
        with suppress(OSError):  # the error of the body must not be hidden by one of a disk that fails
            scratch.unlink(missing_ok=True)


def new_file_mode(folder: Path) -> int:
    """Return the permissions that a new file in ``folder`` gets by the user's umask."""
    probe = folder / f"mode.{uuid.uuid4().hex}.partial"
    try:
        probe.touch()
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def refuse_links(path: Path, root: Path) -> None:
    """Raise a UserError if ``path``, or a folder between it and ``root``, is a link; ``root`` itself may be one.

    What is written or removed below ``root`` would then be somewhere else.
    """
    for part in (path, *path.parents):
        if part == root:
            return
        if part.is_symlink():
            raise UserError(f"{part}: it is a link, and nothing is written through links there; remove or replace it")


def now() -> str:
    """Return the current time in UTC, ISO 8601 to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@contextmanager
def as_os_error(path: Path) -> Iterator[None]:
    """Turn what safetensors and tokenizers raise on a full disk into an OSError with its number."""
    try:
        yield
    except Exception as error:
        # tokenizers have no exception class of their own
        if not isinstance(error, SafetensorError) and type(error) is not Exception:
            raise
        if (number := _ERROR_NUMBER.search(str(error))) is not None:
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise OSError(f"{path}: {error}") from error


def fsync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(scratch: Path, path: Path) -> None:
    """Rename ``scratch`` to ``path`` atomically; both the content and the new name survive a crash."""
    fsync(scratch)
    os.replace(scratch, path)
    with suppress(OSError):  # not every file system can sync a folder
        fsync(path.parent)


def remove_partial_files(folder: Path) -> None:
    """Remove the scratch files that killed writers, ours and safetensors', left below a folder; follow no link."""
    if folder.is_symlink():
        return
    for parent, _, files in os.walk(folder):
        for path in (Path(parent, name) for name in files if _SCRATCH.fullmatch(name)):
            if path.is_file() and not path.is_symlink():
                path.unlink(missing_ok=True)


def _encodable(value: Any) -> Any:
    """Replace lone surrogates, which JSON can hold and no file or terminal can, in all texts of a JSON value."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, list):
        return [_encodable(entry) for entry in value]
    if isinstance(value, dict):
        return {_encodable(name): _encodable(entry) for name, entry in value.items()}
    return value
