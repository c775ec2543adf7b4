"""The progress of a run on standard error: live on a terminal, else one line a phase and one a minute."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from dass_exp.report.console import console

_LINE_EVERY = 60.0  # seconds, without a terminal


class TerminalReporter:
    """Shows the phases of a run; a phase inside another one has a bar of its own below it."""

    def __init__(self) -> None:
        self._bars: Progress | None = None

    @contextmanager
    def phase(self, name: str, steps: int | None = None) -> Iterator[Callable[[], None]]:
        """Show a phase; yields a function to call after each step."""
        screen = console(stderr=True)
        if not screen.is_terminal:
            screen.print(f"{name} ...", soft_wrap=True)
            lines = _Lines(name, steps)
            yield lambda: screen.print(line, soft_wrap=True) if (line := lines.next()) else None
            return
        outer = self._bars is None
        if self._bars is None:
            text = TextColumn("{task.description}", markup=False)
            self._bars = Progress(SpinnerColumn(), text, BarColumn(20), _Course(), console=screen, transient=True)
            self._bars.start()
        bars = self._bars
        task: TaskID = bars.add_task(name, total=steps)
        try:
            yield lambda: bars.advance(task)
        finally:
            bars.remove_task(task)
            if outer:
                bars.stop()
                self._bars = None


class _Course(ProgressColumn):
    """How many steps of how many, the time so far, and how much is left."""

    def render(self, task: Task) -> Text:
        """Return the text of a task."""
        spent = f"{clock(task.elapsed or 0)}"
        if task.total is None:
            return Text(spent)
        left = task.time_remaining
        more = "" if left is None or task.finished else f", {clock(left)} left"
        return Text(f"{task.completed:.0f}/{task.total:.0f} {spent}{more}")


class _Lines:
    """Counts steps, and gives a line about them once a minute."""

    def __init__(self, name: str, steps: int | None) -> None:
        self._name, self._steps, self._done = name, steps, 0
        self._start = self._shown = time.monotonic()

    def next(self) -> str:
        """Count a step; return the line that is due, or an empty text."""
        self._done += 1
        now = time.monotonic()
        if now - self._shown < _LINE_EVERY:
            return ""
        self._shown, spent = now, now - self._start
        if self._steps is None:
            return f"{self._name}: {self._done} steps, {clock(spent)}"
        left = spent / self._done * max(self._steps - self._done, 0)
        return f"{self._name}: {self._done}/{self._steps}, {clock(spent)}, {clock(left)} left"


def clock(seconds: float) -> str:
    """Return ``2:05`` or ``1:02:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
