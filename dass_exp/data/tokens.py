"""Calibration sequences and evaluation windows cut from a text, with a hash of the tokens."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dass_exp.config.settings import CalibrationConfig
from dass_exp.data.texts import Text
from dass_exp.errors import UserError

SAMPLINGS = ("joined", "document")


@dataclass(frozen=True)
class Tokens:
    """Token windows and what they are.

    Args:
        ids: int64 [windows, tokens].
        sha256: of the ids as little-endian 64-bit numbers.
    """

    ids: Tensor
    sha256: str

    @classmethod
    def of(cls, ids: Tensor) -> Tokens:
        """Windows with their hash."""
        return cls(ids, hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest())


def calibration_tokens(text: Text, cut: CalibrationConfig, tokenizer: Any, bos: str, seed: int) -> Tokens:
    """Draw calibration sequences.

    Args:
        text: where from.
        cut: how.
        tokenizer: of the model.
        bos: ``never``, ``stream`` or ``window`` (see :func:`dass_exp.models.load.bos_policy`).
        seed: of Python's generator, which the Wanda code uses too: the same draws give the same places.

    Raises:
        UserError: the text is too short.
    """
    length = cut.seq_len - (bos == "window")
    take = _joined_windows if cut.sampling == "joined" else _document_windows
    draw = random.Random(seed)
    windows = take(text, cut, functools.partial(encode, tokenizer, bos=bos), draw, length)
    return Tokens.of(torch.stack([_framed(window, tokenizer, bos) for window in windows]))


def _joined_windows(
    text: Text, cut: CalibrationConfig, encoder: Callable[[str], Tensor], draw: random.Random, length: int
) -> list[Tensor]:
    """Random windows of ``length`` tokens of all documents joined."""
    stream = encoder(cut.separator.join(text.documents()))
    if len(stream) <= length:
        raise UserError(
            f"calibration.seq_len={cut.seq_len}: the text has only {len(stream)} tokens; choose a smaller one"
        )
    starts = [draw.randint(0, len(stream) - length - 1) for _ in range(cut.num_samples)]
    return [stream[start : start + length] for start in starts]


def _document_windows(
    text: Text, cut: CalibrationConfig, encoder: Callable[[str], Tensor], draw: random.Random, length: int
) -> list[Tensor]:
    """A random window of a random document that is longer than ``length``, as often as asked; the order of the draws is the Wanda code's."""
    documents = text.documents()
    windows: list[Tensor] = []
    short: set[int] = set()
    while len(short) < len(documents):
        picked = draw.randint(0, len(documents) - 1)
        if picked in short:
            continue
        ids = encoder(documents[picked])
        if len(ids) <= length:
            short.add(picked)
            continue
        start = draw.randint(0, len(ids) - length - 1)
        windows.append(ids[start : start + length])
        if len(windows) == cut.num_samples:
            return windows
    raise UserError(
        f"calibration.seq_len={cut.seq_len}: none of the {len(documents)} documents is longer; choose a smaller one or sampling=joined"
    )


def evaluation_windows(text: Text, context: int, max_windows: int | None, tokenizer: Any, bos: str) -> Tokens:
    """Cut a text, its documents joined by a blank line, into consecutive windows; what is left over at the end is dropped.

    Args:
        text: where from.
        context: tokens of a window, beginning-of-sequence token included.
        max_windows: the first so many windows, None for all.
        tokenizer: of the model.
        bos: see :func:`dass_exp.models.load.bos_policy`.

    Raises:
        UserError: the text is shorter than one window.
    """
    stream = encode(tokenizer, "\n\n".join(text.documents()), bos)
    length = context - (bos == "window")
    count = len(stream) // length
    if count == 0:
        raise UserError(
            f"eval.perplexity.context={context}: the text has only {len(stream)} tokens; choose a smaller one"
        )
    if max_windows is not None:
        count = min(count, max_windows)
    windows = stream[: count * length].view(count, length)
    return Tokens.of(torch.stack([_framed(window, tokenizer, bos) for window in windows]))


def encode(tokenizer: Any, text: str, bos: str) -> Tensor:
    """The tokens of a text, int64 [tokens], with the beginning-of-sequence token at its head if ``bos`` is ``stream``."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([tokenizer.bos_token_id, *ids] if bos == "stream" else ids, dtype=torch.int64)


def _framed(window: Tensor, tokenizer: Any, bos: str) -> Tensor:
    return torch.cat([torch.tensor([tokenizer.bos_token_id]), window]) if bos == "window" else window
