"""Connected anomalous regions of ground-truth masks (8-connectivity: diagonal neighbors touch).

Every mask is labeled once; masks of normal images cost one `any`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]
Slices = tuple[slice, slice]

_EIGHT_NEIGHBORS = np.ones((3, 3), dtype=bool)


class Regions(NamedTuple):
    """The regions of a set of masks, numbered 0..R-1 through all images.

    Attributes:
        of_pixel: int64 [P], the region of each anomalous pixel, image after image, in raster order.
        sizes: int64 [R], pixels of each region.
    """

    of_pixel: NDArray[np.int64]
    sizes: NDArray[np.int64]


def label_regions(masks: Sequence[Mask]) -> Regions:
    """Number the 8-connected regions of bool masks [H_i, W_i]."""
    count_before = 0
    parts = [np.empty(0, dtype=np.int64)]
    for _, labels, count in _labeled(masks):
        parts.append(labels[labels > 0] + np.int64(count_before - 1))
        count_before += count
    of_pixel = np.concatenate(parts)
    return Regions(of_pixel, np.bincount(of_pixel, minlength=count_before))


class FilledRegion(NamedTuple):
    """One region with its holes filled.

    Attributes:
        image: index of its mask.
        box: where its bounding box lies in that mask.
        filled: bool [h, w] inside the box: the region and its holes.
        size: pixels of the region without its holes.
    """

    image: int
    box: Slices
    filled: Mask
    size: int


def filled_regions(masks: Sequence[Mask]) -> Iterator[FilledRegion]:
    """Yield each 8-connected region of bool masks [H_i, W_i] with its holes filled.

    A hole is background that no 8-connected path leads out of, so a diagonal gap in a ring opens it.
    """
    for index, labels, _ in _labeled(masks):
        for number, box in enumerate(ndimage.find_objects(labels), start=1):
            region = labels[box] == number
            yield FilledRegion(
                index,
                box,
                ndimage.binary_fill_holes(region, structure=_EIGHT_NEIGHBORS),
                int(np.count_nonzero(region)),
            )


def _labeled(masks: Sequence[Mask]) -> Iterator[tuple[int, NDArray[Any], int]]:
    """Yield (index, labels [H, W], number of regions) of the masks that have an anomalous pixel."""
    for index, mask in enumerate(masks):
        if mask.any():
            labels, count = ndimage.label(mask, structure=_EIGHT_NEIGHBORS)
            yield index, labels, count
