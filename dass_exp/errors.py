"""Errors with a message for the user, and checks of settings that raise them."""

import math


class UserError(ValueError):
    """A setting, file or model that cannot be used; shown as one line without a traceback.

    The message says what is wrong, which value, and what is allowed or to be done.
    """


class NumericalError(RuntimeError):
    """A number that is not finite, with the name of its layer; it stops the run."""


def finite_number(setting: str, value: object, allowed: str) -> float:
    """Return ``value`` as a float; raise a UserError if it is no number (a bool is none), NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{setting}={value!r}: expected {allowed}")
    return float(value)


def whole_number(setting: str, value: object, least: int) -> int:
    """Return ``value``; raise a UserError if it is no int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{setting}={value!r}: expected a whole number of at least {least}")
    return value


def one_of(setting: str, value: object, allowed: tuple[str, ...]) -> str:
    """Return ``value``; raise a UserError if it is not one of ``allowed``."""
    if value not in allowed:
        raise UserError(f"{setting}={value!r}: expected one of {', '.join(allowed)}")
    return str(value)
