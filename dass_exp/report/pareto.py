"""A figure of the metric against the seconds of pruning, one point for each combination of method and stages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dass_exp.config.settings import OPTIONAL_GROUPS
from dass_exp.report.console import method_label, pattern_label
from dass_exp.report.metrics import Metric, metric_of
from dass_exp.report.styles import Style, display, styles_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dass_exp.report.table import ResultTable

_WIDE = 5  # ratio of the largest number to the smallest from which on ticks stand at 1, 2, 5, 10, ...
_MARKERS = "osD^vPX*h<>pd"
_POINT: dict[str, Any] = {"s": 55, "edgecolor": "black", "linewidth": 0.6, "zorder": 3}
_FRONT: dict[str, Any] = {"color": "#888888", "linewidth": 1.2, "linestyle": "-", "zorder": 2}


@dataclass(frozen=True)
class Point:
    """A combination: its method and its stages, mean seconds of pruning, and mean score over seeds."""

    method: str
    stages: str
    seconds: float
    score: float


def draw_pareto(table: ResultTable, figure: Figure) -> bool:
    """Draw one panel per pattern: colours are methods, markers their stages, a line joins those that none beats."""
    panels = {pattern: found for pattern in table.columns if (found := pareto_points(table, pattern))}
    if not panels:
        return False
    points = [point for found in panels.values() for point in found.values()]
    methods = styles_of(dict.fromkeys(point.method for point in points))
    stages = sorted({point.stages for point in points}, key=lambda name: (len(name), name))
    markers = {name: _MARKERS[number % len(_MARKERS)] for number, name in enumerate(stages)}
    figure.set_size_inches(min(13, 3 + 4.2 * len(panels)), 5.2)
    panes = figure.subplots(1, len(panels), squeeze=False).flat
    for pane, (pattern, found) in zip(panes, panels.items(), strict=True):
        _draw_panel(pane, found, metric_of(table.metric), (methods, markers))
        pane.set_title(pattern, fontsize="medium")
    _add_legends(figure, methods, markers)
    return True


def _draw_panel(
    pane: Axes, points: Mapping[str, Point], metric: Metric, shown: tuple[Mapping[str, Style], Mapping[str, str]]
) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    methods, markers = shown
    best = [points[label] for label in front(points, metric.higher)]
    pane.plot([point.seconds for point in best], [point.score for point in best], **_FRONT)
    for point in points.values():
        style: dict[str, Any] = {"color": methods[point.method].colour, "marker": markers[point.stages]}
        pane.scatter(point.seconds, point.score, **style, **_POINT)
    pane.set(xscale="log", xlabel="seconds to prune (log scale)", ylabel=metric.axis)
    if metric.ratio:
        pane.set(yscale="log", ylabel=f"{metric.axis} (log scale)")
    for axis, values in (
        (pane.xaxis, [point.seconds for point in points.values()]),
        (pane.yaxis, [point.score for point in points.values()]),
    ):
        wide = axis.get_scale() == "log" and max(values) > _WIDE * min(values)
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(5))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    pane.grid(color="#DDDDDD", linewidth=0.6)


def _add_legends(figure: Figure, methods: Mapping[str, Style], markers: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    def handle(label: str, marker: str, colour: str) -> Line2D:
        drawn = {"marker": marker, "markeredgecolor": "black", "markeredgewidth": 0.6, "linestyle": "none"}
        return Line2D([], [], label=f" {display(label)}", color=colour, **drawn)  # type: ignore[arg-type]

    of_methods = [handle(method, "o", style.colour) for method, style in methods.items()]
    of_stages = [handle(stages or "no stage", marker, "white") for stages, marker in markers.items()]
    figure.legend(handles=[*of_methods, *of_stages], loc="outside right upper", frameon=False, fontsize="small")


def pareto_points(table: ResultTable, pattern: str) -> dict[str, Point]:
    """Return the points of a pattern by label: the method and its stages with all their settings."""
    values: dict[str, list[tuple[float, float]]] = {}
    names: dict[str, tuple[str, str]] = {}
    for record in table.records:
        config = record["config"]
        if pattern_label(config) == pattern and record["key"] in table.headlines:
            label = method_label(config)
            values.setdefault(label, []).append((record["cost"]["prune_s"], table.headlines[record["key"]]))
            stages = " + ".join(config[group]["name"] for group in OPTIONAL_GROUPS if config.get(group))
            names[label] = config["method"]["name"], stages
    points = {
        label: Point(*names[label], *(math.fsum(column) / len(pairs) for column in zip(*pairs, strict=True)))
        for label, pairs in values.items()
    }
    return {label: point for label, point in points.items() if math.isfinite(point.score) and point.seconds > 0}


def front(points: Mapping[str, Point], higher: bool = False) -> list[str]:
    """Return the labels of the points that no other one beats in both numbers, from the fastest to the slowest.

    Args:
        points: by label.
        higher: whether a higher score is better.
    """
    best, labels, sign = math.inf, [], -1 if higher else 1
    for label, point in sorted(points.items(), key=lambda entry: (entry[1].seconds, sign * entry[1].score)):
        if sign * point.score < best:
            best = sign * point.score
            labels.append(label)
    return labels
