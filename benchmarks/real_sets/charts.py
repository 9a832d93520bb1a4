"""The plots of the page: accuracy against seconds, and how BGAD converges."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .grid import GAUSSIAN, OURS
from .results import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Cool colors for fastbgad's methods, grey for the Gaussian, warm ones for peers; marks tell them apart as well.
_COLORS = {
    "nfad": "#0072b2",
    "bgad_without": "#332288",
    "bgad": "#009e73",
    GAUSSIAN: "#666666",
    "patchcore": "#d55e00",
    "padim": "#a86f00",
    "cfa": "#b5477a",
    "supersimplenet": "#8c564b",
}
_CURVES = ("#009e73", "#d55e00", "#332288", "#a86f00", "#0072b2", "#b5477a")
_CONVERGENCE_METRICS = ("image_auroc", "pixel_auroc", "aupro")


class Dot(NamedTuple):
    """A contender's place in the first plot."""

    method: str
    label: str
    seconds: float
    image_auroc: float


class Curve(NamedTuple):
    """The metrics of a kind of features after every meta epoch, means over categories and seeds."""

    label: str
    seconds: list[float]
    metrics: dict[str, list[float]]


def accuracy_plot(dots: Sequence[Dot]) -> str:
    """Return an SVG with image AUROC against seconds of training and scoring, both means over categories."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with _style("accuracy"):
        figure = Figure(figsize=(7.3, 3.8), facecolor="white", layout="constrained")
        axes = figure.subplots()
        for dot in dots:
            marker = "o" if dot.method in OURS else "s" if dot.method == GAUSSIAN else "^"
            axes.plot(
                dot.seconds, dot.image_auroc, marker=marker, color=_COLORS[dot.method], label=dot.label, ls="none"
            )
        axes.set_xscale("log")
        for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            # 1, 2 and 5 of each power of ten: more would run into each other.
            set_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}" if f"{seconds:e}"[0] in "125" else ""))
        axes.set_xlabel("seconds of training and scoring, mean over categories")
        axes.set_ylabel("image AUROC, mean over categories")
        axes.grid(color="#e4e4e4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right center", frameon=False, fontsize=7)
        return _svg(figure)


def convergence_plot(curves: Sequence[Curve]) -> str:
    """Return an SVG with a panel for each of image AUROC, pixel AUROC and AUPRO against seconds of training."""
    from matplotlib.figure import Figure

    with _style("convergence"):
        figure = Figure(figsize=(7.3, 2.7), facecolor="white", layout="constrained")
        panels = figure.subplots(1, len(_CONVERGENCE_METRICS), sharex=True)
        for axes, metric in zip(panels, _CONVERGENCE_METRICS, strict=True):
            for number, curve in enumerate(curves):
                color = _CURVES[number % len(_CURVES)]
                axes.plot(
                    curve.seconds,
                    curve.metrics[metric],
                    marker="o",
                    markersize=3,
                    color=color,
                    linewidth=1.3,
                    label=curve.label if axes is panels[0] else None,
                )
            axes.set_title(METRICS[metric], fontsize=9)
            axes.set_xlabel("seconds of training")
            axes.grid(color="#e4e4e4", linewidth=0.7)
            axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        return _svg(figure)


class _style:
    """Matplotlib's defaults whatever its user has set, text as text, and ids that are the same at every call."""

    def __init__(self, name: str) -> None:
        import matplotlib

        self._context = matplotlib.rc_context()
        self._name = name

    def __enter__(self) -> None:
        import matplotlib

        self._context.__enter__()
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": self._name, "font.size": 8.5})

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    # matplotlib ends some lines with blanks, which git would complain about.
    return re.sub(r"[ \t]+\n", "\n", buffer.getvalue())
