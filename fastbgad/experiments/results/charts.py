"""Charts of the experiments: published against ours for every row of a table, and a sweep's metrics over its values.

Each has two panels on the same axes: the last epoch, then the best epoch on the test set.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...render.svg import BOUNDARY, INK, SERIES, Chart, drawn_svg, inside_page, new_panels
from ..plan import METRICS, Value
from .matrix import Matrix, matrix_of
from .summary import SELECTIONS, Estimate, Measured, Summary, SweepSummary, TableRow, TableSummary
from .texts import method_text, value_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABEL_LETTERS, _TICK_LETTERS = 48, 44  # that fit below a sweep's chart
# One more than there are colors, so that more methods than colors still differ.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_PUBLISHED_NOTE = "Filled: ours, with the deviation over seeds. Hollow: published."
_NO_RESULTS = "Nothing to draw yet: no seed is complete."


class Drawing(NamedTuple):
    """A chart for the page, and the same chart for a file."""

    name: str
    """Of its file, without the suffix."""
    chart: Chart
    svg: str
    """As `drawn_svg` returns it; empty where there is nothing to draw."""


def drawings_of(summary: Summary) -> Iterator[Drawing]:
    """Yield a drawing for every metric of the table or sweep.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    for metric in METRICS if isinstance(summary, SweepSummary) else summary.metrics:
        if isinstance(summary, SweepSummary):
            figure, note = _sweep_figure(summary, metric), "Mean over seeds, with their deviation."
        else:
            figure, note = _table_figure(summary, metric), _PUBLISHED_NOTE
        label = f"{summary.plan.title} ({summary.plan.name}): {METRICS[metric]}"
        svg = "" if figure is None else drawn_svg(figure, label)
        chart = Chart(METRICS[metric], inside_page(svg, label) if svg else "", (), note if svg else _NO_RESULTS)
        yield Drawing(f"{summary.plan.name}-{metric}", chart, svg)


def _table_figure(summary: TableSummary, metric: str) -> Figure | None:
    matrices = [matrix_of(summary, metric, selection) for selection in SELECTIONS]
    columns = [number for number, column in enumerate(matrices[0].columns) if column.is_measured]
    lines = matrices[0].lines
    rows = [line.entries[number] for line in lines for number in columns]
    if not any(row and row.measured and row.measured.last.mean is not None for row in rows):
        return None
    step = max(0.105 * len(columns), 0.2)
    figure, panels = new_panels(6.2, step * len(lines) + 0.95, columns=len(matrices))
    for axes, matrix in zip(panels, matrices, strict=True):
        _draw_rows(axes, matrix, columns)
        axes.set_title(SELECTIONS[matrix.selection], loc="left", fontsize=8.5, color=INK)
        axes.set_xlabel(f"{METRICS[metric]} in %")
    # Names of rows may hold a dollar sign, which would start a formula.
    panels[0].set_yticks(range(len(lines)), [line.full_text for line in lines], parse_math=False)
    panels[0].set_ylim(len(lines) - 0.45, -0.55)
    _add_legend(figure, [matrices[0].columns[number].text for number in columns], hollow="hollow: published")
    return figure


def _add_legend(figure: Figure, methods: Sequence[str], *, hollow: str | None = None) -> None:
    """Explain the marks below the panels, because a file has no page that could."""
    from matplotlib.lines import Line2D

    def mark(label: str, **style: Any) -> Line2D:
        return Line2D([], [], markersize=4, linestyle="none", label=label, **style)

    marks = [mark(method, **_style(number)) for number, method in enumerate(methods)]
    if hollow is not None:
        marks.append(mark(hollow, color=INK, marker="o", fillstyle="none"))
    figure.legend(
        handles=marks,
        loc="outside lower left",
        ncols=5,
        fontsize=8,
        labelcolor=INK,
        frameon=False,
        handletextpad=0.1,
        columnspacing=1.2,
    )


def _style(number: int) -> dict[str, Any]:
    """Return color and marker of a method by its number."""
    return {"color": SERIES[number % len(SERIES)], "marker": _MARKERS[number % len(_MARKERS)]}


def _draw_rows(axes: Axes, matrix: Matrix, columns: Sequence[int]) -> None:
    for number, column in enumerate(columns):
        shift = 0.68 * ((number + 0.5) / len(columns) - 0.5)
        _draw_method(axes, [line.entries[column] for line in matrix.lines], matrix.selection, shift, _style(number))
    for height, line in enumerate(matrix.lines):
        if line.is_mean:
            axes.axhspan(height - 0.5, height + 0.5, color=BOUNDARY, alpha=0.05, linewidth=0)
    axes.grid(axis="y", visible=False)


def _draw_method(
    axes: Axes, rows: Sequence[TableRow | None], selection: str, shift: float, style: dict[str, Any]
) -> None:
    """Draw the published number and ours of every row of a method, joined by a line."""
    published, ours, pairs = [], [], []
    for height, row in enumerate(rows):
        estimate = row.measured.of(selection) if row and row.measured else Estimate(None, None, 0)
        if row and row.published is not None:
            published.append((row.published, height + shift, row.published_std))
        if estimate.mean is not None:
            ours.append((estimate.mean, height + shift, estimate.std))
        if row and row.published is not None and estimate.mean is not None:
            pairs.append((height + shift, 100 * row.published, 100 * estimate.mean))
    heights, starts, ends = ([pair[part] for pair in pairs] for part in range(3))
    axes.hlines(heights, starts, ends, color=style["color"], linewidth=0.8)
    for marks, face in ((published, "none"), (ours, style["color"])):
        axes.errorbar(
            [100 * value for value, _, _ in marks],
            [height for _, height, _ in marks],
            xerr=[100 * (std or 0.0) for _, _, std in marks],
            markersize=3.4,
            markerfacecolor=face,
            markeredgewidth=0.8,
            elinewidth=0.8,
            linestyle="none",
            **style,
        )


def _sweep_figure(summary: SweepSummary, metric: str) -> Figure | None:
    plan = summary.plan
    rows = [row for row in summary.rows if row.metric == metric]
    if not any(row.measured.last.mean is not None for row in rows):
        return None
    values = list(dict.fromkeys(row.value for row in rows))
    is_numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    positions = {value: float(value) if is_numeric else float(number) for number, value in enumerate(values)}
    figure, panels = new_panels(3.6, 3.7, rows=len(SELECTIONS))
    for axes, selection in zip(panels, SELECTIONS, strict=True):
        for number, method in enumerate(summary.methods):
            shift = 0.0 if is_numeric else 0.12 * (number - (len(summary.methods) - 1) / 2)
            points = [
                (positions[row.value] + shift, row.measured)
                for row in sorted(rows, key=lambda row: positions[row.value])
                if row.method == method and row.measured.of(selection).mean is not None
            ]
            _draw_points(axes, points, selection, number, linestyle="-" if is_numeric else "none")
        axes.set_title(SELECTIONS[selection], loc="left", fontsize=8.5, color=INK)
        axes.set_ylabel("%", color=INK, fontsize=8)
    panels[-1].set_xlabel(textwrap.fill(plan.label, _LABEL_LETTERS), parse_math=False)
    _set_value_axis(panels[0], positions, is_numeric, plan.logarithmic)
    _add_legend(figure, [method_text(method) for method in summary.methods])
    return figure


def _draw_points(
    axes: Axes, points: Sequence[tuple[float, Measured]], selection: str, number: int, linestyle: str
) -> None:
    estimates = [(position, measured.of(selection)) for position, measured in points]
    axes.errorbar(
        [position for position, _ in estimates],
        [100 * (estimate.mean or 0.0) for _, estimate in estimates],
        yerr=[100 * (estimate.std or 0.0) for _, estimate in estimates],
        markersize=4,
        linewidth=1.2,
        elinewidth=0.9,
        capsize=2,
        linestyle=linestyle,
        **_style(number),
    )


def _set_value_axis(axes: Axes, positions: dict[Value, float], is_numeric: bool, logarithmic: bool) -> None:
    if is_numeric and logarithmic:
        positive = [position for position in positions.values() if position > 0]
        if len(positive) == len(positions):
            axes.set_xscale("log")
        elif positive:
            # A logarithmic axis has no zero: it gets a linear part for it.
            axes.set_xscale("symlog", linthresh=min(positive), linscale=0.6)
    names = [textwrap.fill(value_text(value), _TICK_LETTERS // len(positions)) for value in positions]
    axes.set_xticks(list(positions.values()), names, parse_math=False)
    axes.set_xticks([], minor=True)
    if not is_numeric:
        axes.set_xlim(-0.5, len(positions) - 0.5)
