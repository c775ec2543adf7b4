"""Sources of text: the offline assets, or a data set of the hub. Only this file imports ``datasets``."""

import dataclasses
import functools
import logging
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dass_exp.data import assets
from dass_exp.errors import UserError, one_line, one_of
from dass_exp.storage.checksum import digest_once, json_digest


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
            return {**dataclasses.asdict(self), "path": f"local:{_content_digest(Path(self.path))}"}
        if self.data_file and Path(self.data_file).is_file():
            return {**dataclasses.asdict(self), "data_file": f"local:{_content_digest(Path(self.data_file))}"}
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


def _content_digest(path: Path) -> str:
    """Return a checksum of a file, or of all files of a folder that are not hidden, with their names."""
    if path.is_file():
        return digest_once(path)
    names = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    visible = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return json_digest({name.as_posix(): digest_once(path / name) for name in visible})


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
