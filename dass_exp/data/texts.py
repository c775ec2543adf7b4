"""Sources of text: the offline assets, or a data set of the hub. Only this file imports ``datasets``."""

import dataclasses
import logging
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from dass_exp.data import assets
from dass_exp.errors import UserError, one_of


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
    """A data set of the Hugging Face hub with a ``text`` column."""

    path: str  # id of the data set
    split: str
    name: str | None = None  # of its configuration, if it has several
    data_file: str | None = None  # path of a single file of it
    revision: str | None = None  # commit, tag or branch

    @property
    def identity(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def documents(self) -> list[str]:
        import datasets

        files = {self.split: self.data_file} if self.data_file else None
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # hides its retries; the error below says enough
        try:
            rows = datasets.load_dataset(
                self.path, self.name, data_files=files, split=self.split, revision=self.revision
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            advice = f"check the network, or set protocol=demo, which needs no hub ({reason})"
            raise UserError(f"data set {self.path} cannot be loaded: {advice}") from error
        return list(rows["text"])
