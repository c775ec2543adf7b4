"""Standard streams that cannot be written cost no result."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from dass_exp.report import streams


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_device_is_kept_as_a_problem(monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        streams.protect()
        sys.stdout.write("x" * 100_000)
        sys.stdout.write("more")
        assert streams.problem() == os.strerror(28)


def test_characters_that_an_encoding_lacks_are_escaped(monkeypatch):
    kept = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(kept, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    streams.protect()
    sys.stdout.write("2:4 \u00b7 \u2603")
    assert streams.problem() is None
    assert kept.getvalue() == b"2:4 \\xb7 \\u2603"


def test_closed_streams_are_replaced(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    streams.protect()
    sys.stdout.write("nowhere")
    assert streams.problem() is None
