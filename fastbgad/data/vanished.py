"""Masks of which no pixel is left at a model's image size, and the size that would keep them all.

Masks are resized to the nearest pixel, so a defect thinner than the reduction factor may fall between the pixels that
are taken. Its image then counts as anomalous, but none of its pixels do.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..wording import count, listed
from .masks import read_mask, resize_mask
from .sample import Sample

_THREADS = 8
_STEP = 32  # proposed sizes are multiples of this, which every backbone takes
_FEW_PIXELS = 256  # tried first: of a large region some of these are left
_MOST_TYPES = 5  # in a sentence

Mask = NDArray[np.bool_]


class VanishedMasks:
    """Counts, by type of anomaly, of masks without a pixel left at a size. Threads may share it.

    A mask is looked at once, as it is added, and not kept.

    Args:
        size: (height, width) in pixels of the model.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size: tuple[int, int] = size
        self._all: Counter[str] = Counter()
        self._vanished: Counter[str] = Counter()
        self._largest = (0, 0)
        self._too_small: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    def add(self, defect: str, mask: Mask) -> bool:
        """Count a mask bool [H, W] of a type of anomaly; return True if it has pixels and none is left at the size."""
        rows, columns = np.nonzero(mask)
        own = (mask.shape[0], mask.shape[1])
        vanishes = bool(rows.size) and not _survives(own, rows, columns, self.size)
        lost = [size for size in _larger_sizes(self.size, own) if rows.size and not _survives(own, rows, columns, size)]
        with self._lock:
            self._all[defect] += 1
            self._vanished[defect] += vanishes
            self._largest = (max(self._largest[0], own[0]), max(self._largest[1], own[1]))
            self._too_small.update(lost)
        return vanishes

    @property
    def by_type(self) -> Mapping[str, tuple[int, int]]:
        """The number of masks that vanish, and of all masks, of every type of which some vanish, sorted by type."""
        return {defect: (n, self._all[defect]) for defect, n in sorted(self._vanished.items()) if n}

    @property
    def total(self) -> tuple[int, int]:
        """The number of masks that vanish, and of all masks."""
        return self._vanished.total(), self._all.total()

    def smallest_size(self) -> tuple[int, int] | None:
        """Return the smallest larger size at which no mask vanishes; the size itself if none does there.

        It keeps the aspect of the size as multiples of 32 allow, and is at most as large as the largest mask. None: not
        even such a size keeps all.
        """
        if not self.by_type:
            return self.size
        return next((s for s in _larger_sizes(self.size, self._largest) if s not in self._too_small), None)

    def sentence(self) -> str:
        """Return how many masks of which types vanish; empty if none does."""
        if not self.by_type:
            return ""
        parts = [f"{n} of {count(of, 'mask')} of {defect}" for defect, (n, of) in self.by_type.items()]
        verb = "vanishes" if self.total[0] == 1 else "vanish"
        return f"{listed(parts, _MOST_TYPES)} {verb} at {self.size[0]} x {self.size[1]} pixels"

    def remedy(self) -> str:
        """Return what keeps all masks: a larger image size, or larger pictures of the defects."""
        size = self.smallest_size()
        if size is None:
            return "no image size up to their own keeps all: crop or tile the images"
        return f"--image-size {size[0]} {size[1]} keeps all"


def vanished_masks(
    samples: Sequence[Sample], size: tuple[int, int], read: Callable[[Sample], Mask] | None = None
) -> VanishedMasks:
    """Return the counts for the samples that have masks; every mask is decoded once.

    Args:
        samples: normal and anomalous ones; only those with a mask are read.
        size: (height, width) in pixels of the model.
        read: returns the mask of a sample at its own size, in place of `read_mask`.

    Raises:
        DataError: a mask cannot be read.
    """
    counts = VanishedMasks(size)
    read = read or _read
    # Decoding leaves the interpreter lock, so threads are enough.
    with ThreadPoolExecutor(_THREADS) as pool:
        masked = [sample for sample in samples if sample.label and sample.mask is not None]
        list(pool.map(lambda sample: counts.add(sample.defect, read(sample)), masked))
    return counts


def _read(sample: Sample) -> Mask:
    assert sample.mask is not None
    return read_mask(sample.mask, sample.decoding.mask_threshold)


def _larger_sizes(size: tuple[int, int], most: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the sizes above `size`, in multiples of 32 that keep its aspect as they can, up to `most`."""
    shorter = min(size)
    for side in range(_STEP * (shorter // _STEP + 1), max(most) + 1, _STEP):
        height, width = (max(_STEP, _STEP * math.floor(side * n / shorter / _STEP + 0.5)) for n in size)
        if height > most[0] or width > most[1]:
            return
        if height >= size[0] and width >= size[1]:
            yield height, width


def _survives(own: tuple[int, int], rows: NDArray[np.int64], columns: NDArray[np.int64], size: tuple[int, int]) -> bool:
    """Return True if any of these pixels of a mask of the size `own` is left at `size`."""
    if own[0] <= size[0] and own[1] <= size[1]:
        return True  # every pixel is
    rows_taken, columns_taken = _taken(own[0], size[0]), _taken(own[1], size[1])
    step = max(1, len(rows) // _FEW_PIXELS)
    few = rows_taken[rows[::step]] & columns_taken[columns[::step]]
    return bool(few.any() or (step > 1 and (rows_taken[rows] & columns_taken[columns]).any()))


@lru_cache(maxsize=512)
def _taken(length: int, new_length: int) -> NDArray[np.bool_]:
    """Return bool [length]: the lines that `resize_mask` takes, by resizing the binary digits of their numbers."""
    numbers, taken = np.arange(length), np.zeros(new_length, dtype=np.int64)
    for bit in range(max(1, (length - 1).bit_length())):
        digit = np.repeat((numbers >> bit & 1).astype(bool)[:, None], 2, axis=1)
        taken |= resize_mask(digit, (new_length, 2))[:, 0].astype(np.int64) << bit
    lines = np.zeros(length, dtype=bool)
    lines[taken] = True
    return lines
