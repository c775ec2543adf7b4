"""No tracker."""

from dataclasses import dataclass
from typing import Any

from dass_exp.trackers.base import Tracker


@dataclass
class NullTracker(Tracker):
    """Tracks nothing."""

    def send(self, record: dict[str, Any], results: str) -> None:
        del record, results
