"""Samples as tensors: one at a time, as a PyTorch dataset, or streamed in batches decoded ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ConfigError, DataError
from .images import read_image, resize_image
from .masks import read_mask, resize_mask
from .sample import Sample


class LoadedSample(NamedTuple):
    """An image and its mask at the size asked for."""

    image: Tensor  # uint8 [3, h, w]
    mask: Tensor  # bool [h, w]; all False for a normal image, and for an anomalous one without a mask


class Batch(NamedTuple):
    """Images, masks and the samples they come from, in the same order."""

    images: Tensor  # uint8 [B, 3, h, w]
    masks: Tensor  # bool [B, h, w]
    samples: list[Sample]


def parse_size(size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) in pixels from one number (a square) or two; raise `ConfigError` for anything else."""
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sides):
        raise ConfigError(f"the image size is {size!r}; give one positive number of pixels, or height and width")
    return sides


def load_sample(sample: Sample, size: tuple[int, int], *, needs_mask: bool = True) -> LoadedSample:
    """Read a sample and resize it to `size` (height, width); see `read_image`, `read_mask`, `resize_image`.

    Args:
        sample: an image with its mask.
        size: (height, width) in pixels.
        needs_mask: refuse an anomalous sample without mask; otherwise its mask is all False, which is not its truth.

    Raises:
        DataError: a file cannot be used, the mask has another size than its image, or an anomalous sample has none.
    """
    if sample.label and sample.mask is None and needs_mask:
        raise DataError(f"the anomalous image {sample.image} has no mask; add one to the dataset")
    image = read_image(sample.image, sample.decoding.bit_depth)
    if sample.label == 0 or sample.mask is None:
        mask = np.zeros(size, dtype=bool)
    else:
        full_mask = read_mask(sample.mask, sample.decoding.mask_threshold)
        if full_mask.shape != image.shape[:2]:
            raise DataError(
                f"the mask {sample.mask} is {full_mask.shape[1]} x {full_mask.shape[0]} pixels but its image is "
                f"{image.shape[1]} x {image.shape[0]}; draw it at the image's size"
            )
        mask = resize_mask(full_mask, size)
    pixels = np.ascontiguousarray(resize_image(image, size).transpose(2, 0, 1))
    return LoadedSample(torch.from_numpy(pixels), torch.from_numpy(mask))


class SampleImages(Dataset[LoadedSample]):
    """`load_sample` over a list of samples, for `torch.utils.data.DataLoader`."""

    def __init__(self, samples: Sequence[Sample], size: int | Sequence[int]) -> None:
        self.samples: tuple[Sample, ...] = tuple(samples)
        self.size: tuple[int, int] = parse_size(size)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> LoadedSample:
        return load_sample(self.samples[index], self.size)


def stream_batches(
    samples: Sequence[Sample],
    size: int | Sequence[int],
    batch_size: int,
    workers: int = 0,
    load: Callable[[Sample], LoadedSample] | None = None,
) -> Iterator[Batch]:
    """Yield the samples in their order, `batch_size` at a time; the last batch may be smaller.

    With `workers` threads at most `batch_size + workers` images beyond the current batch are decoded ahead, so memory
    does not grow with the number of samples. The first file that cannot be used ends the stream with its `DataError`.
    `load` reads a sample in place of `load_sample`, at the same size.

    Raises:
        ConfigError: `size`, `batch_size` or `workers` cannot work.
        DataError: as `load_sample`.
    """
    if batch_size < 1 or workers < 0:
        raise ConfigError(f"batch_size is {batch_size} and workers {workers}; give at least 1 and 0")
    height_width = parse_size(size)
    read = load or (lambda sample: load_sample(sample, height_width))
    loaded = _load_ahead(samples, read, batch_size + workers, workers)
    return _batches(samples, loaded, batch_size)


def _batches(samples: Sequence[Sample], loaded: Iterator[LoadedSample], batch_size: int) -> Iterator[Batch]:
    for start in range(0, len(samples), batch_size):
        part = list(islice(loaded, batch_size))
        images = torch.stack([item.image for item in part])
        yield Batch(images, torch.stack([item.mask for item in part]), list(samples[start : start + batch_size]))


def _load_ahead(
    samples: Sequence[Sample], read: Callable[[Sample], LoadedSample], ahead: int, workers: int
) -> Iterator[LoadedSample]:
    if workers == 0:
        yield from map(read, samples)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fastbgad-images")
    try:
        waiting: deque[Future[LoadedSample]] = deque()
        for sample in samples:
            waiting.append(pool.submit(read, sample))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Reached as well when the consumer stops early or a file is bad: nothing more is decoded then.
        pool.shutdown(wait=True, cancel_futures=True)
