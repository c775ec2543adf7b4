"""Figures of a table and of the layers of one record, as SVG, PNG and PDF, readable in black and white."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dass_exp.errors import one_of
from dass_exp.report.console import labels
from dass_exp.report.curves import curves_of
from dass_exp.report.load import Record, block_of, model_name
from dass_exp.report.metrics import metric_of
from dass_exp.report.pareto import draw_pareto
from dass_exp.report.styles import Style, display, series_style, styles_of
from dass_exp.report.table import ResultTable, TableValue, is_finite
from dass_exp.report.write import format_value
from dass_exp.storage.durable import scratch_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AXES = {"num_samples": "calibration sequences", "seq_len": "tokens per calibration sequence", "sparsity": "sparsity %"}
_POWERS_OF_2 = ("num_samples", "seq_len")
_ROUNDING = 1e-7  # nats: a divergence of a model from itself
_DECADE = 10  # values whose largest is this many times their smallest are drawn on a log axis
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dass_exp",
    "text.parse_math": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.6,
}
_LINE: dict[str, Any] = {"linewidth": 1.6, "markersize": 6, "markeredgecolor": "black", "markeredgewidth": 0.6}
_DENSE: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.3}


def draw(table: ResultTable, folder: Path) -> list[Path]:
    """Draw a table as its ``figure`` says: ``{kind: bars}``, ``{kind: line, x: <dotted path into the config>}``,
    ``{kind: pareto}``, the metric against the seconds of pruning, or ``{kind: steps}``, against those of a retraining.

    Writes no file if it has none or if no number is finite; raises a UserError for an unknown kind.
    """
    if table.figure is None:
        return []
    kind = one_of(f"{table.name}: figure.kind", table.figure.get("kind"), ("bars", "line", "pareto", "steps"))
    with canvas() as figure:
        if kind == "steps":
            drawn = _draw_steps(table, figure)
        elif kind == "line":
            drawn = _draw_lines(table, str(table.figure["x"]), figure)
        else:
            drawn = (_draw_bars if kind == "bars" else draw_pareto)(table, figure)
        return save(figure, table.title, folder / table.name) if drawn else []


def draw_layers(record: Record, folder: Path) -> list[Path]:
    """Draw the relative error of each block's output and the sparsity of its linears; no file for dense."""
    errors: dict[int, float] = {}
    sparsities: dict[str, dict[int, float]] = {}
    for layer in record["sparsity"]["layers"]:
        block = int(index) if (index := block_of(layer["name"])).isdigit() else 0
        sparsities.setdefault(layer["role"], {})[block] = 100 * layer["zeros"] / layer["size"]
        errors[block] = math.nan if layer.get("block_error") is None else layer["block_error"]
    if not errors:
        return []
    # roles with the same sparsity in all blocks share a line: their lines would hide each other
    roles: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for role, series in sparsities.items():
        roles.setdefault(tuple(sorted(series.items())), []).append(role)
    with canvas() as figure:
        upper, lower = figure.subplots(2, 1, sharex=True)
        upper.plot(*zip(*sorted(errors.items()), strict=True), **_LINE, **series_style(0).line)
        upper.set(ylabel="relative error of\nthe block's output", ylim=(0, None))
        for number, (points, names) in enumerate(roles.items()):
            lower.plot(*zip(*points, strict=True), label=" " + ", ".join(names), **_LINE, **series_style(number).line)
        lower.set(xlabel="index of the block", ylabel="sparsity %", ylim=(0, 105))
        lower.xaxis.get_major_locator().set_params(integer=True)
        _add_legend(figure, lower)
        return save(figure, ", ".join(labels(record)), folder / f"layers-{record['key']}")


def _draw_bars(table: ResultTable, figure: Figure) -> bool:
    """Draw one panel per model, one group per column, one bar per row; dense as dashed lines."""
    if not any(is_finite(value) for value in table.cells.values()):
        return False
    models = dict.fromkeys(map(model_name, table.records))
    by_model = {model: [row for row in table.rows if row.startswith(f"{model} ")] for model in models}
    panels = {model: rows for model, rows in by_model.items() if rows} or {"": table.rows}
    across = 1 if len(panels) < 3 else 2
    down = math.ceil(len(panels) / across)
    width = max(6.4 if across == 1 else 5.2, 2 + 0.28 * max(map(len, panels.values())) * len(table.columns))
    figure.set_size_inches(min(13, across * width), 1.3 + 3.2 * down)
    panes = list(figure.subplots(down, across, squeeze=False).flat)
    shown = {row.removeprefix(f"{model} ") for model, rows in panels.items() for row in rows}
    styles = styles_of((row for row in shown if not row.endswith("dense")), _methods(table))
    for spare in panes[len(panels) :]:
        spare.set_axis_off()
    for pane, (model, rows) in zip(panes, panels.items(), strict=False):
        pane.set_title(model, fontsize="medium")
        values = [value for (row, _), value in table.cells.items() if row in rows and is_finite(value)]
        _draw_panel(pane, table, model, rows, styles)
        _name_columns(pane, table.columns, figure.get_figwidth())
        _set_scale(pane, table.metric, values, floor=True)
    _add_legend(figure, *panes)
    return True


def _methods(table: ResultTable) -> set[str]:
    return {record["config"]["method"]["name"] for record in table.records}


def _draw_panel(pane: Axes, table: ResultTable, model: str, rows: Sequence[str], styles: Mapping[str, Style]) -> None:
    """Draw the bars and dense lines of one model; its name is empty if there are no panels of others.

    A bar shows its value by its length, which a log axis has no zero for: there the values are dots.
    """
    several = len(pane.figure.axes) > 1
    pruned = [row for row in rows if not row.endswith("dense")]
    width = 0.8 / max(len(pruned), 1)
    as_dots = _is_logarithmic(
        table.metric, [table.cells.get((row, column)) for row in rows for column in table.columns]
    )
    for number, row in enumerate(pruned):
        shift = (number - (len(pruned) - 1) / 2) * width
        cells = {place + shift: table.cells.get((row, column)) for place, column in enumerate(table.columns)}
        values = {x: value for x, value in cells.items() if value is not None}
        bars = {x: value for x, value in values.items() if is_finite(value)}
        means = [value.mean for value in bars.values()]
        name = row.removeprefix(f"{model} ")
        label = f" {display(name)}"
        if as_dots:
            dots = {**_LINE, "markersize": 8, **styles[name].line, "linestyle": "none"}
            pane.plot(list(bars), means, label=label, **dots)
        else:
            pane.bar(list(bars), means, width, label=label, edgecolor="black", linewidth=0.8, **styles[name].bar)
        _draw_spread(pane, bars)
        for x, value in values.items():
            if x not in bars:
                word = format_value(value, table.metric)  # in the place of the bar, such as "failed"
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                at = pane.get_xaxis_transform()
                pane.text(x, 0.03, word, transform=at, rotation=90, ha="center", va="bottom", bbox=box)
    for row in (row for row in rows if row.endswith("dense")):
        dense = {place: table.cells.get((row, column)) for place, column in enumerate(table.columns)}
        levels = {place: value.mean for place, value in dense.items() if is_finite(value)}
        _draw_dense(pane, "dense" if several else row, levels, several)


def _draw_dense(pane: Axes, label: str, levels: Mapping[int, float], several: bool) -> None:
    if len(set(levels.values())) == 1:
        level = next(iter(levels.values()))
        pane.axhline(level, label=f" {label}" if several else f" {label} ({level:.4g})", **_DENSE)
        if several:  # all panels share one legend, so each shows its own level
            pane.set_title(f"{pane.get_title()}, dense {level:.4g}", fontsize="medium")
    elif levels:
        left, right = [x - 0.47 for x in levels], [x + 0.47 for x in levels]
        style = {f"{name}s": value for name, value in _DENSE.items() if name != "linewidth"}
        pane.hlines(list(levels.values()), left, right, linewidth=_DENSE["linewidth"], label=f" {label}", **style)


def _name_columns(pane: Axes, columns: Sequence[str], inches: float) -> None:
    room = max(int(11 * (inches - 1) / max(len(columns), 1)), 8)  # characters of the default font that fit in a group
    names = [textwrap.fill(display(column), room, break_long_words=False) for column in columns]
    crowded = any(len(line) > room for name in names for line in name.splitlines())
    place: Any = {"rotation": 30, "ha": "right"} if crowded else {"rotation": 0, "ha": "center"}
    pane.set_xticks(range(len(columns)), names, va="top", rotation_mode="anchor", **place)
    pane.set_xlim(-0.55, len(columns) - 0.45)


def _draw_lines(table: ResultTable, x_axis: str, figure: Figure) -> bool:
    """Draw one line per curve, and a horizontal one for records without the setting ``x_axis``, such as dense."""
    curves, baselines = curves_of(table, x_axis)
    if not curves:
        return False
    pane = figure.subplots()
    styles = styles_of(curves, _methods(table))
    for label, curve in curves.items():
        means = [value.mean for value in curve.values()]
        pane.plot(list(curve), means, label=f" {display(label)}", **_LINE, **styles[label].line)
        _draw_spread(pane, curve)
    for number, (label, baseline) in enumerate(baselines.items()):
        style = {**_DENSE, "linestyle": (0, (5 + 4 * number, 3))}
        pane.axhline(baseline.mean, label=f" {display(label)} ({baseline.mean:.4g})", **style)
    ticks, name = sorted({x for curve in curves.values() for x in curve}), x_axis.rsplit(".", 1)[-1]
    if ticks[0] > 0 and name != "sparsity" and (name in _POWERS_OF_2 or ticks[-1] >= _DECADE * ticks[0]):
        pane.set_xscale("log", base=2 if name in _POWERS_OF_2 else 10)
    if len(ticks) <= 10:
        pane.set_xticks(ticks, [f"{x:.6g}" for x in ticks])
        pane.xaxis.minorticks_off()
    pane.set_xlabel(_AXES.get(name, name.replace("_", " ")))
    values = [value for curve in curves.values() for value in curve.values()]
    _set_scale(pane, table.metric, [*values, *baselines.values()])
    _add_legend(figure, pane)
    return True


def _draw_steps(table: ResultTable, figure: Figure) -> bool:
    """Draw the course of each row's training, with a band of one standard deviation over seeds; dense as a line."""
    steps = {column: int(column.rpartition(" ")[2]) for column in table.columns}
    curves = {
        row: {step: value for column, step in steps.items() if is_finite(value := table.cells.get((row, column)))}
        for row in table.rows
    }
    trained = {row: curve for row, curve in curves.items() if curve and not row.endswith("dense")}
    if not trained:
        return False
    pane, styles = figure.subplots(), styles_of(trained, _methods(table))
    for row, curve in trained.items():
        means = [value.mean for value in curve.values()]
        pane.plot(list(curve), means, label=f" {display(row)}", **_LINE, **styles[row].line)
        if all(value.sd is not None for value in curve.values()):
            low, high = ([value.mean + sign * (value.sd or 0) for value in curve.values()] for sign in (-1, 1))
            pane.fill_between(list(curve), low, high, color=styles[row].colour, alpha=0.2, linewidth=0)
    for row in set(curves) - set(trained):
        _draw_dense(pane, row, {step: value.mean for step, value in curves[row].items()}, several=False)
    later = sorted({step for curve in trained.values() for step in curve if step})
    if later and later[-1] >= _DECADE * later[0]:
        pane.set_xscale("symlog", linthresh=later[0])
    pane.set_xticks([0, *later], [str(step) for step in (0, *later)])
    pane.xaxis.minorticks_off()
    if later:
        pane.set_xlim(-later[0] / 4, 1.2 * later[-1])
    pane.set_xlabel("steps of training")
    _set_scale(pane, table.metric, [value for curve in trained.values() for value in curve.values()])
    _add_legend(figure, pane)
    return True


def _draw_spread(pane: Axes, values: Mapping[float, TableValue]) -> None:
    known = [(x, value.mean, value.spread) for x, value in values.items() if value.spread is not None]
    if known:
        places, means, spreads = zip(*known, strict=True)
        pane.errorbar(places, means, spreads, fmt="none", ecolor="black", elinewidth=1, capsize=3)


def _set_scale(pane: Axes, metric: str, values: Sequence[TableValue], floor: bool = False) -> None:
    """Label the y axis with what its error bars are, and make it logarithmic where ratios count and span a decade."""
    from matplotlib.ticker import LogLocator

    means = [value.mean for value in values] or [1]
    low, high = min(means), max(means)
    spread = [value for value in values if value.spread is not None]
    kinds = ["standard deviation" if value.sd is not None else "standard error" for value in spread]
    described = metric_of(metric)
    logarithmic = _is_logarithmic(metric, values)
    notes = [*(["log scale"] if logarithmic else []), *(f"± {kind}" for kind in dict.fromkeys(kinds))]
    pane.set_ylabel(described.axis + (f"\n({', '.join(notes)})" if notes else ""))
    if logarithmic:
        pane.set_yscale("log")
        pane.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e4 else (1,)))
        pane.yaxis.set_major_formatter("{x:g}")
        pane.yaxis.set_minor_formatter("")
        pane.set_ylim(low / 1.6 if floor else None)
    pane.grid(axis="y", color="#DDDDDD", linewidth=0.6)


def _is_logarithmic(metric: str, values: Sequence[Any]) -> bool:
    """Whether values belong on a log axis: equal ratios mean equal steps, and they span a decade."""
    means = [value.mean for value in values if is_finite(value)]
    if not means or not metric_of(metric).ratio:
        return False
    zero = _ROUNDING if metric.partition(":")[0] == "kl" else 0.0
    return min(means) > zero and max(means) >= _DECADE * min(means)


def _add_legend(figure: Figure, *panes: Axes) -> None:
    handles = {label: handle for pane in panes for handle, label in zip(*pane.get_legend_handles_labels(), strict=True)}
    widest = 11 + max(map(len, handles), default=0)  # in characters, of which about 13 fit in an inch; 11: the handle
    fitting = max(1, int(13 * figure.get_figwidth() / widest))
    rows = math.ceil(len(handles) / fitting)
    labels = [label[1:] for label in handles]  # matplotlib skips labels that begin with _, so all begin with a space
    style: Any = {"loc": "outside lower center", "frameon": False, "handlelength": 3.2}
    figure.legend(list(handles.values()), labels, ncols=math.ceil(len(handles) / rows), **style)


@contextmanager
def canvas() -> Iterator[Figure]:
    """Yield a figure in the project's style; without pyplot, so no window and no global figure."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _STYLE]):
        yield Figure(figsize=(7, 5))


def save(figure: Figure, title: str, path: Path) -> list[Path]:
    """Write a figure as SVG and PDF, byte for byte the same each time, and as PNG; each atomically.

    The title stands in the metadata of PNG and PDF: a picture stands below a heading or above a caption of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    svg = {"Date": None, "Creator": None, "Format": None, "Type": None}
    pdf = {"Title": title, "CreationDate": None, "Creator": None, "Producer": None}
    written: list[Path] = []
    for ending, metadata in (("svg", svg), ("png", {"Title": title, "Software": None}), ("pdf", pdf)):
        target = path.with_name(f"{path.name}.{ending}")
        with scratch_file(target, durable=False) as scratch:
            figure.savefig(scratch, format=ending, dpi=150, metadata=metadata)
        written.append(target)
    return written
