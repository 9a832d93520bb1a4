"""Charts as SVG with the CSS variables of the page as colors, so that they follow its light or dark theme.

The same figure can be written with fixed colors, as a file for a paper.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, NamedTuple

from ..errors import MissingDependencyError
from ..wording import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Chart(NamedTuple):
    """One chart of a page.

    Attributes:
        title: a heading of a few words.
        svg: an inline <svg> element without ids or external addresses; empty where there is nothing to draw.
        legend: (label, CSS color) of each series.
        note: for readers, such as values that are left out.
    """

    title: str
    svg: str
    legend: tuple[tuple[str, str], ...]
    note: str = ""


# Placeholder colors for matplotlib; in the SVG the page's CSS variables, or fixed colors, replace them.
INK, GRID = "#010101", "#020202"
NORMAL, ANOMALOUS, MARGIN, BOUNDARY = "#030303", "#040404", "#050505", "#060606"
SERIES = ("#070707", "#080808", "#090909", "#0a0a0a", "#0b0b0b", "#0c0c0c")
CSS = {
    INK: "var(--ink-soft)",
    GRID: "var(--line)",
    NORMAL: "var(--normal)",
    ANOMALOUS: "var(--anomalous)",
    MARGIN: "var(--margin)",
    BOUNDARY: "var(--ink)",
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES, start=1)},
}
# The light theme of page_style.html.jinja, on white paper.
_PAPER = {
    INK: "#3c444d",
    GRID: "#dcdfe0",
    NORMAL: "#2f6fb3",
    ANOMALOUS: "#d1376b",
    MARGIN: "#f0b000",
    BOUNDARY: "#1b2027",
    **dict(zip(SERIES, ("#2f5fa8", "#c9720f", "#2a8a6a", "#b8396a", "#7652b0", "#6b7280"), strict=True)),
}


def new_figure(width: float = 3.4, height: float = 2.1) -> tuple[Figure, Axes]:
    """Return an empty chart of `width` x `height` inches in the style of the pages; see `new_panels`."""
    figure, (axes,) = new_panels(width, height)
    return figure, axes


def new_panels(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return an empty chart of `width` x `height` inches and its panels, row by row, which share their axes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "report", "the HTML report") from error
    # A figure made without pyplot belongs to no global list and needs no display.
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes in panels:
        axes.patch.set_alpha(0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        axes.tick_params(which="both", colors=INK, labelsize=8, length=0)
        axes.xaxis.label.set(color=INK, fontsize=8)
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, panels


def drawn_svg(figure: Figure, label: str) -> str:
    """Return the figure as matplotlib writes it, with letters as text; `label` differs between the charts of a page."""
    import matplotlib
    from matplotlib.text import Text

    # matplotlib cannot measure names that are not UTF-8.
    for text in figure.findobj(Text):
        if (shown := printable(text.get_text())) != text.get_text():
            text.set_text(shown)
    buffer = io.StringIO()
    # Text stays text: smaller, selectable, and in the page's own font.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def inline_svg(figure: Figure, label: str) -> str:
    """Return the figure as an <svg> element for an HTML page; `label` differs between the charts of a page."""
    return inside_page(drawn_svg(figure, label), label)


def inside_page(svg: str, label: str) -> str:
    """Return the result of `drawn_svg` as an <svg> element for an HTML page."""
    svg = svg[svg.index("<svg") :]
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    # Inside a page, addresses of namespaces, fixed sizes, global styles and numbered ids do harm.
    svg = f"<svg {view_box[0]}>" + svg[svg.index(">") + 1 :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z][\w.]*_\d+"', "", svg)
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    svg = svg.replace("xlink:href", "href")
    for color, css in CSS.items():
        svg = svg.replace(color, css)
    # The label does not come from matplotlib, which escapes its own texts.
    label = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def for_paper(svg: str) -> str:
    """Return the result of `drawn_svg` as the content of an .svg file, with fixed colors on a transparent ground."""
    for color, fixed in _PAPER.items():
        svg = svg.replace(color, fixed)
    return svg
