"""Errors with a message for the user, what turns others into them, and checks of settings that raise them."""

import errno
import math
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A setting, file or model that cannot be used; shown as one line without a traceback.

    The message says what is wrong, which value, and what is allowed or to be done.
    """


class DamagedFileError(UserError):
    """A file of this project that does not hold what was written into it; the message names it."""


class NewerRecordError(UserError):
    """A record that a later version of this project wrote; it is neither read nor replaced."""


class ForeignCodeError(RuntimeError):
    """A method, text, tracker or model of somebody else that raised, exited or panicked while a run used it."""


class NumericalError(RuntimeError):
    """A number that is not finite, with the name of its layer; it stops the run."""


@contextmanager
def naming(
    what: str, kind: type[Exception] = UserError, passing: tuple[type[BaseException], ...] = ()
) -> Iterator[None]:
    """Turn whatever code that is not ours raises inside the context into one line that begins with ``what``.

    A plugin may raise anything or exit, and the Rust parts of tokenizers and safetensors panic with a BaseException.
    Our own errors, and an interrupt by the user, pass unchanged.

    Args:
        what: the setting and its value, such as ``method._target_=mine.Method``.
        kind: what is raised: a UserError while a run is resolved or loaded, else a ForeignCodeError.
        passing: further errors that pass unchanged.
    """
    try:
        yield
    except (UserError, NumericalError, ForeignCodeError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, passing) or is_exit_of_launcher(error):
            raise
        raise kind(f"{what}: {one_line(error)}") from error


def is_exit_of_launcher(error: BaseException) -> bool:
    """Whether submitit ends the process from its signal handler, to put a job that was preempted back in the queue."""
    frames = traceback.walk_tb(error.__traceback__) if isinstance(error, SystemExit) else ()
    return any(str(frame.f_globals.get("__name__")).startswith("submitit.") for frame, _ in frames)


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return the type and message of an error as one line of at most ``limit`` characters."""
    text = " ".join(str(error).split())
    if isinstance(error, SystemExit):
        text = f"it calls exit({text})"
    elif not isinstance(error, UserError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


_FULL = "make room on that disk, or name another folder"
_FORBIDDEN = "check its owner and permissions, or name another folder"
_KIND = "a folder stands where a file belongs or the other way round; move it away, or name another folder"
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM), _FORBIDDEN),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST), _KIND),
    errno.EROFS: "it is on a file system that cannot be written to; name another folder",
    errno.ENAMETOOLONG: "the path is too long for its file system; name a shorter one",
    errno.ELOOP: "the link leads back to itself; remove it",
    errno.ENOENT: "it is missing, or was removed while the run used it; run again",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.EIO: "the disk reports a fault; check it, or name another folder",
}


def os_error_line(error: OSError) -> str:
    """Say in one line which file could not be read or written, why, and what to do about it."""
    reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split()) or type(error).__name__
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    if error.errno and not names and error.strerror and error.strerror != reason:
        reason = " ".join(error.strerror.split())
    advice = _ADVICE.get(error.errno or 0, "check results_dir, DASS_EXP_CACHE and save")
    return f"{' -> '.join(names) or 'reading or writing failed'}: {reason}; {advice}"


def finite_number(setting: str, value: object, allowed: str) -> float:
    """Return ``value`` as a float; raise a UserError if it is no number (a bool is none), NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{setting}={value!r}: expected {allowed}")
    return float(value)


def non_negative(setting: str, value: object, example: str) -> float:
    """Return ``value`` as a float; raise a UserError, which gives the example, if it is no number of at least 0."""
    allowed = f"a number of at least 0 ({example})"
    number = finite_number(setting, value, allowed)
    if number < 0:
        raise UserError(f"{setting}={value!r}: expected {allowed}")
    return number


def whole_number(setting: str, value: object, least: int, most: int | None = None) -> int:
    """Return ``value``; raise a UserError if it is no int of at least ``least`` and at most ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        at_most = "" if most is None else f" and at most {most}"
        raise UserError(f"{setting}={value!r}: expected a whole number of at least {least}{at_most}")
    return value


def one_of(setting: str, value: object, allowed: tuple[str, ...]) -> str:
    """Return ``value``; raise a UserError if it is not one of ``allowed``."""
    if value not in allowed:
        raise UserError(f"{setting}={value!r}: expected one of {', '.join(allowed)}")
    return str(value)
