"""Pictures of results: anomaly maps and decisions painted over photographs, and the charts of the report.

Painting needs numpy and scipy only, so `predict` works without matplotlib; charts need it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..errors import DataError, FeatureError
from .svg import ANOMALOUS, BOUNDARY, CSS, MARGIN, NORMAL, SERIES, Chart, inline_svg, new_figure

Image = NDArray[np.uint8]
Color = tuple[int, int, int]

# From dark blue over violet and orange to pale yellow: lightness rises throughout, so that it also reads in gray.
HEAT_COLORS: tuple[Color, ...] = (
    (12, 12, 40),
    (44, 22, 92),
    (88, 28, 124),
    (136, 36, 128),
    (186, 52, 108),
    (226, 84, 74),
    (246, 130, 46),
    (252, 188, 60),
    (254, 244, 176),
)
GROUND_TRUTH_COLOR: Color = (0, 214, 255)
MARGIN_COLOR: Color = (255, 190, 0)
ANOMALOUS_COLOR: Color = (255, 45, 125)


def heat_colors(values: NDArray[Any]) -> Image:
    """Return colors [..., 3] of values in [0, 1], interpolated in `HEAT_COLORS`; values outside are clipped."""
    anchors = np.linspace(0.0, 1.0, len(HEAT_COLORS))
    table = np.array(HEAT_COLORS, dtype=np.float64)
    channels = [np.interp(values, anchors, table[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def heat_overlay(image: Image, anomaly_map: NDArray[Any], vmin: float, vmax: float) -> Image:
    """Paint an anomaly map over a photograph in gray; the higher the score, the more opaque the color.

    Args:
        image: uint8 [H, W, 3].
        anomaly_map: float [H, W].
        vmin: score of the first color; lower scores get it too.
        vmax: score of the last color; higher scores get it too.

    Returns:
        uint8 [H, W, 3].

    Raises:
        FeatureError: the map or the range holds NaN or Inf, or vmin > vmax.
        DataError: image and map differ in size.
    """
    _check_picture(image, anomaly_map, "anomaly map")
    if not np.isfinite(anomaly_map).all():
        raise FeatureError("the anomaly map holds NaN or Inf and cannot be painted")
    if not (np.isfinite(vmin) and np.isfinite(vmax) and vmin <= vmax):
        raise FeatureError(f"the color range [{vmin}, {vmax}] is not a range of finite scores")
    width = float(vmax) - float(vmin)
    heat = np.clip((anomaly_map.astype(np.float64) - vmin) / (width or 1.0), 0.0, 1.0)[..., None]
    gray = image @ np.array([0.299, 0.587, 0.114])
    opacity = 0.3 + 0.55 * heat
    return np.rint((1 - opacity) * gray[..., None] + opacity * heat_colors(heat[..., 0])).astype(np.uint8)


def mask_contour(image: Image, mask: NDArray[Any]) -> Image:
    """Outline the non-zero region of `mask` [H, W] on a copy of `image` uint8 [H, W, 3]."""
    _check_picture(image, mask, "mask")
    painted = image.copy()
    _outline(painted, mask != 0, GROUND_TRUTH_COLOR)
    return painted


def decision_contour(image: Image, decision: NDArray[Any]) -> Image:
    """Tint and outline the pixels in the margin (1) and beyond the anomalous boundary (2) on a copy of `image`.

    Args:
        image: uint8 [H, W, 3].
        decision: integers [H, W]: 0 normal side of b_n, 1 between b_n and b_a, 2 beyond b_a.
    """
    _check_picture(image, decision, "decision")
    painted = image.astype(np.float64)
    for value, color in ((1, MARGIN_COLOR), (2, ANOMALOUS_COLOR)):
        painted[decision == value] = 0.68 * painted[decision == value] + 0.32 * np.array(color)
    result = np.rint(painted).astype(np.uint8)
    _outline(result, decision >= 1, MARGIN_COLOR)
    _outline(result, decision == 2, ANOMALOUS_COLOR)
    return result


def _outline(image: Image, region: NDArray[np.bool_], color: Color) -> None:
    """Paint the inner border of `region` in place, thicker on larger images, so that it survives shrinking."""
    thickness = max(1, round(min(image.shape[:2]) / 128))
    # Border value 1: a region that leaves the picture has no outline along the picture's edge.
    inside = ndimage.binary_erosion(region, structure=np.ones((3, 3)), iterations=thickness, border_value=1)
    image[region & ~inside] = color


def _check_picture(image: Image, plane: NDArray[Any], name: str) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(f"the picture must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    if plane.shape != image.shape[:2]:
        raise DataError(f"the {name} has the size {list(plane.shape)} but its picture {list(image.shape[:2])}")


# More points than a chart has pixels would only make the file larger.
_MOST_POINTS = 300


def likelihood_chart(title: str, normal: NDArray[Any], anomalous: NDArray[Any], b_n: float, b_a: float | None) -> Chart:
    """Draw the densities of the normalized log-likelihoods of one level's patches, with the boundary and its margin.

    Args:
        title: name of the level.
        normal: log-likelihoods of normal patches, any shape.
        anomalous: log-likelihoods of anomalous patches, any shape, may be empty.
        b_n: boundary of the normal side.
        b_a: boundary of the anomalous side, b_n - tau; None where the method has none.
    """
    (normal, anomalous), note = _finite(normal, anomalous)
    everything = np.concatenate([normal, anomalous])
    if everything.size == 0 or not np.isfinite(b_n):
        return Chart(title, "", (), f"No finite log-likelihoods or boundary to draw. {note}".strip())
    # A few outliers would squeeze the boundary, the point of the chart, into one bin.
    low, high = np.quantile(everything, [0.005, 1.0])
    low, high = min(low, b_n if b_a is None else b_a), max(high, b_n)
    pad = 0.04 * (high - low) or 1.0
    low, high = low - pad, high + pad
    hidden = int(np.count_nonzero(everything < low))
    if hidden:
        note = f"{hidden} of {everything.size} patches lie further left. {note}".strip()

    figure, axes = new_figure()
    edges = np.linspace(low, high, 61)
    legend = []
    for name, values, color in (("normal", normal, NORMAL), ("anomalous", anomalous, ANOMALOUS)):
        if values.size:
            density = np.histogram(values, edges)[0] / (values.size * np.diff(edges))
            axes.stairs(density, edges, fill=True, color=color, alpha=0.35, linewidth=0)
            axes.stairs(density, edges, color=color, linewidth=1.2)
            legend.append((name, CSS[color]))
    top = axes.get_ylim()[1] * 1.12
    axes.set_ylim(0, top)
    axes.set_xlim(low, high)
    if b_a is not None and np.isfinite(b_a):
        axes.axvspan(b_a, b_n, color=MARGIN, alpha=0.3, linewidth=0)
        axes.axvline(b_a, color=BOUNDARY, linewidth=1, linestyle=(0, (3, 2)))
        axes.text(b_a - pad / 4, top * 0.985, "bₐ", ha="right", va="top", color=BOUNDARY, fontsize=10)
        legend.append(("margin", CSS[MARGIN]))
    axes.axvline(b_n, color=BOUNDARY, linewidth=1)
    axes.text(b_n + pad / 4, top * 0.985, "bₙ", ha="left", va="top", color=BOUNDARY, fontsize=10)
    axes.set_xlabel("log-likelihood of a patch / normalizer")
    axes.set_yticks([])
    return Chart(title, inline_svg(figure, f"Densities of log-likelihoods, {title}"), tuple(legend), note)


def score_chart(title: str, normal: NDArray[Any], anomalous: NDArray[Any]) -> Chart:
    """Draw every image's score as a stroke, normal images above anomalous ones."""
    (normal, anomalous), note = _finite(normal, anomalous)
    if normal.size + anomalous.size == 0:
        return Chart(title, "", (), f"No finite image scores to draw. {note}".strip())
    figure, axes = new_figure()
    legend = []
    for name, values, color, y in (("normal", normal, NORMAL, 1), ("anomalous", anomalous, ANOMALOUS, 0)):
        if values.size:
            axes.vlines(values, y - 0.36, y + 0.36, color=color, linewidth=1.3, alpha=0.8)
            legend.append((f"{name} images ({values.size})", CSS[color]))
    axes.set_ylim(-0.55, 1.55)
    axes.set_yticks([])
    axes.grid(False)
    axes.margins(x=0.04)
    axes.set_xlabel("image score")
    return Chart(title, inline_svg(figure, f"{title} of normal and anomalous images"), tuple(legend), note)


def history_chart(title: str, history: Sequence[Mapping[str, float]], prefixes: Sequence[str]) -> Chart:
    """Draw training curves: every key of `history` that starts with one of `prefixes`, against the pass.

    Args:
        title: heading.
        history: one mapping per pass over the training images; keys may come and go, NaN leaves a gap.
        prefixes: "loss", or "b_n" and "b_a", ...
    """
    keys = [key for key in dict.fromkeys(key for entry in history for key in entry) if key.startswith(tuple(prefixes))]
    steps = np.array([entry.get("pass", index + 1) for index, entry in enumerate(history)], dtype=np.float64)
    curves = {key: np.array([entry.get(key, np.nan) for entry in history], dtype=np.float64) for key in keys}
    curves = {key: values for key, values in curves.items() if np.isfinite(values).any()}
    if not curves:
        return Chart(title, "", (), "Nothing was recorded.")
    notes = []
    bad = [key for key, values in curves.items() if any(key in e and not np.isfinite(e[key]) for e in history)]
    if bad:
        notes.append(f"Values that are NaN or Inf are left out: {', '.join(bad)}.")
    block = -(-len(steps) // _MOST_POINTS)
    if block > 1:
        notes.append(f"Each point is the mean of {block} records.")
    if len(curves) > len(SERIES):
        notes.append(f"Not drawn: {', '.join(list(curves)[len(SERIES) :])}.")

    figure, axes = new_figure()
    legend = []
    for (key, values), color in zip(curves.items(), SERIES, strict=False):
        x, y = _block_means(steps, block), _block_means(values, block)
        # A single finite point between gaps would be invisible as a line.
        axes.plot(x, y, color=color, linewidth=1.3, marker="o" if np.isfinite(y).sum() < 3 else None, markersize=2.5)
        legend.append((_curve_name(key), CSS[color]))
    drawn = np.concatenate(list(curves.values()))
    drawn = drawn[np.isfinite(drawn)]
    if drawn.min() > 0 and drawn.max() > 50 * drawn.min():
        axes.set_yscale("log")
    axes.margins(x=0.02)
    axes.set_xlabel("pass over the training images")
    return Chart(title, inline_svg(figure, f"{title} during training"), tuple(legend), " ".join(notes))


def _curve_name(key: str) -> str:
    """Return the name of a key of the log for readers: "b_n_0" is the boundary b_n of level 1."""
    named = {"loss": "total", "loss_ml": "likelihood", "loss_n": "semi-pull", "loss_a": "semi-push"}
    if key[:4] in ("b_n_", "b_a_") and key[4:].isdigit():
        return f"{key[:3]}, level {int(key[4:]) + 1}"
    return named.get(key, key)


def _finite(*parts: NDArray[Any]) -> tuple[list[NDArray[np.float64]], str]:
    """Return the finite values of each array as float64 [n], and a note where some were not."""
    flat = [np.asarray(part, dtype=np.float64).ravel() for part in parts]
    finite = [part[np.isfinite(part)] for part in flat]
    left_out = sum(part.size for part in flat) - sum(part.size for part in finite)
    return finite, f"{left_out} values that are NaN or Inf are left out." if left_out else ""


def _block_means(values: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    """Return means over consecutive blocks, ignoring NaN and Inf; NaN where a block has nothing else."""
    padded = np.full(-(-len(values) // block) * block, np.nan)
    padded[: len(values)] = values
    rows = padded.reshape(-1, block)
    finite = np.isfinite(rows)
    count = finite.sum(axis=1)
    return np.where(count > 0, np.where(finite, rows, 0.0).sum(axis=1) / np.maximum(count, 1), np.nan)
