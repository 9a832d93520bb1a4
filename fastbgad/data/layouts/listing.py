"""The samples of a category while a layout collects them, with everything that is wrong or worth knowing."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import ConfigError
from ...wording import count, listed
from ..files import IMAGE_SUFFIXES, ImageSearch
from ..masks import check_threshold
from ..sample import GOOD, Decoding, Sample
from ..wide_pixels import check_bit_depth
from .pairs import pair_masks
from .tree import Folder, ImageFile, composed, read_tree

HOLDOUT = 0.2
"""Share of the normal images that is kept for the test where a dataset has no test images."""

_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class FileOptions:
    """How a dataset's files are named and read, where that differs from the usual."""

    mask_suffix: str | None = None
    """Ending of a mask's name after that of its image, such as _GT; None: _mask, or nothing."""
    mask_threshold: float | None = None
    """Masks: share of the full range above which a pixel is anomalous, 0 for all but black. None: half, if soft."""
    bit_depth: int | None = None
    """Bits used by images that are stored in 16, such as 12; None: found from the training images."""

    def __post_init__(self) -> None:
        check_threshold(self.mask_threshold)
        check_bit_depth(self.bit_depth)
        if self.mask_suffix is not None and (not self.mask_suffix or os.sep in self.mask_suffix):
            raise ConfigError(f"mask_suffix is {self.mask_suffix!r}; give the ending of a mask's name, such as _GT")


class TableEntry(NamedTuple):
    """An image as a dataset's table has it; paths are relative to the category."""

    place: str  # in the table, for messages
    split: str  # "train" or "test"
    image: str
    mask: str  # empty if there is none
    defect: str


class Listing:
    """The samples of a category, collected folder by folder.

    Attributes:
        root: folder of the category.
        options: see `FileOptions`.
        tree: all images below it.
        search: the search that found them, which counts what was left out.
        train: training normals.
        test: test images.
        known: anomalous images that the dataset itself sets aside for training.
        problems: sentences about what must be mended.
        notes: sentences about how the dataset is read.
    """

    def __init__(self, root: Path, options: FileOptions) -> None:
        self.root = root
        self.options = options
        self.search = ImageSearch(each_once=False)
        self.tree: Folder = read_tree(root, self.search)
        self.train: list[Sample] = []
        self.test: list[Sample] = []
        self.known: list[Sample] = []
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._used: set[Path] = set()

    def images(self, *names: str) -> list[ImageFile]:
        """Return the images below a folder; it is a problem if there are none."""
        folder, path = self.tree.find(*names), self.root.joinpath(*names)
        if folder is None:
            if path.is_dir():
                suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
                self.problems.append(f"{path} holds no images; add some ({suffixes}) or remove it")
            else:
                self.problems.append(
                    f"the folder {path} does not exist; create it and put images into it{self._beside(*names)}"
                )
            return []
        return self.without_twins(folder.images())

    def _beside(self, *names: str) -> str:
        """Return what lies where a folder is missing, which may be meant: other folders with images, and images."""
        parent = self.tree.find(*names[:-1])
        if parent is None:
            return ""
        found = [f"{name}/" for name in parent.folders]
        if parent.files:
            found.append(count(len(parent.files), "image"))
        place = "/".join(names[:-1]) or str(self.root)
        return f" (in {place} there are: {listed(found, _SHOWN)})" if found else ""

    def types(self, *names: str) -> list[tuple[str, str]]:
        """Return the type and the name of every folder in a folder, also of those without images, sorted."""
        folder = self.tree.find(*names)
        found = set() if folder is None else set(folder.folders)
        found |= {name for name in _subfolders(self.root.joinpath(*names)) if not name.startswith(".")}
        return sorted((composed(name), name) for name in found)

    def without_twins(self, images: Iterable[ImageFile]) -> list[ImageFile]:
        """Return the images, of those with the same name the first; it is a problem if there are such."""
        by_key: defaultdict[str, list[ImageFile]] = defaultdict(list)
        for image in images:
            self._used.add(image.path)
            by_key[image.key].append(image)
        for twins in by_key.values():
            if len(twins) > 1:
                names = " and ".join(str(twin.path) for twin in twins)
                self.problems.append(f"{names} have the same name; keep one, or rename it and its mask")
        return [twins[0] for twins in by_key.values()]

    def normals(self, *names: str) -> list[Sample]:
        """Return the images below a folder as normal ones."""
        return [self.sample(image, None, 0, GOOD) for image in self.images(*names)]

    def anomalies(self, names: Sequence[str], masks: Sequence[str] | None, defect: str) -> list[Sample]:
        """Return the images below a folder as anomalous ones, with their masks.

        Args:
            names: of the images' folder.
            masks: names of the masks' folder; None for a dataset without masks.
            defect: the type of the anomalies.
        """
        return self.anomalous(self.images(*names), self.root.joinpath(*names), masks, defect)

    def anomalous(
        self,
        images: Sequence[ImageFile],
        folder: Path,
        masks: Sequence[str] | None,
        defect: str,
        without: Collection[str] = (),
    ) -> list[Sample]:
        """Return `images`, which lie below `folder`, as anomalous ones; see `anomalies`.

        Args:
            images: with different keys.
            folder: of the images.
            masks: names of the masks' folder; None for a dataset without masks.
            defect: the type of the anomalies.
            without: names of folders within that of the masks which belong to other images.
        """
        if masks is None:
            return [self.sample(image, None, 1, defect) for image in images]
        mask_tree, mask_folder = self.tree.find(*masks), self.root.joinpath(*masks)
        files = [] if mask_tree is None else mask_tree.images()
        files = [file for file in files if composed(file.part).split(os.sep)[0] not in without]
        self.use(files)
        if images and not files:
            self.problems.append(
                f"{mask_folder} holds no masks for the {len(images)} images of {folder}; add <image name>_mask.png"
            )
            return []
        pairs = pair_masks(images, files, folder, mask_folder, self.options.mask_suffix)
        self.problems += pairs.problems
        return [self.sample(image, pairs.masks[image.key], 1, defect) for image in images if image.key in pairs.masks]

    def sample(self, image: ImageFile, mask: Path | None, label: int, defect: str) -> Sample:
        """Return a sample; its part is what distinguishes it from others of the same file name."""
        self._used.add(image.path)
        if mask is not None:
            self._used.add(mask)
        part = image.part if os.sep in image.part else ""
        return Sample(image.path, mask, label, defect, part, Decoding(mask_threshold=self.options.mask_threshold))

    def add_entry(self, entry: TableEntry, files: Mapping[str, ImageFile], parts_in_names: bool = True) -> None:
        """Add the sample of a table's entry to its part; it is a problem if the table and the files do not agree.

        Args:
            entry: of the table.
            files: the images of the category by their paths relative to it.
            parts_in_names: tell samples apart by these paths, for file names that recur within a type.
        """
        label = int(entry.defect != GOOD)
        missing = [path for path in (entry.image, entry.mask) if path and path not in files]
        if missing:
            wrong = f"names {self.root / missing[0]}, which does not exist"
        elif label and not entry.mask:
            wrong = "names no mask for an anomalous image"
        elif not entry.image or entry.split not in ("train", "test"):
            wrong = "names no image, or neither train nor test"
        else:
            self.use(files[path] for path in (entry.image, entry.mask) if path)
            mask = files[entry.mask].path if label else None
            sample = self.sample(files[entry.image], mask, label, entry.defect)
            sample = sample if parts_in_names else sample._replace(part="")
            (self.test if entry.split == "test" else self.known if label else self.train).append(sample)
            return
        self.problems.append(f"{entry.place} {wrong}; copy the dataset again or remove it there")

    def use(self, files: Iterable[ImageFile]) -> None:
        """Count images as used, so that they are not reported as left out."""
        self._used.update(file.path for file in files)

    def leave_out(self, why: str, *names: str) -> None:
        """Count the images below a folder as left out for a reason that follows "files in <folder>, "."""
        folder = self.tree.find(*names)
        for file in [] if folder is None else folder.images():
            self._used.add(file.path)
            self.search.skipped.add(f"file in {'/'.join(names)}, {why}", str(file.path))

    def hold_out(self, normals: list[Sample], share: float = HOLDOUT, seed: int = 0) -> None:
        """Divide the normal images among training and test."""
        number = max(1, round(share * len(normals)))
        chosen = set(np.random.default_rng(seed).permutation(len(normals))[:number].tolist())
        self.train += [sample for index, sample in enumerate(normals) if index not in chosen]
        self.test += [sample for index, sample in enumerate(normals) if index in chosen]

    def finish(self, title: str) -> None:
        """Sort the samples, and count the images that the layout has no place for."""
        self.train.sort(key=_order)
        self.test.sort(key=_order)
        self.known.sort(key=_order)
        left = [file for file in self.tree.images() if file.path not in self._used]
        # A link may have given a folder another name, under which it was used.
        used = {os.path.realpath(path) for path in self._used} if left else set()
        for file in left:
            if os.path.realpath(file.path) not in used:
                place = os.path.dirname(file.part) or "the top folder"
                reason = f"file in {place}, where {title} has none"
                self.search.skipped.add(reason, str(file.path))
        if not any(sample.label for sample in (*self.test, *self.known)) and not self.problems:
            self.notes.append(
                f"{self.root} holds normal images only: training with --method nfad is possible, and of the test only "
                "the share of false alarms can be measured"
            )

    def note_missing_masks(self, place: Path) -> None:
        """Note that the anomalous images of the dataset have no masks."""
        self.notes.append(
            f"{place} holds no masks: training with --method nfad is possible, and of the test image AUROC can be "
            "measured; for other methods, and for pixel AUROC and AUPRO, add masks"
        )

    def note_holdout(self, number: int, share: float, what: str) -> None:
        """Note that some normal images are kept for the test, because `what` is missing."""
        if number:
            self.notes.append(f"{what}: {count(number, 'normal image')} ({share:.0%}) are kept for the test")


def _order(sample: Sample) -> tuple[str, str]:
    return composed(sample.defect), composed(sample.part or sample.image.name)


def _subfolders(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return []
