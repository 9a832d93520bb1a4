"""The pictures of the performance page: which comparisons belong together, and how a figure grows with their size.

A family is what is called alike up to the first comma. Where at least three of its comparisons differ in one size only,
they make one picture, log-log, one line per contender with its name at the line's end.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# What may be an axis, and what the axis is called. Other sizes, such as an amount of arithmetic, follow from these.
AXES = {
    "rows": "rows (patches)",
    "pixels": "pixels a side of the image",
    "channels": "channels of a patch",
    "coupling_layers": "coupling layers",
    "batch": "images in a batch",
}
FEWEST = 3  # points that make a picture
# Dark enough for text on white; the marks tell lines apart as well. Cool ones for fastbgad's contenders, warm ones and
# grey for all others; those that take part almost everywhere have the same one in every picture.
COLORS = {
    "fastbgad torch": "#0072b2",
    "fastbgad triton": "#009e73",
    "fastbgad torch compiled": "#6a51a3",
    "FrEIA 0.2 eager": "#d55e00",
    "FrEIA 0.2 compiled": "#a86f00",
    "oracle float32": "#666666",
}
OTHER_OURS, OTHERS = ("#332288", "#2a8c7c", "#3d7ea6", "#117733"), ("#b5477a", "#8c564b", "#aa4499", "#76761a")
MARKERS = "os^Dv<>p*"
# In points, 72 to the inch; a browser shows the picture 700 of its pixels wide.
WIDTH, HEIGHT = 525.0, 290.0
LEFT, BOTTOM, TOP = 46.0, 36.0, 42.0
FONT, CHARACTER = 8.5, 5.3  # size of the text, and the width of a letter at that size
LONGEST_LABEL = 36


class Family(NamedTuple):
    """Comparisons that differ in one size.

    Attributes:
        name: what they are called up to the first comma.
        axis: the size in which they differ.
        constant: the other sizes.
        results: in the order of that size.
    """

    name: str
    axis: str
    constant: dict[str, int]
    results: list[Mapping[str, Any]]

    @property
    def title(self) -> str:
        """The name with the axis, where the name does not say it already."""
        axis = f" by {_spaced(self.axis)}"
        return self.name if self.name.endswith(axis) else self.name + axis

    @property
    def slug(self) -> str:
        """For the name of a file."""
        return re.sub(r"[^a-z0-9]+", "-", " ".join(filter(None, [self.title, self.caption])).lower()).strip("-")

    @property
    def caption(self) -> str:
        """The sizes that stay the same, in words."""
        return ", ".join(
            f"batch of {value}" if key == "batch" else f"{value} {_spaced(key)}" for key, value in self.constant.items()
        )


class Line(NamedTuple):
    """One contender's figures."""

    name: str
    x: list[int]
    y: list[float]


def families(results: Sequence[Mapping[str, Any]]) -> list[Family]:
    """Everything that makes a picture, in the order of the results."""
    groups: dict[tuple[str, tuple[str, ...]], list[Mapping[str, Any]]] = {}
    for result in results:
        keys = tuple(sorted(key for key in result.get("sizes") or {} if key in AXES))
        groups.setdefault((result["name"].partition(",")[0].strip(), keys), []).append(result)
    return [family for (name, keys), members in groups.items() for family in _split(name, keys, members)]


def _split(name: str, keys: Sequence[str], members: Sequence[Mapping[str, Any]]) -> Iterator[Family]:
    """Per size, the members that agree in all other sizes; two with the same size would be two curves in one."""
    for axis in keys:
        alike: dict[tuple[int, ...], list[Mapping[str, Any]]] = {}
        for result in members:
            alike.setdefault(tuple(result["sizes"][key] for key in keys if key != axis), []).append(result)
        for values, found in alike.items():
            ordered = sorted(found, key=lambda result: result["sizes"][axis])
            if len({result["sizes"][axis] for result in ordered}) == len(ordered) >= FEWEST:
                others = [key for key in keys if key != axis]
                yield Family(name, axis, dict(zip(others, values, strict=True)), ordered)


def lines(family: Family, figure: str) -> list[Line]:
    """The lines of "median_ms" or "peak_mib"; a contender that has it at a single size makes none.

    Without a contender that has it at `FEWEST` sizes there is nothing to see, and the list is empty.
    """
    found = []
    for name in dict.fromkeys(name for result in family.results for name in result["contenders"]):
        points = [
            (result["sizes"][family.axis], result["contenders"][name][figure])
            for result in family.results
            if (result["contenders"].get(name, {}).get(figure) or 0) > 0  # a logarithmic axis has no zero
        ]
        if len(points) > 1:
            found.append(Line(name, *(list(column) for column in zip(*points, strict=True))))
    return found if any(len(line.x) >= FEWEST for line in found) else []


def picture(family: Family, drawn: Sequence[Line], unit: str) -> str:
    """The SVG file: the same lines give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever its user has set
        # Text stays text: smaller files, and sharp at any size.
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": family.slug})
        matplotlib.rcParams.update({"font.size": FONT, "font.sans-serif": ["DejaVu Sans", "Arial"]})
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), facecolor="white")
        names = [_shortened(line.name) for line in drawn]
        wide = WIDTH - LEFT - CHARACTER * max(map(len, names)) - 20
        high = HEIGHT - BOTTOM - TOP
        axes = figure.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, wide / WIDTH, high / HEIGHT))
        axes.set(xscale="log", yscale="log")
        sizes = sorted({x for line in drawn for x in line.x})
        low, top = _limits([y for line in drawn for y in line.y], 1.2, 5)
        axes.set_ylim(low, top)
        left, right = _limits(sizes, 1.0, 1.5)
        beside = (right / left) ** 0.03  # keeps the first marks off the numbers of the other axis
        left, right = left / beside, right * beside
        axes.set_xlim(left, right)
        marks = round_marks(low, top)
        both = (sizes, _labels(sizes, wide, (left, right))), (marks, [f"{mark:g}" for mark in marks])
        for axis, (values, texts) in zip((axes.xaxis, axes.yaxis), both, strict=True):
            axis.set_major_locator(FixedLocator(values))
            axis.set_major_formatter(FixedFormatter(texts))
            axis.set_minor_locator(NullLocator())
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#999999")
        axes.tick_params(colors="#444444", length=0)
        axes.tick_params(axis="x", length=3, color="#999999")
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_xlabel(AXES[family.axis], color="#444444")
        free = {True: itertools.cycle(OTHER_OURS), False: itertools.cycle(OTHERS)}
        ends = [math.log(line.y[-1] / low) / math.log(top / low) for line in drawn]
        heights = spread(ends, 11.5 / high)
        for line, name, marker, end, height in zip(drawn, names, itertools.cycle(MARKERS), ends, heights, strict=False):
            color = COLORS.get(line.name) or next(free[line.name.startswith("fastbgad")])
            axes.plot(line.x, line.y, color=color, marker=marker, markersize=4, linewidth=1.5, clip_on=False, zorder=3)
            # from the last point to the name, which may have had to move, or whose line may end early
            start = _share(line.x[-1], (left, right))
            axes.plot(
                [start, 1 + 8 / wide],
                [end, height],
                transform=axes.transAxes,
                color=color,
                linewidth=0.6,
                linestyle=(0, (2, 2)),
                clip_on=False,
            )
            axes.text(1 + 10 / wide, height, name, transform=axes.transAxes, color=color, va="center_baseline")
        head = {"color": "#222222", "transform": figure.transFigure}
        axes.text(8 / WIDTH, 1 - 15 / HEIGHT, family.title, fontsize=10.5, fontweight="bold", **head)
        axes.text(8 / WIDTH, 1 - 29 / HEIGHT, ", ".join(filter(None, [unit, family.caption])), **head)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    # matplotlib ends some lines with blanks, which git would complain about.
    return re.sub(r"[ \t]+\n", "\n", buffer.getvalue())


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Return heights in [0, 1] near the wanted ones, in the same order, at least `gap` apart if there is room."""
    gap = min(gap, 1 / max(1, len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = [min(max(wanted[index], 0.0), 1.0) for index in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    # What was pushed out at the top comes back, and pushes down what is below it.
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], 1.0 if i == len(placed) - 1 else placed[i + 1] - gap)
    heights = [0.0] * len(wanted)
    for index, height in zip(order, placed, strict=True):
        heights[index] = height
    return heights


def round_marks(low: float, high: float) -> list[float]:
    """Round numbers between low and high for a logarithmic axis: about three to eight of them."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [[1, 2, 3, 5], [1, 2, 5], [1, 3], [1]]
    for digits in choices:
        found = [digit * 10.0**decade for decade in decades for digit in digits]
        found = [mark for mark in found if low <= mark <= high]
        if len(found) <= 8:
            return found
    return found[:: -(-len(found) // 8)]


def _limits(values: Sequence[float], room: float, least: float) -> tuple[float, float]:
    """Ends of an axis around the values, `room` beyond them as a factor, and at least `least` apart."""
    low, high = min(values) / room, max(values) * room
    missing = math.sqrt(max(1.0, least * low / high))
    return low / missing, high * missing


def _labels(values: Sequence[int], wide: float, limits: tuple[float, float]) -> list[str]:
    """The values as text; one that would run into the one before it is left out."""
    texts, free = [], -math.inf
    for value in values:
        text = f"{value // 1_000_000}M" if value >= 1_000_000 and value % 1_000_000 == 0 else str(value)
        middle, half = wide * _share(value, limits), 0.5 * CHARACTER * len(text)
        texts.append(text if middle - half > free else "")
        free = middle + half + CHARACTER if texts[-1] else free
    return texts


def _share(value: float, limits: tuple[float, float]) -> float:
    """Return the position of a value on a logarithmic axis, from 0 to 1."""
    return math.log(value / limits[0]) / math.log(limits[1] / limits[0])


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1].rstrip()}…"


def _spaced(key: str) -> str:
    return key.replace("_", " ")
