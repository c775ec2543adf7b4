"""What a run shows while it works: a line a phase, a line a minute, bars inside bars on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dass_exp.report import progress
from dass_exp.report.progress import TerminalReporter, clock


@pytest.fixture(name="now")
def now_fixture(monkeypatch):
    """The seconds that the clock shows."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_phase_is_one_line_and_one_more_a_minute(capsys, now):
    with TerminalReporter().phase("pruning with dass", 30) as step:
        for _ in range(5):
            now[0] += 25
            step()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["pruning with dass ...", "pruning with dass: 3/30, 1:15, 11:15 left"]


def test_a_phase_of_unknown_length_says_how_far_it_is(capsys, now):
    with TerminalReporter().phase("reading") as step:
        now[0] += 61
        step()
    assert capsys.readouterr().err.splitlines() == ["reading ...", "reading: 1 steps, 1:01"]


def test_on_a_terminal_a_phase_inside_another_has_a_bar_of_its_own(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(progress, "console", lambda stderr: screen)
    reporter = TerminalReporter()
    with reporter.phase("retraining", 4) as outer:
        outer()
        with reporter.phase("perplexity", 2) as inner:
            inner()
            reporter._bars.refresh()
        outer()
    with reporter.phase("zero-shot") as step, pytest.raises(ValueError, match="no"):
        step()
        with reporter.phase("requests", 9):
            raise ValueError("no")
    shown = screen.file.getvalue()
    assert all(text in shown for text in ("retraining", "1/4", "perplexity", "1/2", "zero-shot", "0/9"))
    assert reporter._bars is None and screen._live_stack == []


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3725, "1:02:05")])
def test_a_clock(seconds, text):
    assert clock(seconds) == text


def test_it_writes_to_standard_error(capsys):
    with TerminalReporter().phase("finding"):
        pass
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "finding ...\n")
