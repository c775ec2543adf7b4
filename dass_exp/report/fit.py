"""Tables that fit a terminal: what is too wide is divided into several below each other."""

from collections.abc import Sequence

import pandas as pd
from rich.table import Table

_BORDER = 3  # columns of a border and its padding
_NARROWEST = 12  # columns that a label is left with before it is folded further


def tables_that_fit(
    frame: pd.DataFrame, title: str, width: int, labels: Sequence[str], first: Sequence[str]
) -> list[Table]:
    """Divide a table among as many as are needed; each begins with the label of its rows.

    Args:
        frame: of text.
        title: of the first table.
        width: columns of the terminal.
        labels: names of the columns that are texts, and aligned to the left; the first that there is labels the rows.
        first: the columns that matter most, in this order; the rest follows as it stands.
    """
    names = list(map(str, frame.columns))
    row_label = next(name for name in labels if name in names)
    needed = {name: max(len(name), *frame[name].map(str).map(len)) + _BORDER for name in names}
    if sum(needed.values()) + 1 <= width:
        return [_table(frame, names, title, labels, {})]
    rest = [name for name in names if name != row_label]
    ordered = [*(name for name in first if name in rest), *(name for name in rest if name not in first)]
    # the label is folded where the most important columns need the room
    important = sum(needed[name] for name in ordered if name in first)
    label = max(_NARROWEST + _BORDER, min(needed[row_label], width - 1 - important))
    parts: list[list[str]] = [[]]
    for name in ordered:
        used = label + 1 + sum(needed[other] for other in parts[-1])
        if parts[-1] and used + needed[name] > width:
            parts.append([])
        parts[-1].append(name)
    widths = {row_label: label - _BORDER}
    return [
        _table(frame, [row_label, *part], title if not number else None, labels, widths)
        for number, part in enumerate(parts)
    ]


def _table(
    frame: pd.DataFrame, names: Sequence[str], title: str | None, labels: Sequence[str], widths: dict[str, int]
) -> Table:
    table = Table(title=title, title_justify="left")
    for name in names:
        is_text = name in labels
        folded = name in widths
        table.add_column(
            name, justify="left" if is_text else "right", overflow="fold", no_wrap=not folded, width=widths.get(name)
        )
    for row in frame[list(names)].itertuples(index=False):
        table.add_row(*map(str, row))
    return table
