"""The layouts of KolektorSDD and KolektorSDD2: masks lie beside the images, and only they tell which are anomalous."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...errors import DataError
from ..masks import read_mask
from ..sample import GOOD, Sample
from .listing import HOLDOUT, Listing
from .tree import ImageFile

_DEFECT = "defect"


def list_kolektor(listing: Listing) -> None:
    """List KolektorSDD: kos01/Part0.jpg, kos01/Part0_label.bmp, ... It has no test part: normal images are held out."""
    samples = _beside(listing, listing.without_twins(listing.tree.images()), "_label")
    listing.hold_out([sample for sample in samples if not sample.label])
    listing.note_holdout(len(listing.test), HOLDOUT, f"{listing.root} has no part for the test")
    listing.test += [sample for sample in samples if sample.label]


def list_kolektor2(listing: Listing) -> None:
    """List KolektorSDD2: train/10000.png, train/10000_GT.png, test/20000.png, ...

    The anomalous images of train/ are those that known anomalies are drawn from.
    """
    train = _beside(listing, listing.images("train"), "_GT")
    listing.train += [sample for sample in train if not sample.label]
    listing.known += [sample for sample in train if sample.label]
    listing.test += _beside(listing, listing.images("test"), "_GT")


def _beside(listing: Listing, files: Sequence[ImageFile], ending: str) -> list[Sample]:
    """Return the images among `files` as samples, anomalous where their mask marks a pixel."""
    masks = {file.key[: -len(ending)]: file for file in files if file.key.endswith(ending)}
    images = [file for file in files if not file.key.endswith(ending)]
    for key in masks.keys() - {image.key for image in images}:
        listing.problems.append(f"the mask {masks[key].path} belongs to no image; add the image or remove the mask")
    for image in images:
        if image.key not in masks:
            name = os.path.basename(image.key) + ending + _masks_suffix(masks.values())
            listing.problems.append(f"{image.path} has no mask; add {image.path.parent / name}")
    paired = [image for image in images if image.key in masks]
    paths = [masks[image.key].path for image in paired]
    with ThreadPoolExecutor() as pool:
        marked = list(pool.map(lambda path: _marks(path, listing.options.mask_threshold), paths))
    samples = []
    for image, path, label in zip(paired, paths, marked, strict=True):
        listing.use([masks[image.key]])
        if isinstance(label, str):
            listing.problems.append(label)
        else:
            samples.append(listing.sample(image, path if label else None, int(label), _DEFECT if label else GOOD))
    return samples


def _masks_suffix(masks: Iterable[ImageFile]) -> str:
    """Return the suffix that masks have, .png where there are none."""
    return next((mask.path.suffix for mask in masks), ".png")


def _marks(mask: Path, threshold: float | None) -> bool | str:
    """Return True if a mask marks any pixel, or why it cannot be read."""
    try:
        return bool(read_mask(mask, threshold).any())
    except DataError as error:
        return str(error)
