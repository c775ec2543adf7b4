"""Calibration sequences and evaluation windows cut from a text, with a hash of their tokens."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dass_exp.config.settings import CalibrationConfig
from dass_exp.data.texts import Text
from dass_exp.errors import UserError, naming

_MOST_TOKENS = 36  # of one character: U+FDFA is normalised to 18 letters of two bytes, each of which may be a token


@dataclass(frozen=True)
class Tokens:
    """Token windows and their hash."""

    ids: Tensor  # int64 [windows, tokens]
    sha256: str  # of the ids as little-endian 64-bit numbers

    def checked(self, vocabulary: int, model: str) -> Tokens:
        """Return it; raise a UserError if a token has no embedding, of which ``model`` has ``vocabulary``."""
        if (largest := int(self.ids.max())) >= vocabulary:
            problem = f"its tokenizer gives the token {largest}, and its embedding has {vocabulary} rows"
            raise UserError(f"model.path={model}: {problem}; the tokenizer belongs to another model")
        return self

    @classmethod
    def of(cls, ids: Tensor) -> Tokens:
        """Wrap windows together with their hash."""
        return cls(ids, hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest())


def calibration_tokens(text: Text, config: CalibrationConfig, tokenizer: Any, bos: str, seed: int) -> Tokens:
    """Draw calibration sequences in the order in which the Wanda code draws them.

    Args:
        text: to draw from; a UserError is raised if it is too short.
        config: number, length and sampling of the sequences.
        tokenizer: of the model.
        bos: ``never``, ``stream`` or ``window`` (see :func:`dass_exp.models.load.bos_policy`).
        seed: of Python's random generator, which the Wanda code uses too.
    """
    length = config.seq_len - (bos == "window")
    draw = _joined_windows if config.sampling == "joined" else _document_windows
    generator = random.Random(seed)  # noqa: S311 - reproducible, not secret
    windows = draw(text, config, lambda part: encode(tokenizer, part, bos), generator, length)
    return _with_bos(windows, tokenizer, bos)


def _joined_windows(
    text: Text, config: CalibrationConfig, encoder: Callable[[str], Tensor], generator: random.Random, length: int
) -> list[Tensor]:
    joined = config.separator.join(text.documents())
    _refuse_short([joined], length, f"calibration.seq_len={config.seq_len}")
    stream = encoder(joined)
    if len(stream) <= length:
        problem = f"the text has only {len(stream)} tokens; choose a smaller one"
        raise UserError(f"calibration.seq_len={config.seq_len}: {problem}")
    starts = [generator.randint(0, len(stream) - length - 1) for _ in range(config.num_samples)]
    return [stream[start : start + length] for start in starts]


def _document_windows(
    text: Text, config: CalibrationConfig, encoder: Callable[[str], Tensor], generator: random.Random, length: int
) -> list[Tensor]:
    documents = text.documents()
    _refuse_short(documents, length, f"calibration.seq_len={config.seq_len}")
    windows: list[Tensor] = []
    too_short: set[int] = set()
    while len(too_short) < len(documents):
        index = generator.randint(0, len(documents) - 1)
        if index in too_short:
            continue
        ids = encoder(documents[index])
        if len(ids) <= length:
            too_short.add(index)
            continue
        start = generator.randint(0, len(ids) - length - 1)
        windows.append(ids[start : start + length])
        if len(windows) == config.num_samples:
            return windows
    raise UserError(
        f"calibration.seq_len={config.seq_len}: none of the {len(documents)} documents is longer; "
        "choose a smaller one or sampling=joined"
    )


def evaluation_windows(
    text: Text,
    context: int,
    max_windows: int | None,
    tokenizer: Any,
    bos: str,
    setting: str = "eval.perplexity.context",
) -> Tokens:
    """Cut a text, its documents joined by blank lines, into consecutive windows; drop the rest at the end.

    Args:
        text: to cut; a UserError is raised if it is shorter than one window.
        context: tokens of a window, the beginning-of-sequence token included.
        max_windows: keep only the first ones; None for all.
        tokenizer: of the model.
        bos: see :func:`dass_exp.models.load.bos_policy`.
        setting: that gives their length, for messages.
    """
    joined, length = "\n\n".join(text.documents()), context - (bos == "window")
    _refuse_short([joined], length, f"{setting}={context}")
    stream = encode(tokenizer, joined, bos)
    if len(stream) < length:
        problem = f"the text has only {len(stream)} tokens; choose a smaller one"
        raise UserError(f"{setting}={context}: {problem}")
    windows = stream[: len(stream) // length * length].view(-1, length)[:max_windows]
    return _with_bos(list(windows), tokenizer, bos)


def _refuse_short(documents: Sequence[str], length: int, setting: str) -> None:
    """Raise a UserError if no document can have ``length`` tokens, without the time that tokenising them takes."""
    longest = max(map(len, documents), default=0)
    if length > _MOST_TOKENS * longest + 2:
        which = "the text" if len(documents) == 1 else f"the longest of {len(documents)} documents"
        problem = f"{which} has {longest} characters, which are never so many tokens"
        raise UserError(f"{setting}: {problem}; choose a smaller one")


def encode(tokenizer: Any, text: str, bos: str) -> Tensor:
    """Return the tokens of a text, int64 [tokens], after a beginning-of-sequence token if ``bos`` is ``stream``."""
    with naming(f"model.path={getattr(tokenizer, 'name_or_path', '')}: its tokenizer cannot encode a text"):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor([tokenizer.bos_token_id, *ids] if bos == "stream" else ids, dtype=torch.int64)


def _with_bos(windows: list[Tensor], tokenizer: Any, bos: str) -> Tokens:
    stacked = torch.stack(windows)
    if bos == "window":
        stacked = torch.nn.functional.pad(stacked, (1, 0), value=tokenizer.bos_token_id)
    return Tokens.of(stacked)
