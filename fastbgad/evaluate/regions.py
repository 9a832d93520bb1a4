"""Connected anomalous regions of ground-truth masks (8-connectivity: diagonal neighbours touch).

Every mask is labelled once; masks of normal images cost one `any`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]
Slices = tuple[slice, slice]

_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


class Regions(NamedTuple):
    """The regions of a set of masks, numbered 0..R-1 through all images.

    Attributes:
        of_pixel: int64 [P], the region of each anomalous pixel, image after image, in raster order.
        sizes: int64 [R], pixels of each region.
    """

    of_pixel: NDArray[np.int64]
    sizes: NDArray[np.int64]


def label_regions(masks: Sequence[Mask]) -> Regions:
    """Numbers the 8-connected regions of bool masks [H_i, W_i]."""
    found = 0
    parts = [np.empty(0, dtype=np.int64)]
    for _, labels, count in _labelled(masks):
        parts.append(labels[labels > 0] + np.int64(found - 1))
        found += count
    of_pixel = np.concatenate(parts)
    return Regions(of_pixel, np.bincount(of_pixel, minlength=found))


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
    """Yields each 8-connected region of bool masks [H_i, W_i] with its holes filled.

    A hole is background that no 8-connected path leads out of, so a diagonal gap in a ring opens it.
    """
    for index, labels, _ in _labelled(masks):
        for number, box in enumerate(ndimage.find_objects(labels), start=1):
            own = labels[box] == number
            yield FilledRegion(
                index,
                box,
                ndimage.binary_fill_holes(own, structure=_EIGHT_NEIGHBOURS),
                int(np.count_nonzero(own)),
            )


def _labelled(masks: Sequence[Mask]) -> Iterator[tuple[int, NDArray[Any], int]]:
    """Yields (index, labels [H, W], number of regions) of the masks that have an anomalous pixel."""
    for index, mask in enumerate(masks):
        if mask.any():
            labels, count = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)
            yield index, labels, count
