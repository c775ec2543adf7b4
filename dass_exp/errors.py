"""The one error a user is meant to read: a single line, no traceback."""

from __future__ import annotations

import math


class UserError(ValueError):
    """A setting, file or model that cannot be used; the message says what, which value, what is allowed, what to do."""


class NumericalError(RuntimeError):
    """A number that is not finite, with the name of the layer where it was met. The run stops; nothing is patched over."""


def finite_number(setting: str, value: object, allowed: str) -> float:
    """``value`` as a float.

    Raises:
        UserError: it is no number (a bool is none), or NaN, or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{setting}={value!r}: expected {allowed}")
    return float(value)


def whole_number(setting: str, value: object, least: int) -> int:
    """``value`` as an int that is at least ``least``.

    Raises:
        UserError: it is no whole number, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{setting}={value!r}: expected a whole number of at least {least}")
    return value


def one_of(setting: str, value: object, allowed: tuple[str, ...]) -> str:
    """``value`` if it is one of ``allowed``.

    Raises:
        UserError: it is not.
    """
    if value not in allowed:
        raise UserError(f"{setting}={value!r}: expected one of {', '.join(allowed)}")
    return str(value)
