"""Images that throughput is measured on: a user's own, or generated files of noise."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data import Sample, list_categories, open_category, read_image, read_mask, resize_mask
from ..data.generated import write_noise_images
from ..data.layouts import Layout
from ..data.sample import GOOD
from ..errors import ConfigError, DataError
from ..predict.local import find_images

# Batches go through at least this many images, if there are so many, because decoding times differ between images.
_FEWEST_IMAGES = 16
# Number of files of noise; fewer of a large size, because each takes seconds to write.
_GENERATED_FILES = 8
_GENERATED_PIXELS = 8 * 1024 * 1024
_FEWEST_GENERATED = 2
# Share of an image's pixels that a generated mask marks: about that of MVTec AD's defects.
_MASKED_SHARE = 0.02


class BenchImages(NamedTuple):
    """Images to measure on; all of them can be read."""

    samples: tuple[Sample, ...]
    skipped: tuple[str, ...]  # one message per image that cannot be used
    sides: tuple[tuple[int, int], ...]  # (height, width) of each image file, in pixels
    generated: bool

    def describe(self, image_size: int, batch_size: int) -> str:
        """Describe the images of a row: number, size, whether they are resized and repeated."""
        low, high = (tuple(edge(side) for side in zip(*self.sides, strict=True)) for edge in (min, max))
        kind = "generated PNG file" if self.generated else "image"
        kind += "" if len(self.samples) == 1 else "s"
        sizes = f"{low[1]} x {low[0]}" if low == high else f"{low[1]} x {low[0]} to {high[1]} x {high[0]}"
        text = f"{len(self.samples)} {kind} of {sizes} pixels"
        if low != high:
            text += ", of mixed sizes"
        if (low, high) != ((image_size, image_size), (image_size, image_size)):
            text += f", resized to {image_size} x {image_size}"
        if len(self.samples) < batch_size:
            text += f"; fewer than the batch of {batch_size}, so they are repeated"
        return text


def open_images(data: Path, category: str | None, layout: Layout, most_images: int, seed: int) -> BenchImages:
    """Choose images of a folder at random; those that cannot be read are left out and named.

    Args:
        data: a dataset in one of the known layouts, whose test images are used; else a folder of images, or one file.
        category: of a dataset with several.
        layout: see `open_category`; "auto" treats a folder without a known layout as a plain folder of images.
        most_images: the largest batch.
        seed: of the choice.

    Raises:
        DataError: no such folder, no category of this name, or no image that can be read.
    """
    samples = _list_samples(data, category, layout)
    good: list[Sample] = []
    sides: list[tuple[int, int]] = []
    skipped = []
    for index in np.random.default_rng(seed).permutation(len(samples)):
        if len(good) >= max(most_images, _FEWEST_IMAGES):
            break
        sample = samples[index]
        try:
            height, width = read_image(sample.image, sample.decoding.bit_depth).shape[:2]
            if sample.mask is not None:
                read_mask(sample.mask, sample.decoding.mask_threshold)
        except DataError as error:
            skipped.append(str(error))
        else:
            good.append(sample)
            sides.append((height, width))
    if not good:
        raise DataError(f"none of the {len(samples)} images of {data} can be read; the first: {skipped[0]}")
    return BenchImages(tuple(good), tuple(skipped), tuple(sides), generated=False)


def truth_masks(images: BenchImages, side: int, seed: int) -> Tensor:
    """Return masks bool [n, side, side] for timing the metrics, with anomalous and normal pixels in every one.

    Where an image has no mask with both kinds of pixels it gets a disc at random: the metrics of a batch need both
    kinds, and their cost hardly depends on where these are.
    """
    rng = np.random.default_rng(seed)
    masks = np.zeros((len(images.samples), side, side), dtype=bool)
    rows, columns = np.ogrid[:side, :side]
    for mask, sample in zip(masks, images.samples, strict=True):
        if sample.mask is not None:
            mask[:] = resize_mask(read_mask(sample.mask, sample.decoding.mask_threshold), (side, side))
        if mask.all() or not mask.any():
            y, x = rng.integers(0, side, 2)
            mask[:] = (rows - y) ** 2 + (columns - x) ** 2 <= _MASKED_SHARE / np.pi * side**2
    return torch.from_numpy(masks)


def _list_samples(data: Path, category: str | None, layout: Layout) -> list[Sample]:
    if category is not None or layout != "auto" or (data.is_dir() and list_categories(data, layout)):
        opened = open_category(data, category, layout, check="none")
        return list(opened.test or opened.train)  # a category of normal images alone may have no test
    return [Sample(path, None, 0, GOOD) for path in find_images([data])]


def generate_images(folder: Path, side: int, seed: int) -> BenchImages:
    """Write square files of noise of `side` pixels into `folder`; see `write_noise_images`.

    Raises:
        ConfigError: `side` is below 1. OutputError: the folder cannot be written.
    """
    if side < 1:
        raise ConfigError(f"the generated files are to be {side} pixels a side; give at least 1")
    count = min(_GENERATED_FILES, max(_FEWEST_GENERATED, _GENERATED_PIXELS // side**2))
    paths = write_noise_images(folder / str(side), count, side, seed)
    samples = tuple(Sample(path, None, 0, GOOD) for path in paths)
    return BenchImages(samples, (), ((side, side),) * count, generated=True)
