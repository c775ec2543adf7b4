"""Pictures of a sheet and of the layers of one record, as SVG and PNG, readable in black and white."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dass_exp.errors import one_of
from dass_exp.report.console import method_label, pattern_label, scope_label
from dass_exp.report.curves import curves_of
from dass_exp.report.load import Record, block_of
from dass_exp.report.table import Entry, ResultTable
from dass_exp.report.write import format_entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#F0E442",
    "#BBBBBB",
)  # Okabe and Ito: told apart by the colour-blind
HATCHES = (
    "",
    "///",
    "\\\\\\",
    "xxx",
    "---",
    "|||",
    "+++",
    "/",
)  # straight lines: circles make an SVG ten times as large
_DASHES: tuple[Any, ...] = ("-", "-.", ":", (0, (7, 1)), (0, (3, 1, 1, 1, 1, 1)))
_UNITS = {
    "perplexity": "perplexity",
    "acc": "accuracy %",
    "acc_norm": "length-normalised accuracy %",
    "cost": "seconds or GB",
}
_AXES = {"num_samples": "calibration sequences", "seq_len": "tokens per calibration sequence", "sparsity": "sparsity %"}


def draw(sheet: ResultTable, folder: Path) -> list[Path]:
    """Draw the picture that a sheet asks for; no file where it asks for none or holds no finite number.

    Args:
        sheet: what to draw; its ``figure`` says how: ``{kind: bars}`` or ``{kind: line, x: <dotted path into the config>}``.
        folder: where ``<name>.svg`` and ``<name>.png`` are written.

    Raises:
        UserError: the kind of figure is unknown.
    """
    if sheet.figure is None:
        return []
    kind = one_of(f"{sheet.name}: figure.kind", sheet.figure.get("kind"), ("bars", "line"))
    with canvas() as figure:
        drawn = _bars(sheet, figure) if kind == "bars" else _lines(sheet, str(sheet.figure["x"]), figure)
        return save(figure, sheet.title, folder / sheet.name) if drawn else []


def draw_layers(record: Record, folder: Path) -> list[Path]:
    """Draw the relative error of each block's output and the sparsity of its linears by block; no file for a record without pruned layers.

    Args:
        record: of one run.
        folder: where ``layers-<key>.svg`` and ``.png`` are written.
    """
    errors: dict[int, float] = {}
    sparsities: dict[str, dict[int, float]] = {}
    for layer in record["sparsity"]["layers"]:
        block = int(found) if (found := block_of(layer["name"])).isdigit() else 0
        sparsities.setdefault(layer["role"], {})[block] = 100 * layer["zeros"] / layer["size"]
        errors[block] = math.nan if layer.get("block_error") is None else layer["block_error"]
    alike: dict[
        tuple[tuple[int, float], ...], list[str]
    ] = {}  # roles with the same sparsity everywhere share a line: they would hide each other
    for role, series in sparsities.items():
        alike.setdefault(tuple(sorted(series.items())), []).append(role)
    if not alike:
        return []
    config = record["config"]
    title = (config["model"]["name"], method_label(config), pattern_label(config), scope_label(config))
    with canvas() as figure:
        upper, lower = figure.subplots(2, 1, sharex=True)
        upper.plot(*zip(*sorted(errors.items()), strict=True), **_look(0))
        upper.set(ylabel="relative error of\nthe block's output", ylim=(0, None))
        for number, (points, roles) in enumerate(alike.items()):
            lower.plot(*zip(*points, strict=True), label=" " + ", ".join(roles), **_look(number))
        lower.set(xlabel="index of the block", ylabel="sparsity %", ylim=(0, 105))
        lower.xaxis.get_major_locator().set_params(integer=True)
        _legend(figure, lower)
        return save(figure, ", ".join(filter(None, title)), folder / f"layers-{record['key']}")


def _bars(sheet: ResultTable, figure: Figure) -> bool:
    """One panel a model, one group a column, one bar a row; dense as dashed lines."""
    models = list(dict.fromkeys(record["config"]["model"]["name"] for record in sheet.records))
    panels = {
        model: found for model in models if (found := [row for row in sheet.rows if row.startswith(f"{model} ")])
    } or {"": sheet.rows}
    finite = {
        place: entry for place, entry in sheet.cells.items() if isinstance(entry, Entry) and math.isfinite(entry.mean)
    }
    if not finite:
        return False
    across = 1 if len(panels) < 3 else 2
    down = math.ceil(len(panels) / across)
    width = max(6.4 if across == 1 else 5.2, 2 + 0.28 * max(map(len, panels.values())) * len(sheet.columns))
    figure.set_size_inches(min(13, across * width), 1.3 + 3.2 * down)
    panes = list(figure.subplots(down, across, squeeze=False).flat)
    for spare in panes[len(panels) :]:
        spare.set_axis_off()
    del panes[len(panels) :]
    for pane, (model, rows) in zip(panes, panels.items(), strict=True):
        pruned = [row for row in rows if not row.endswith("dense")]
        for number, row in enumerate(pruned):
            shift, width = (number - (len(pruned) - 1) / 2) * 0.8 / len(pruned), 0.8 / len(pruned)
            drawn = {
                place + shift: finite[(row, column)]
                for place, column in enumerate(sheet.columns)
                if (row, column) in finite
            }
            look = {
                "color": COLOURS[number % len(COLOURS)],
                "hatch": HATCHES[number % len(HATCHES)],
                "edgecolor": "black",
                "linewidth": 0.8,
            }
            pane.bar(
                list(drawn),
                [entry.mean for entry in drawn.values()],
                width,
                label=" " + row.removeprefix(f"{model} "),
                **look,
            )
            _error_bars(pane, drawn)
            for place, entry in enumerate(sheet.cells.get((row, column)) for column in sheet.columns):
                if entry is not None and place + shift not in drawn:
                    at, box = pane.get_xaxis_transform(), {"facecolor": "white", "edgecolor": "none", "pad": 1}
                    pane.text(
                        place + shift,
                        0.03,
                        format_entry(entry, sheet.metric),
                        transform=at,
                        rotation=90,
                        ha="center",
                        va="bottom",
                        bbox=box,
                    )
        pane.set_title(model, fontsize="medium")
        for row in (row for row in rows if row.endswith("dense")):
            _dense(
                pane,
                "dense" if len(panels) > 1 else row,
                [finite.get((row, column)) for column in sheet.columns],
                several=len(panels) > 1,
            )
        _name_columns(pane, sheet.columns, figure.get_figwidth())
        _scale(pane, sheet.metric, [entry for (row, _), entry in finite.items() if row in rows], floor=True)
    _legend(figure, *panes)
    return True


def _dense(pane: Axes, label: str, found: Sequence[Entry | None], several: bool) -> None:
    at = {place: entry.mean for place, entry in enumerate(found) if entry is not None}
    if len(set(at.values())) == 1:
        level = next(iter(at.values()))
        pane.axhline(
            level,
            color="black",
            linestyle="--",
            linewidth=1.3,
            label=f" {label}" if several else f" {label} ({level:.4g})",
        )
        if several:  # one legend for all panels: each says its own level
            pane.set_title(f"{pane.get_title()}, dense {level:.4g}", fontsize="medium")
    elif at:
        pane.hlines(
            list(at.values()),
            [x - 0.47 for x in at],
            [x + 0.47 for x in at],
            colors="black",
            linestyles="--",
            linewidth=1.3,
            label=f" {label}",
        )


def _name_columns(pane: Axes, columns: Sequence[str], inches: float) -> None:
    room = max(int(11 * (inches - 1) / max(len(columns), 1)), 8)  # characters of the default font that fit in a group
    names = [textwrap.fill(column, room, break_long_words=False) for column in columns]
    crowded = any(len(line) > room for name in names for line in name.splitlines())
    pane.set_xticks(
        range(len(columns)),
        names,
        rotation=30 if crowded else 0,
        ha="right" if crowded else "center",
        va="top",
        rotation_mode="anchor",
    )
    pane.set_xlim(-0.55, len(columns) - 0.45)


def _lines(sheet: ResultTable, axis: str, figure: Figure) -> bool:
    """One line for what varies besides ``axis``; what has no such setting, dense first of all, is a level."""
    curves, levels = curves_of(sheet, axis)
    if not curves:
        return False
    pane = figure.subplots()
    for number, (label, curve) in enumerate(curves.items()):
        pane.plot(list(curve), [entry.mean for entry in curve.values()], label=f" {label}", **_look(number))
        _error_bars(pane, curve)
    for number, (label, entry) in enumerate(levels.items()):
        pane.axhline(
            entry.mean,
            label=f" {label} ({entry.mean:.4g})",
            linestyle=(0, (5 + 4 * number, 3)),
            color="black",
            linewidth=1.3,
        )
    ticks, name = sorted({x for curve in curves.values() for x in curve}), axis.rsplit(".", 1)[-1]
    if name == "num_samples" and ticks[0] > 0:
        pane.set_xscale("log", base=2)
    if len(ticks) <= 10:
        pane.set_xticks(ticks, [f"{x:.6g}" for x in ticks])
        pane.xaxis.minorticks_off()
    pane.set_xlabel(_AXES.get(name, name.replace("_", " ")))
    _scale(pane, sheet.metric, [*(entry for curve in curves.values() for entry in curve.values()), *levels.values()])
    _legend(figure, pane)
    return True


def _look(number: int) -> dict[str, Any]:
    marks = {"marker": "os^DvPX*"[number % 8], "markersize": 6, "markeredgecolor": "black", "markeredgewidth": 0.6}
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "linewidth": 1.6,
        **marks,
    }


def _spread(entry: Entry) -> float | None:
    return entry.sd if entry.sd is not None else entry.stderr


def _error_bars(pane: Axes, drawn: dict[float, Entry]) -> None:
    known = [(x, entry.mean, spread) for x, entry in drawn.items() if (spread := _spread(entry)) is not None]
    if known:
        places, means, spreads = zip(*known, strict=True)
        pane.errorbar(places, means, spreads, fmt="none", ecolor="black", elinewidth=1, capsize=3)


def _scale(pane: Axes, metric: str, entries: Sequence[Entry], floor: bool = False) -> None:
    """Name the y axis with what its error bars are, and make it logarithmic where the range asks for it."""
    from matplotlib.ticker import LogLocator

    low, high = min((entry.mean for entry in entries), default=1), max((entry.mean for entry in entries), default=1)
    kinds = dict.fromkeys(
        "standard deviation" if entry.sd is not None else "standard error"
        for entry in entries
        if _spread(entry) is not None
    )
    logarithmic = low > 0 and high / low > 20
    notes = [*(["log scale"] if logarithmic else []), *(f"± {kind}" for kind in kinds)]
    pane.set_ylabel(_UNITS[metric] + (f"\n({', '.join(notes)})" if notes else ""))
    if logarithmic:
        pane.set_yscale("log")
        pane.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e4 else (1,)))
        pane.yaxis.set_major_formatter("{x:g}")
        pane.yaxis.set_minor_formatter("")
        pane.set_ylim(low / 1.6 if floor else None)
    pane.grid(axis="y", color="#DDDDDD", linewidth=0.6)


def _legend(figure: Figure, *panes: Axes) -> None:
    found = {label: handle for pane in panes for handle, label in zip(*pane.get_legend_handles_labels(), strict=True)}
    widest = 8 + max(map(len, found), default=0)  # in characters, of which about 13 fit in an inch; 8 for the handle
    rows = math.ceil(len(found) * widest / (13 * figure.get_figwidth()))
    names = [label[1:] for label in found]  # matplotlib leaves out labels that begin with _, so all have a space before
    figure.legend(
        list(found.values()),
        names,
        loc="outside lower center",
        ncols=math.ceil(len(found) / rows),
        frameon=False,
        handlelength=3.2,
    )


@contextmanager
def canvas() -> Iterator[Figure]:
    """A figure in the project's style; no pyplot, so no window and no global figure."""
    import matplotlib.style
    from matplotlib.figure import Figure

    own = {
        "svg.fonttype": "none",
        "svg.hashsalt": "dass_exp",
        "text.parse_math": False,
        "figure.constrained_layout.use": True,
    }
    looks = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "hatch.linewidth": 0.6,
        "figure.constrained_layout.h_pad": 0.1,
    }
    with matplotlib.style.context(["default", {**own, **looks}]):
        yield Figure(figsize=(7, 5))


def save(figure: Figure, title: str, path: Path) -> list[Path]:
    """Write the SVG, the same byte for byte each time, and the PNG; each under a temporary name first."""
    figure.suptitle(textwrap.fill(title, int(10 * figure.get_figwidth())))
    path.parent.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for ending, metadata in (
        ("svg", {"Date": None, "Creator": None, "Format": None, "Type": None}),
        ("png", {"Software": None}),
    ):
        target, scratch = path.with_name(f"{path.name}.{ending}"), path.with_name(f"{path.name}.{ending}.partial")
        figure.savefig(scratch, format=ending, dpi=150, metadata=metadata)
        os.replace(scratch, target)
        written.append(target)
    return written
