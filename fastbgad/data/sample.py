"""A dataset's images by their files: a sample, and the category that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

GOOD = "good"
"""The type of normal images."""


class Decoding(NamedTuple):
    """How values in files become images and masks, where the files do not say it; see `read_image` and `read_mask`.

    Attributes:
        bit_depth: significant bits of images that are stored in 16; None takes all 16.
        mask_threshold: share of the full range above which a pixel of a mask is anomalous; None is the default.
    """

    bit_depth: int | None = None
    mask_threshold: float | None = None


class Sample(NamedTuple):
    """One image of a dataset, by its files."""

    image: Path
    mask: Path | None
    """A file, or a folder of files whose union is the mask. None: a normal image, or an anomalous one without mask."""
    label: int
    """0 normal, 1 anomalous."""
    defect: str
    """The name of the anomaly's type; "good" for normal images."""
    part: str = ""
    """Path of the image below the folder of its type, where that is more than the file's name."""
    decoding: Decoding = Decoding()

    @property
    def name(self) -> str:
        """Type and file name, which together are unique among a category's test images."""
        return f"{self.defect}/{self.part or self.image.name}"


@dataclass(frozen=True)
class Category:
    """One category (one object or texture): images to train on and to test on, sorted by type and file name.

    Attributes:
        name: of its folder.
        root: its folder.
        layout: "mvtec", "btad", "folder", ...; see `fastbgad.data.layouts`.
        train: normal images for training.
        test: normal and anomalous images for testing. Known anomalies are drawn from these, unless there are `known`.
        known: anomalous images that the dataset itself sets aside for training.
    """

    name: str
    root: Path
    layout: str
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    known: tuple[Sample, ...] = ()

    @property
    def defects(self) -> tuple[str, ...]:
        """The names of the anomaly types in the test set, sorted."""
        return tuple(sorted({sample.defect for sample in self.test if sample.label}))

    @property
    def has_masks(self) -> bool:
        """True if every anomalous image has a mask."""
        return all(sample.mask is not None for sample in (*self.test, *self.known) if sample.label)
