"""A table in a terminal of any width: nothing is cut, what matters comes first."""

from __future__ import annotations

import io

import pandas as pd
import pytest
from rich.console import Console

from dass_exp.report.fit import tables_that_fit

FRAME = pd.DataFrame(
    {
        "method": ["dense", "dass + neurons + least_squares"],
        "perplexity": ["20.15", "48.11"],
        **{f"task_{number}": ["30.0 ± 10.5", "35.0 ± 10.9"] for number in range(5)},
        "mean acc": ["50.0", "48.0"],
        "record": ["951950da", "21c1a0e7"],
    }
)


def shown(width):
    screen = Console(width=width, file=io.StringIO())
    tables = tables_that_fit(FRAME, "A title", width, ("method", "record"), ("perplexity", "mean acc"))
    for table in tables:
        screen.print(table)
    return tables, screen.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 160, 200])
def test_nothing_is_cut_at_any_width(width):
    tables, text = shown(width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text and text.count("A title") == 1
    assert all(value in text for column in FRAME if column != "method" for value in FRAME[column])
    assert (len(tables) == 1) == (width >= 160)


def test_what_matters_is_in_the_first_table_and_each_has_the_label():
    tables, _ = shown(60)
    headers = [[column.header for column in table.columns] for table in tables]
    assert headers[0][:3] == ["method", "perplexity", "mean acc"]
    assert all(names[0] == "method" for names in headers)
    assert sorted(name for names in headers for name in names[1:]) == sorted(FRAME.columns[1:])
