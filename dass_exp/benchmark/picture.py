"""The picture of ``make bench``: the floor, and what each method spends on top of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dass_exp.benchmark.table import PARTS
from dass_exp.report.figures import COLOURS, HATCHES, canvas, save


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """Stacked bars of seconds; ``speed.svg`` and ``speed.png``.

    Args:
        found: as :func:`dass_exp.benchmark.__main__.measure` gives it.
        folder: where they are written.
    """
    floor, methods = found["floor_s"]["median"], found["methods"]
    with canvas() as figure:
        figure.set_size_inches(7.5, 3.4)
        pane = figure.subplots()
        names = ["floor", *methods]
        left = [0.0] * len(names)
        for number, part in enumerate(PARTS):
            widths = [floor if part == "forward" else 0.0, *(max(of[part], 0.0) for of in methods.values())]
            look: dict[str, Any] = {
                "color": COLOURS[number % len(COLOURS)],
                "hatch": HATCHES[number % len(HATCHES)],
                "edgecolor": "black",
                "linewidth": 0.6,
            }
            pane.barh(names, widths, left=left, label=part, **look)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for row, (name, end) in enumerate(zip(names, left, strict=True)):
            pane.text(end, row, f"  {found['ratios_to_floor'][name]:.2f}" if row else "  1", va="center")
        pane.axvline(floor, color="black", linestyle="--", linewidth=1)
        pane.invert_yaxis()
        pane.set(xlabel="seconds (beside each bar: its ratio to the floor)", xlim=(0, 1.12 * max(left)))
        figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False)
        settings = found["settings"]
        return save(
            figure,
            f"Pruning {settings['model']} to {settings['pattern']}, {settings['samples']} x {settings['length']} tokens",
            folder / "speed",
        )
