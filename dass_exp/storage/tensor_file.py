"""Write tensors so that they survive a crash, and read them again only as they were written."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dass_exp.errors import DamagedFileError
from dass_exp.storage.checksum import PREFIX, json_digest, require_regular
from dass_exp.storage.durable import CHECKSUM, as_os_error, new_file_mode, scratch_file


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None, durable: bool = True
) -> None:
    """Write tensors of any device atomically to a safetensors file, with a checksum in its metadata.

    Args:
        tensors: by name.
        path: the file, whose folder exists.
        metadata: texts that are kept in the file.
        durable: wait until the file is on the disk.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = dict(metadata or {})
    with scratch_file(path, durable) as scratch:
        with as_os_error(path):
            save_file(on_cpu, scratch, {**texts, CHECKSUM: tensors_digest(on_cpu, texts)})
        _sort_metadata(scratch)
        scratch.chmod(new_file_mode(path.parent))  # safetensors makes files that only their owner can read


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order, which is random otherwise: equal content, equal bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(ordered) == size:
            file.seek(8)
            file.write(ordered)


def read_tensors(path: Path, required: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map the tensors of a file that :func:`write_tensors` wrote, by name, and return its metadata.

    Args:
        path: a safetensors file; it may be removed afterwards, but not overwritten in place.
        required: whether a file without a checksum is refused.

    Raises:
        DamagedFileError: the file does not hold what was written into it, or it is a folder, a pipe or a device.
        OSError: it is missing or cannot be read.
    """
    require_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise DamagedFileError(f"{path}: it is damaged ({' '.join(str(error).split())})") from error
    expected = metadata.pop(CHECKSUM, None)
    if expected is None and required:
        raise DamagedFileError(f"{path}: it is damaged, or of a version that wrote no checksum")
    if expected is not None and expected != tensors_digest(tensors, metadata):
        raise DamagedFileError(f"{path}: it is damaged: its content does not match its checksum")
    return tensors, metadata


def tensors_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the checksum of contiguous CPU tensors with their names, shapes and dtypes, and of the metadata."""
    digest = xxhash.xxh3_128(json_digest(dict(metadata)).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return PREFIX + digest.hexdigest()
