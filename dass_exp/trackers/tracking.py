"""Tell a tracker of a run, note what was sent, and send later what was not. A tracker never costs a result."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dass_exp.config.redact import redact, redact_text
from dass_exp.errors import DamagedFileError, ForeignCodeError, NumericalError, UserError, naming, one_line
from dass_exp.storage.durable import read_json, write_json
from dass_exp.trackers.base import Tracker
from dass_exp.trackers.none import NullTracker

log = logging.getLogger(__name__)

_SENT = "tracked.json"  # beside a record: by place, when the record that was sent there was made


class Tracking:
    """What a tracker is told of one run; whatever it raises is one warning, and the last that it is told.

    Args:
        tracker: shows the run.
        results: the results folder.
    """

    def __init__(self, tracker: Tracker, results: str) -> None:
        self._tracker, self._results, self._works = tracker, results, True

    @contextmanager
    def working(self, run: Mapping[str, Any]) -> Iterator[None]:
        """Say that the work on a run begins, and that it failed if the body raises."""
        self._tell(self._tracker.begin, redact(run), self._results)
        try:
            yield
        except BaseException as error:
            self._tell(self._tracker.fail, redact_text(one_line(error)))
            raise

    def progress(self, numbers: Mapping[str, float]) -> None:
        """Say how far the run is."""
        self._tell(self._tracker.progress, numbers)

    def send(self, record: dict[str, Any]) -> None:
        """Send a record that is written, and note it."""
        self._tell(_send, self._tracker, record, self._results)

    def _tell(self, call: Callable[..., None], *arguments: Any) -> None:
        if self._works:
            self._works = warn_of_failure("record is", call, *arguments)


def send_missing(tracker: Tracker, records: Iterable[dict[str, Any]], results: str) -> tuple[int, int]:
    """Send the records that were not sent to this place, or were made again since.

    Args:
        tracker: where to.
        records: read from the results folder.
        results: the results folder.

    Returns:
        how many were sent, and how many are there already.

    Raises:
        UserError: one could not be sent; those before it were.
    """
    sent = there = 0
    for record in records:
        if _sent(record, results).get(tracker.place) == record["created"]:
            there += 1
            continue
        with naming(f"record {record['key']} was not sent", UserError):
            _send(tracker, record, results)
        sent += 1
    return sent, there


def _send(tracker: Tracker, record: dict[str, Any], results: str) -> None:
    tracker.send({**redact(record), "identity": record["identity"]}, results)  # as it is written
    if not isinstance(tracker, NullTracker):
        with suppress(OSError):  # the note saves a second sending, no more
            write_json(_note(record, results), {**_sent(record, results), tracker.place: record["created"]})


def _sent(record: Mapping[str, Any], results: str) -> dict[str, Any]:
    try:
        noted = read_json(_note(record, results))
    except (OSError, DamagedFileError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _note(record: Mapping[str, Any], results: str) -> Path:
    return Path(results) / "runs" / record["key"] / _SENT


def warn_of_failure(safe: str, call: Callable[..., None], *arguments: Any) -> bool:
    """Call a part of a tracker; make one warning of whatever it raises, exits and panics included.

    Args:
        safe: what the failure does not concern: ``record is``.
        call: called with the arguments.
        *arguments: any.

    Returns:
        whether it succeeded.
    """
    try:
        with naming(f"the tracker failed, the {safe} safe", ForeignCodeError):
            call(*arguments)
    except (UserError, NumericalError, ForeignCodeError) as error:
        log.warning("%s", redact_text(str(error)))
        return False
    return True
