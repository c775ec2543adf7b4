"""Where text comes from: the offline assets, or a data set of the hub. The only import of ``datasets``."""

from __future__ import annotations

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
        """What the text is, wherever it lies; part of the key of every record made with it."""

    @abstractmethod
    def documents(self) -> list[str]:
        """The documents in their order.

        Raises:
            UserError: they cannot be had.
        """


@dataclass(frozen=True)
class OfflineText(Text):
    """A text of assets.py.

    Args:
        asset: ``c4``, ``wikipedia``, or ``code`` and ``technical``, which are one document each.
        part: ``all``, or ``even`` or ``odd``: every other document, so that calibration and scoring can take disjoint ones.
    """

    asset: str
    part: str = "all"

    def __post_init__(self) -> None:
        one_of("text.asset", self.asset, tuple(assets.TEXTS))
        one_of("text.part", self.part, ("all", "even", "odd") if self.asset in ("c4", "wikipedia") else ("all",))

    @property
    def identity(self) -> dict[str, Any]:
        return {"asset": self.asset, "sha256": assets.TEXTS[self.asset].sha256, "part": self.part}

    def documents(self) -> list[str]:
        raw = assets.fetch(assets.TEXTS[self.asset]).read_text(encoding="utf-8")
        if self.asset == "wikipedia":
            found = [text.strip() for text in re.findall(r"<doc [^>]*>\n(.*?)</doc>", raw, re.DOTALL)]
            found = [text for text in found if "\n" in text]  # an article of one line is a title without text
        else:
            found = raw.splitlines() if self.asset == "c4" else [raw]
        return found[{"odd": 1}.get(self.part, 0) :: 1 if self.part == "all" else 2]


@dataclass(frozen=True)
class HubText(Text):
    """A data set of the Hugging Face hub with a ``text`` column.

    Args:
        path: data set id.
        name: its configuration, if it has several.
        data_file: a single file of it.
        split: of the data set.
        revision: commit, tag or branch.
    """

    path: str
    split: str
    name: str | None = None
    data_file: str | None = None
    revision: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "name": self.name,
            "data_file": self.data_file,
            "split": self.split,
            "revision": self.revision,
        }

    def documents(self) -> list[str]:
        import datasets

        files = {self.split: self.data_file} if self.data_file else None
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the failure is told below
        try:
            found = datasets.load_dataset(
                self.path, self.name, data_files=files, split=self.split, revision=self.revision
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"data set {self.path} cannot be loaded: check the network, or take protocol=demo, which needs no hub ({reason})"
            ) from error
        return list(found["text"])
