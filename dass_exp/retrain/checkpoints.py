"""Checkpoints of the Trainer: they count once everything is on the disk, for the training that wrote them."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dass_exp.errors import DamagedFileError
from dass_exp.storage.checksum import file_digest
from dass_exp.storage.durable import fsync, read_json, write_json

log = logging.getLogger(__name__)

_MARK = "complete.json"


def complete(checkpoint: Path, fingerprint: Mapping[str, Any]) -> None:
    """Mark a checkpoint as complete, with the checksums of its files.

    Args:
        checkpoint: its folder.
        fingerprint: of the training, as JSON.
    """
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    for path in files:
        fsync(path)
    digests = {path.name: file_digest(path) for path in files}
    write_json(checkpoint / _MARK, {"fingerprint": dict(fingerprint), "files": digests})


def last_complete(folder: Path, fingerprint: Mapping[str, Any]) -> Path | None:
    """Return the last complete checkpoint of this training, and remove all others; None if there is none."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    usable = [path for path in found if _is_usable(path, fingerprint)]
    for path in set(found) - set(usable[-1:]):
        shutil.rmtree(path)
    return usable[-1] if usable else None


def is_resumable(folder: Path) -> bool:
    """Check whether a folder holds a complete checkpoint of any training."""
    return any(folder.glob(f"checkpoint-*/{_MARK}"))


def _is_usable(checkpoint: Path, fingerprint: Mapping[str, Any]) -> bool:
    if not os.path.lexists(checkpoint / _MARK):
        return False
    try:
        mark = read_json(checkpoint / _MARK)
        if mark["fingerprint"] != json.loads(json.dumps(dict(fingerprint))):
            log.warning("%s: it belongs to another training, so this one begins again", checkpoint)
            return False
        for name, digest in mark["files"].items():
            if file_digest(checkpoint / name) != digest:
                raise DamagedFileError(f"{checkpoint / name}: its content does not match its checksum")
    except (OSError, KeyError, TypeError, DamagedFileError) as error:
        log.warning("%s; an earlier checkpoint, or the start of the training, is taken", error)
        return False
    return True
