"""What a contact sheet shows: some images of every type, the suspicious ones first, with their masks outlined."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..errors import DataError
from ..render.plots import mask_contour
from ..render.thumbnails import shrink_mask, thumbnail
from ..wording import count
from .images import read_image
from .inspection import FileFacts
from .masks import read_mask
from .sample import GOOD, Sample
from .summary import CategorySummary, CheckedCategory, coverage_text

_OTHER_SIZE = "mask of another size"
_TINY = 60  # pixels of a mask in a small picture, below which it is shown larger than it is


class Picture(NamedTuple):
    """One image of a sheet.

    Attributes:
        name: of its file, with the folders below that of its type.
        photo: uint8 [h, w, 3], small, the mask outlined; None if the image cannot be read.
        caption: what the mask covers.
        marks: what is suspicious, in a few words each.
        error: why the image cannot be read; empty if it can.
    """

    name: str
    photo: NDArray[np.uint8] | None
    caption: str
    marks: tuple[str, ...]
    error: str


class Strip(NamedTuple):
    """The pictures of one type.

    Attributes:
        name: of the type.
        anomalous: True unless these are normal images.
        total: images of the type.
        suspicious: how many of these are.
        pictures: some of them.
    """

    name: str
    anomalous: bool
    total: int
    suspicious: int
    pictures: tuple[Picture, ...]

    @property
    def counts(self) -> str:
        """How many images there are, how many of these are shown, and how many suspicious."""
        text = count(self.total, "image")
        if len(self.pictures) < self.total:
            text += f", {len(self.pictures)} shown"
        return f"{text}, {self.suspicious} suspicious" if self.suspicious else text


class SheetCategory(NamedTuple):
    """A category on a sheet."""

    summary: CategorySummary
    strips: tuple[Strip, ...]


def sheet_strips(checked: CheckedCategory, summary: CategorySummary, per_type: int) -> tuple[Strip, ...]:
    """Return what a sheet shows of a category: up to `per_type` images of each type, normal ones first."""
    survey = checked.survey
    facts = survey.facts or (None,) * len(survey.samples)
    rows = [
        (sample, fact, _marks(sample, fact, sample in checked.vanished, checked.counts.size))
        for sample, fact in zip(survey.samples, facts, strict=True)
    ]
    strips = []
    # pillow decodes outside the interpreter lock, so threads are enough.
    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="fastbgad-sheet") as pool:
        for kind in summary.types:
            members = [row for row in rows if row[0].defect == kind.name]
            shown = list(_choose(members, per_type))
            pictures = tuple(pool.map(lambda row: _picture(row[0], row[2]), shown))
            suspicious = sum(bool(marks) for _, _, marks in members)
            strips.append(Strip(kind.name, kind.name != GOOD, len(members), suspicious, pictures))
    return tuple(strip for strip in strips if strip.total)


_Row = tuple[Sample, FileFacts | None, tuple[str, ...]]


def _choose(rows: Sequence[_Row], most: int) -> Iterator[_Row]:
    """Yield the suspicious rows first, then others, evenly chosen among both."""
    suspicious = [row for row in rows if row[2]]
    plain = [row for row in rows if not row[2]]
    yield from _evenly(suspicious, most)
    yield from _evenly(plain, most - min(most, len(suspicious)))


def _evenly(rows: Sequence[_Row], most: int) -> list[_Row]:
    number = min(most, len(rows))
    return [rows[round(index)] for index in np.linspace(0, len(rows) - 1, number)]


def _marks(sample: Sample, fact: FileFacts | None, vanishes: bool, size: tuple[int, int]) -> tuple[str, ...]:
    """Return what is suspicious about the files of a sample; nothing if they were not looked at."""
    if fact is None:
        return ()
    marks = []
    if fact.size is None:
        marks.append("cannot be read")
    if sample.mask is not None and fact.mask is None:
        marks.append("mask cannot be read")
    if fact.mask is not None:
        if fact.mask.empty:
            marks.append("mask is empty")
        if fact.mask.whole:
            marks.append("covers the whole image")
        if fact.mask.inverted:
            marks.append("looks inverted")
    if vanishes:
        marks.append(f"vanishes at {size[0]} x {size[1]}")
    # What else is wrong with a pair of files that can be read is their sizes.
    if fact.problems and not marks:
        marks.append(_OTHER_SIZE)
    return tuple(marks)


def _picture(sample: Sample, marks: tuple[str, ...]) -> Picture:
    name = sample.part or sample.image.name
    try:
        image = read_image(sample.image, sample.decoding.bit_depth)
        photo = thumbnail(image, name)
    except DataError as error:
        return Picture(name, None, "", marks or ("cannot be read",), str(error))
    if sample.mask is None:
        return Picture(name, photo, "no mask" if sample.label else "", marks, "")
    try:
        mask = read_mask(sample.mask, sample.decoding.mask_threshold)
    except DataError:
        return Picture(name, photo, "", marks or ("mask cannot be read",), "")
    if mask.shape != image.shape[:2]:
        marks = tuple(dict.fromkeys((*marks, _OTHER_SIZE)))
    small = shrink_mask(mask, photo)
    if 0 < small.sum() < _TINY:
        # Around the anomaly, which the outline would hide, and large enough to be found.
        small = ndimage.binary_dilation(small, structure=np.ones((3, 3)), iterations=4)
    caption = f"{coverage_text(float(mask.mean()))} %" if mask.size else ""
    return Picture(name, mask_contour(photo, small), caption, marks, "")
