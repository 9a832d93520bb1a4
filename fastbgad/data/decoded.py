"""A cache of decoded images: training reads the same files for statistics, features and synthesis."""

from __future__ import annotations

import threading

from .loading import LoadedSample, load_sample
from .sample import Sample


class DecodedImages:
    """`load_sample`, remembering what it read up to a number of bytes. Threads may share it."""

    def __init__(self, size: tuple[int, int], cache_bytes: int = 1 << 30) -> None:
        """
        Args:
            size: (height, width) that images are resized to.
            cache_bytes: images are kept up to this many bytes; what does not fit is read again each time.
        """
        self.size = size
        self._left = cache_bytes
        self._kept: dict[Sample, LoadedSample] = {}
        self._lock = threading.Lock()

    def __call__(self, sample: Sample) -> LoadedSample:
        """Return the image and mask of a sample; copy them before changing them. Raises as `load_sample`."""
        kept = self._kept.get(sample)
        if kept is not None:
            return kept
        loaded = load_sample(sample, self.size)
        needed = loaded.image.nbytes + loaded.mask.nbytes
        with self._lock:
            if sample not in self._kept and needed <= self._left:
                self._left -= needed
                self._kept[sample] = loaded
        return loaded
