"""What a model folder holds: its digest, since local weights have no hub commit to be known by, and whether this project made it."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from dass_exp.assets import file_sha256
from dass_exp.errors import UserError
from dass_exp.maskfile import MASKS

MANIFEST = "dass_exp.json"

_IDENTIFYING = {"config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"}  # beside the weights


def folder_digest(folder: Path) -> str:
    """16 hex digits over the weights, the config and the tokenizer of a model folder.

    Raises:
        UserError: it holds no safetensors.
    """
    files = sorted(file for file in folder.iterdir() if (file.suffix == ".safetensors" and file.name != MASKS) or file.name in _IDENTIFYING)
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"model.path={folder}: the folder holds no .safetensors file; other formats are not read")
    return _digest(tuple((file.absolute(), file.stat().st_mtime_ns, file.stat().st_size) for file in files))


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that this project saved (:mod:`dass_exp.checkpoint`); empty for another folder."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("key"), str) and isinstance(found.get("told"), str) else {}


@functools.lru_cache(maxsize=64)
def _digest(stamped: tuple[tuple[Path, int, int], ...]) -> str:
    """One digest over files; the time stamps make a sweep in one process hash an unchanged folder once."""
    whole = hashlib.sha256()
    for file, _, _ in stamped:
        whole.update(f"{file.name}:{file_sha256(file)};".encode())
    return whole.hexdigest()[:16]
