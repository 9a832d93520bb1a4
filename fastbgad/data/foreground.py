"""The foreground of an image, computed from the image itself, so that no foreground files are needed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

_BORDER_SHARE = 0.03  # width of the border strip, of the shorter side
_PLAIN_DISTANCE = 24.0  # gray levels within which a border pixel counts as background
_PLAIN_SHARE = 0.6  # of the border; an object may leave the frame on two sides, as a zipper does
_MOST_SIDES = 2  # of the frame that an object may leave through
_CONTRAST = 3.0  # the object's distance from the border color, in units of the border's own spread
_KEPT_COMPONENT = 0.1  # of the largest component
_FOREGROUND_SHARE = (0.02, 0.98)


def foreground_mask(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Segment the object of an image on a plain background; all of a texture is foreground.

    The background is plain if most of the image's border has one color. The distance from that color is smoothed and
    cut at Otsu's threshold, holes are filled and small components dropped. The whole image is returned where the border
    is not plain, and where the result has little contrast, leaves the frame on more than two sides (as the mortar of a
    wall does), or covers almost nothing or almost everything.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        bool [H, W].
    """
    everything = np.ones(image.shape[:2], dtype=bool)
    pixels = image.astype(np.float32)
    border = _border(everything.shape)
    color = np.median(pixels[border], axis=0)
    distance = np.abs(pixels - color).max(axis=2)
    if (distance[border] <= _PLAIN_DISTANCE).mean() < _PLAIN_SHARE:
        return everything
    smooth = ndimage.gaussian_filter(distance, max(1.0, 0.01 * min(everything.shape)))
    mask = smooth > otsu_threshold(smooth)
    spread = np.median(distance[border]) + 1
    if not mask.any() or np.median(distance[mask]) < _CONTRAST * spread:
        return everything
    mask = _large_components(ndimage.binary_fill_holes(mask))
    sides = (mask[0], mask[-1], mask[:, 0], mask[:, -1])
    if sum(bool(side.any()) for side in sides) > _MOST_SIDES:
        return everything
    low, high = _FOREGROUND_SHARE
    return mask if low <= mask.mean() <= high else everything


def otsu_threshold(values: NDArray[np.floating], bins: int = 256) -> float:
    """Return the threshold that maximizes the variance between the two classes it makes (Otsu, 1979)."""
    counts, edges = np.histogram(values, bins)
    centers = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts).astype(np.float64)
    above = below[-1] - below
    sums = np.cumsum(counts * centers)
    between = below * above * (sums / np.maximum(below, 1) - (sums[-1] - sums) / np.maximum(above, 1)) ** 2
    # Between two well separated classes every cut is equally good: take the middle of them.
    best = np.flatnonzero(between >= between.max() * (1 - 1e-12))
    return float(edges[1:][best].mean())


def _border(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    width = max(2, round(_BORDER_SHARE * min(shape)))
    border = np.ones(shape, dtype=bool)
    border[width:-width, width:-width] = False
    return border


def _large_components(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    kept: NDArray[np.bool_] = (sizes >= _KEPT_COMPONENT * sizes.max()) & (sizes > 0)
    return kept[labels]
