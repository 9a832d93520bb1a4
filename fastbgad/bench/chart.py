"""Chart of throughput rows: one stacked bar of milliseconds per image for every row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, MissingDependencyError
from ..system.files import write_with
from .rows import Row, figure_text
from .stages import BACKBONE, DECODE, METRICS, SCORING, UPLOAD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".svg")
_COLORS = {
    DECODE: "#7d8794",
    UPLOAD: "#bcc3cc",
    BACKBONE: "#2c5f8d",
    SCORING: "#3f8f6b",
    METRICS: "#b59fd6",
}
# The flows from fine to coarse levels; from the fifth on the colors repeat.
_FLOW_COLORS = ("#c8413b", "#e3774f", "#f0a96b", "#f7d3a0")
_DARK = {"#7d8794", "#2c5f8d", "#3f8f6b", "#c8413b"}  # white figures can be read on these

_WIDTH, _BAR, _MARGIN = 8.5, 0.42, 0.75  # inches: the chart, each bar, around each panel
_LEGEND_COLUMNS = 8
_NARROWEST_LABELED = 0.07  # of a panel's width


def check_chart_path(path: Path) -> None:
    """Raise an error where a chart cannot be written, before the work.

    Raises:
        ConfigError: the file is neither .png nor .svg.
        MissingDependencyError: matplotlib is not installed.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"the chart {path} is neither .png nor .svg; name it with one of these")
    _figure_class()


def write_throughput_chart(path: Path, rows: Sequence[Row]) -> None:
    """Draw all rows that did not fail, a panel per image size, each with its own scale; PNG or SVG by the suffix.

    Raises:
        OutputError: the file cannot be written. ConfigError, MissingDependencyError: see `check_chart_path`.
    """
    check_chart_path(path)
    figure = throughput_figure([row for row in rows if row.failed is None])
    write_with(path, lambda temporary: figure.savefig(temporary, dpi=160))


def throughput_figure(rows: Sequence[Row]) -> Figure:
    """Return the chart of rows that did not fail."""
    panels: dict[int, list[Row]] = {}
    for row in rows:
        panels.setdefault(row.image_size, []).append(row)
    heights = [_BAR * len(panel) + _MARGIN for panel in panels.values()]
    figure = _figure_class()(figsize=(_WIDTH, sum(heights) + 0.8), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    names = list(dict.fromkeys(name for row in rows for name, stage in row.stages.items() if stage.ms_per_image))
    colors = _colors_of(names)
    for axes, (side, panel) in zip(all_axes, panels.items(), strict=True):
        _draw_panel(axes, panel, names, colors)
        axes.set_title(f"{side} x {side} pixels", loc="left", fontsize=10, fontweight="bold")
    median = "median latency" if rows and rows[0].mode == "latency" else "median time per image"
    all_axes[-1].set_xlabel(f"{median} in ms" + ("; every panel has its own scale" if len(panels) > 1 else ""))
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=min(len(labels), _LEGEND_COLUMNS),
        frameon=False,
        fontsize=8.5,
        handlelength=1,
        handleheight=1,
        columnspacing=1.2,
    )
    return figure


def _draw_panel(axes: Axes, rows: Sequence[Row], names: Sequence[str], colors: dict[str, str]) -> None:
    sums = [sum(stage.ms_per_image or 0.0 for stage in row.stages.values()) for row in rows]
    positions = range(len(rows))
    left = [0.0] * len(rows)
    for name in names:
        widths = [(row.stages[name].ms_per_image or 0.0) if name in row.stages else 0.0 for row in rows]
        axes.barh(positions, widths, left=left, height=0.68, color=colors[name], label=name)
        for position, width in zip(positions, widths, strict=True):
            if width > _NARROWEST_LABELED * max(sums):
                ink = "white" if colors[name] in _DARK else "black"
                middle = left[position] + width / 2
                axes.text(middle, position, figure_text(width), ha="center", va="center", color=ink, fontsize=8)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for position, row in zip(positions, rows, strict=True):
        assert row.total is not None
        text = f"{figure_text(row.total.ms_per_image)} ms"
        if row.total.p99_ms is not None:
            text = f"median {text}, 99th percentile {figure_text(row.total.p99_ms)} ms"
        axes.text(left[position], position, f" {text}", ha="left", va="center", fontsize=9, fontweight="bold")
    axes.set_yticks(list(positions), [f"batch {row.batch_size}" for row in rows])
    stretch = 1.2 if rows[0].mode == "throughput" else 1.75  # for the text of the totals
    axes.set_xlim(0, stretch * max(sums))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e3e6ea", linewidth=0.7)
    axes.set_axisbelow(True)


def _colors_of(names: Sequence[str]) -> dict[str, str]:
    flows = [name for name in names if name not in _COLORS]
    shades = {name: _FLOW_COLORS[number % len(_FLOW_COLORS)] for number, name in enumerate(flows)}
    return {name: shades[name] if name in shades else _COLORS[name] for name in names}


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "report", "the chart") from error
    return Figure
