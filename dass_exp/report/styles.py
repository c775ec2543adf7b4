"""How methods are shown, the same in every figure and table: display name, colour, hatch, marker and dash."""

import hashlib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

# Okabe and Ito: distinguishable by the colour-blind
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#BBBBBB")
# straight lines: circles make an SVG ten times as large
_HATCHES = ("", "///", "\\\\\\", "xxx", "---", "|||", "+++", "/")
_DASHES: tuple[Any, ...] = ("-", "-.", ":", (0, (7, 1)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = "os^DvPX*"
_MORE_HATCHES = ("", "--", "||", "xx", "//", "++")  # on top of a method's own, for further rows of that method
_PALEST = 0.55  # how much white the last of several rows of a method has


@dataclass(frozen=True)
class Style:
    """Colour and hatch of bars; colour, marker and dash of lines."""

    colour: str
    hatch: str
    marker: str
    dash: int = 0  # index of the dashes

    @property
    def bar(self) -> dict[str, Any]:
        """What ``Axes.bar`` takes."""
        return {"color": self.colour, "hatch": self.hatch}

    @property
    def line(self) -> dict[str, Any]:
        """What ``Axes.plot`` takes."""
        return {"color": self.colour, "marker": self.marker, "linestyle": _DASHES[self.dash % len(_DASHES)]}


_METHODS = {
    "dass": Style("#0072B2", "", "o", 0),
    "wanda": Style("#E69F00", "///", "s", 1),
    "sparsegpt": Style("#009E73", "\\\\\\", "^", 2),
    "magnitude": Style("#BBBBBB", "xxx", "D", 3),
    "ria": Style("#CC79A7", "---", "v", 4),
    "glu_wanda": Style("#D55E00", "|||", "P", 0),
    "admm": Style("#56B4E9", "+++", "X", 1),
    "alps": Style("#F0E442", "/", "*", 2),
    "thanos": Style("#882255", "\\", "h", 3),
}
# For methods of plugins and for whatever else a figure compares, chosen by name.
_FREE = (
    Style("#332288", "xx", "p", 1),
    Style("#44AA99", "--", "<", 2),
    Style("#999933", "||", ">", 3),
    Style("#AA4499", "++", "d", 4),
    Style("#661100", "//", "H", 0),
    Style("#6699CC", "\\\\", "8", 1),
    Style("#117733", "x", "P", 2),
    Style("#DDCC77", "-", "s", 3),
)
_NAMES = {
    "dass": "DaSS",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "magnitude": "Magnitude",
    "ria": "RIA",
    "glu_wanda": "GLU-Wanda",
    "admm": "ADMM",
    "alps": "ALPS",
    "thanos": "Thanos",
    "dsnot": "DSnoT",
    "owl": "OWL",
    "alpha": "AlphaPruning",
    "least_squares": "least squares",
}
_WORDS = re.compile(rf"(?<![\w=.:-])(?:{'|'.join(_NAMES)})(?![\w=.:-])")


def display(label: str) -> str:
    """Return a label with the names of methods and stages as papers write them: ``2:4 dass`` is ``2:4 DaSS``."""
    return _WORDS.sub(lambda match: _NAMES[match.group()], label)


def series_style(number: int) -> Style:
    """Return the style of the lines or bars of a figure that compares no methods, by their position."""
    colour, hatch, marker = (choices[number % len(choices)] for choices in (_COLOURS, _HATCHES, _MARKERS))
    return Style(colour, hatch, marker, number)


def styles_of(labels: Iterable[str], methods: Collection[str] = ()) -> dict[str, Style]:
    """Return the style of each label of a figure, which does not depend on their order.

    A label that names a method has the method's style; further labels of that method have a paler colour, another
    hatch and another dash. A name that has no style of its own gets one of those that are free, chosen by the name.

    Args:
        labels: of rows or curves.
        methods: names of methods beside those of this project, such as a plugin's.
    """
    by_name: dict[str, list[str]] = {}
    for label in sorted(set(labels)):
        by_name.setdefault(_name_in(label, {*_METHODS, *methods}), []).append(label)
    styles = {**_METHODS, **_free_styles(name for name in by_name if name not in _METHODS)}
    return {
        label: _variant(styles[name], number, len(same))
        for name, same in by_name.items()
        for number, label in enumerate(same)
    }


def _name_in(label: str, methods: Collection[str]) -> str:
    """Return the method that a label names, or the label."""
    words = label.replace(",", " ").split()
    return next((word for word in words if word in methods), label)


def _free_styles(names: Iterable[str]) -> dict[str, Style]:
    """Return free styles by name: the one that the hash of the name chooses or, where it is taken, the next."""
    styles: dict[str, Style] = {}
    for name in sorted(names):
        first = int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(_FREE)
        ordered = [*_FREE[first:], *_FREE[:first]]
        styles[name] = next((style for style in ordered if style not in styles.values()), ordered[0])
    return styles


def _variant(style: Style, number: int, count: int) -> Style:
    """Return the style of one of several labels of a method; that of the first is the method's own."""
    if number == 0:
        return style
    pale = _PALEST * number / (count - 1)
    parts = (int(style.colour[place : place + 2], 16) for place in (1, 3, 5))
    colour = "#" + "".join(f"{round(part + pale * (255 - part)):02X}" for part in parts)
    hatch = style.hatch + _MORE_HATCHES[number % len(_MORE_HATCHES)]
    return replace(style, colour=colour, hatch=hatch, dash=style.dash + number)
