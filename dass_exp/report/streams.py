"""Standard output and error that a run can always write to: closed, full, or of an encoding with few characters."""

import errno
import logging
import os
import sys
from contextlib import suppress
from typing import Any, TextIO, cast


def _open_missing() -> None:
    """Open the standard streams that the shell closed (``>&-``), before a file of ours gets their number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


_open_missing()


class Output:
    """A text stream whose failure to write is kept instead of raised: it must not cost a result.

    Args:
        stream: standard output or error.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text; what cannot be written is dropped."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._discard(error)
            return len(text)

    def flush(self) -> None:
        """Flush; what cannot be written is dropped."""
        try:
            self._stream.flush()
        except OSError as error:
            self._discard(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _discard(self, error: OSError) -> None:
        """Send what follows nowhere, what is still buffered too."""
        self.error = self.error or error
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


def protect() -> None:
    """Make both streams drop what they cannot write, and escape characters that their encoding lacks."""
    _open_missing()
    logging.raiseExceptions = False  # a log line that cannot be written is no second error
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, Output):
            continue
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, cast(TextIO, Output(stream)))


def problem() -> str | None:
    """Return why standard output could not be written; None if all was, or if its reader wanted no more."""
    sys.stdout.flush()
    sys.stderr.flush()
    error = getattr(sys.stdout, "error", None)
    return None if error is None or error.errno == errno.EPIPE else str(error.strerror)
