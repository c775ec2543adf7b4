"""Sources of text: offline assets, a data set of the hub, or a local file. Only this file imports ``datasets``."""

import dataclasses
import functools
import gzip
import hashlib
import io
import json
import logging
import re
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from dass_exp.data import assets
from dass_exp.errors import DamagedFileError, UserError, one_line, one_of
from dass_exp.storage.checksum import digest_once, folder_digest, stamp

_FORMATS = (".txt", ".raw", ".jsonl", ".json", ".parquet")


class Text(ABC):
    """A collection of documents."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What identifies the text wherever it is stored; part of the key of every run that uses it."""

    @abstractmethod
    def documents(self) -> list[str]:
        """Return the documents in order; raise a UserError if they cannot be loaded."""


@dataclass(frozen=True)
class OfflineText(Text):
    """A text of assets.py."""

    asset: str  # c4 or wikipedia; code or technical, which are one document each
    part: str = "all"  # or every other document, so that calibration and evaluation can be disjoint: even, odd

    def __post_init__(self) -> None:
        one_of("text.asset", self.asset, tuple(assets.TEXTS))
        one_of("text.part", self.part, ("all", "even", "odd") if self.asset in ("c4", "wikipedia") else ("all",))

    @property
    def identity(self) -> dict[str, Any]:
        return {"asset": self.asset, "sha256": assets.TEXTS[self.asset].sha256, "part": self.part}

    def documents(self) -> list[str]:
        raw = assets.fetch(assets.TEXTS[self.asset]).read_text(encoding="utf-8")
        if self.asset == "wikipedia":
            articles = [text.strip() for text in re.findall(r"<doc [^>]*>\n(.*?)</doc>", raw, re.DOTALL)]
            documents = [text for text in articles if "\n" in text]  # an article of one line is a title without text
        else:
            documents = raw.splitlines() if self.asset == "c4" else [raw]
        return {"all": documents, "even": documents[::2], "odd": documents[1::2]}[self.part]


@dataclass(frozen=True)
class HubText(Text):
    """A data set of the Hugging Face hub, or of local files, with a ``text`` column."""

    path: str  # id of the data set, a folder, or the format of a local data_file: json, csv, parquet, text
    split: str
    name: str | None = None  # of its configuration, if it has several
    data_file: str | None = None  # path of a single file of it
    revision: str | None = None  # commit, tag or branch

    @property
    def identity(self) -> dict[str, Any]:
        """Its settings, with the commit of a data set on the hub and a digest of the content of local files.

        Raises:
            UserError: the commit cannot be found out.
        """
        if Path(self.path).is_dir():
            return {**dataclasses.asdict(self), "path": f"local:{folder_digest(Path(self.path))}"}
        if self.data_file and Path(self.data_file).is_file():
            return {**dataclasses.asdict(self), "data_file": f"local:{digest_once(Path(self.data_file))}"}
        return {**dataclasses.asdict(self), "revision": _commit_of(self.path, self.revision)}

    def documents(self) -> list[str]:
        import datasets

        files = {self.split: self.data_file} if self.data_file else None
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # hides its retries; the error below says enough
        revision = self.identity["revision"]
        try:
            rows = datasets.load_dataset(self.path, self.name, data_files=files, split=self.split, revision=revision)
            return list(rows["text"])
        except Exception as error:  # the readers of its formats raise errors of many kinds
            advice = f"check the network, or set protocol=demo, which needs no hub ({one_line(error)})"
            raise UserError(f"data set {self.path} cannot be loaded: {advice}") from error


@dataclass(frozen=True)
class TextFile(Text):
    """A local file of any of :data:`_FORMATS`, or one of them compressed as ``.gz``.

    The documents of a ``.txt`` are separated by blank lines: joined by blank lines again, as perplexity joins them,
    they are the file as it stands, so rows of WikiText that were joined so and written to a file give the tokens of
    the data set. A ``.raw`` is a file of WikiText's own release (wiki.test.raw), whose lines are the rows of the data
    set. A ``.jsonl`` (or ``.json``) holds one JSON object a line, and it and a ``.parquet`` one document a row.
    """

    path: str
    column: str = "text"  # that holds the documents of a .jsonl, .json or .parquet

    def __post_init__(self) -> None:
        if self._format not in _FORMATS:
            expected = f"expected a file whose name ends in {', '.join(_FORMATS)}, or in one of them and .gz"
            raise UserError(f"text.path={self.path!r}: {expected}")

    @property
    def identity(self) -> dict[str, Any]:
        """A hash of its content, uncompressed, and how it is read; where it lies makes no difference.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            digest = _content_sha256(Path(self.path), stamp(Path(self.path)))
        except FileNotFoundError as error:
            raise UserError(f"text.path={self.path}: there is no such file; check the path") from error
        except DamagedFileError as error:
            raise UserError(f"text.path={error}") from error
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"text.path={self.path}: it cannot be read ({one_line(error)})") from error
        column = {"column": self.column} if self._format in (".jsonl", ".json", ".parquet") else {}
        return {"file": digest, "format": self._format.replace("jsonl", "json"), **column}

    def documents(self) -> list[str]:
        _ = self.identity  # names a file that cannot be read
        with _opened(Path(self.path)) as file:
            content = file.read()
        documents = self._rows_of_parquet(content) if self._format == ".parquet" else self._parts_of(content)
        if not any(map(str.strip, documents)):
            raise UserError(f"text.path={self.path}: it holds no text; name another file")
        return documents

    @property
    def _format(self) -> str:
        return Path(str(self.path).removesuffix(".gz")).suffix

    def _parts_of(self, content: bytes) -> list[str]:
        try:
            text = content.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            problem = f"it is not UTF-8 (byte {error.start}); convert it, for example with iconv -t UTF-8"
            raise UserError(f"text.path={self.path}: {problem}") from error
        if self._format == ".txt":
            return text.split("\n\n")
        lines = io.StringIO(text, newline="\n").readlines()
        if self._format == ".raw":
            return [line if line.strip() else "" for line in lines]
        return [self._document(number, line) for number, line in enumerate(lines, 1) if line.strip()]

    def _document(self, number: int, line: str) -> str:
        try:
            row = json.loads(line)
        except ValueError as error:
            problem = f"line {number} is no JSON ({one_line(error)}); expected one object a line"
            raise UserError(f"text.path={self.path}: {problem}") from error
        if not isinstance(row, dict) or not isinstance(document := row.get(self.column), str):
            known = f"it has {', '.join(map(str, row)) or 'none'}" if isinstance(row, dict) else "it is no object"
            problem = f"line {number} of {self.path} has no such field that holds a text"
            raise UserError(f"text.column={self.column}: {problem}; {known}")
        return document

    def _rows_of_parquet(self, content: bytes) -> list[str]:
        import pandas

        try:
            frame = pandas.read_parquet(io.BytesIO(content))
        except Exception as error:  # its readers raise errors of many kinds
            raise UserError(f"text.path={self.path}: it is no parquet file ({one_line(error)})") from error
        rows: list[Any] = frame[self.column].tolist() if self.column in frame else [None]
        if not all(isinstance(row, str) for row in rows):
            problem = f"{self.path} has no such column of texts; it has {', '.join(map(str, frame.columns)) or 'none'}"
            raise UserError(f"text.column={self.column}: {problem}")
        return rows


def _opened(path: Path) -> IO[bytes]:
    """Open a file for reading, uncompressed."""
    return cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


@functools.lru_cache(maxsize=256)
def _content_sha256(path: Path, stamped: tuple[int, ...]) -> str:
    """Return the SHA-256 of a file's content, uncompressed; read once while its stamp stays the same."""
    del stamped
    digest = hashlib.sha256()
    with _opened(path) as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


@functools.cache
def _commit_of(path: str, revision: str | None) -> str:
    """Return the commit of a data set on the hub: without a network, that of the copy in the hub's cache."""
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    try:
        return str(HfApi().dataset_info(path, revision=revision, timeout=10).sha)
    except Exception as error:  # of the network, of the hub and of its client
        folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=path, repo_type="dataset"))
        reference = folder / "refs" / (revision or "main")
        if reference.is_file():
            return reference.read_text(encoding="utf-8").strip()
        setting = f"text.revision={'null' if revision is None else revision}"
        problem = f"the commit of data set {path} cannot be found out ({one_line(error, 200)})"
        advice = "so results of different versions would share a record; check the network, set the commit"
        raise UserError(f"{setting}: {problem}, {advice}, or set protocol=demo, which needs no hub") from error
