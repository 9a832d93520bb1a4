"""A category of a dataset opened: found, listed by its layout, checked.

Everything wrong with it is reported at once. What is left out, and what is read in a way that the user should know of,
is a `Notice`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, DatasetProblemsError, Notice, check_choice
from ..wording import choose, did_you_mean
from .files import ImageSearch, SkippedFiles
from .inspection import Check, FileFacts, OnFiles, find_bit_depth, inspect_samples, leaks, mask_notes
from .layouts import KINDS, FileOptions, FolderLayout, Layout, Listing, kind_of, list_samples, title_of
from .layouts.tree import composed
from .sample import Category, Sample

_LAYOUTS: tuple[str, ...] = ("auto", *KINDS, "folder")


@dataclass(frozen=True)
class Survey:
    """A category and everything that is known of it.

    Attributes:
        category: its samples.
        title: name of the dataset that its layout is known from.
        problems: sentences about what must be mended before the category can be used.
        notes: sentences about how it is read.
        skipped: files that were left out, by reason.
        facts: of the samples in `samples`; empty if no file was looked at.
    """

    category: Category
    title: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    skipped: SkippedFiles
    facts: tuple[FileFacts, ...]

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Return all samples: those for training, normal and anomalous, then those for the test."""
        return (*self.category.train, *self.category.known, *self.category.test)


def list_categories(root: str | Path, layout: Layout | FolderLayout = "auto") -> list[str]:
    """Return the names of the categories in `root`, sorted; [`root`'s own name] if `root` itself is one.

    Raises:
        DataError: `root` is not a folder.
        ConfigError: `layout` is unknown.
    """
    return sorted(_find_categories(Path(root), layout))


def folders_without_category(root: str | Path, layout: Layout | FolderLayout = "auto") -> list[str]:
    """Return the names of folders in `root` that hold images but are no category, sorted; none if `root` is one.

    Raises:
        DataError: `root` is not a folder.
        ConfigError: `layout` is unknown.
    """
    root = Path(root)
    categories = _find_categories(root, layout)
    if kind_of(root, layout) is not None:
        return []
    others = [folder for folder in _subfolders(root) if folder.name not in categories]
    return [folder.name for folder in others if next(ImageSearch().below(str(folder)), None) is not None]


def open_category(
    root: str | Path,
    category: str | None = None,
    layout: Layout | FolderLayout = "auto",
    check: Check = "full",
    files: FileOptions | None = None,
    on_files: OnFiles | None = None,
) -> Category:
    """Open a category of a dataset and check it.

    A `Notice` tells what was left out, which masks have more than two values, and whatever else the user should know.

    Args:
        root: the folder of the dataset or of one category.
        category: its name; may be left out where there is only one.
        layout: "auto", a name of `fastbgad.data.layouts`, or a `FolderLayout` with other folder names.
        check: "full" decodes every image and mask and looks for images that are in training and test; "quick" reads
            the headers of the images and decodes the masks; "none" compares the names, and reads a few training images
            of 16 bits to find their depth.
        files: names of masks, their threshold, the bit depth of images.
        on_files: see `fastbgad.data.inspection.OnFiles`.

    Raises:
        DatasetProblemsError: dataset validation failed; `problems` lists every issue found.
        DataError: there is no such folder or category.
        ConfigError: `layout`, `check` or `files` cannot work.
    """
    survey = survey_category(root, category, layout, check, files, on_files)
    if survey.problems:
        raise DatasetProblemsError(survey.category.root, survey.problems)
    for note in survey.notes:
        warnings.warn(note, Notice, stacklevel=2)
    if survey.skipped:
        warnings.warn(survey.skipped.message(survey.category.root), Notice, stacklevel=2)
    return survey.category


def survey_category(
    root: str | Path,
    category: str | None = None,
    layout: Layout | FolderLayout = "auto",
    check: Check = "full",
    files: FileOptions | None = None,
    on_files: OnFiles | None = None,
    on_mask: Callable[[Sample, NDArray[np.bool_]], object] | None = None,
) -> Survey:
    """Return a category with everything that is known of it, also if there are problems; see `open_category`.

    Raises:
        DataError: there is no such folder or category, or its table cannot be read.
        ConfigError: as `open_category`.
    """
    check_choice("check", check, Check)
    root, options = Path(root), files or FileOptions()
    categories = _find_categories(root, layout)
    name = _choose(root, category, categories, layout)
    folder, kind = categories[name]
    if kind in KINDS and KINDS[kind].every_value and options.mask_threshold is None:
        options = replace(options, mask_threshold=0.0)
    listing = Listing(folder, options)
    list_samples(folder, kind, layout, listing)
    _set_bit_depth(listing)
    opened = Category(name, folder, kind, tuple(listing.train), tuple(listing.test), tuple(listing.known))
    facts: list[FileFacts] = []
    if check != "none":
        samples = [*opened.train, *opened.known, *opened.test]
        facts = inspect_samples(samples, check == "full", on_files, on_mask)
        listing.problems += [problem for fact in facts for problem in fact.problems]
        listing.problems += leaks(samples, len(opened.train) + len(opened.known), facts)
        listing.notes += mask_notes(samples, facts)
    return Survey(
        opened,
        title_of(kind),
        tuple(listing.problems),
        tuple(listing.notes),
        listing.search.skipped,
        tuple(facts),
    )


def _set_bit_depth(listing: Listing) -> None:
    """Give every sample the bit depth of the images, if it is given or found."""
    depth = listing.options.bit_depth
    if depth is None:
        depth = find_bit_depth(listing.train)
        if depth is None:
            return
        if depth < 16:
            listing.notes.append(
                f"the training images are stored in 16 bits and use {depth}: values 0 to {(1 << depth) - 1} are taken "
                "as black to white; --bit-depth 16 takes 0 to 65535, --bit-depth N another range"
            )
    for samples in (listing.train, listing.test, listing.known):
        samples[:] = [s._replace(decoding=s.decoding._replace(bit_depth=depth)) for s in samples]


def _find_categories(root: Path, layout: Layout | FolderLayout) -> dict[str, tuple[Path, str]]:
    if not isinstance(layout, FolderLayout):
        check_choice("layout", layout, _LAYOUTS)
    if not root.is_dir():
        raise DataError(f"the dataset folder {root} does not exist; check the path")
    kind = kind_of(root, layout)
    if kind is not None:
        return {root.resolve().name: (root, kind)}
    kinds = {folder: kind_of(folder, layout) for folder in _subfolders(root)}
    return {folder.name: (folder, kind) for folder, kind in kinds.items() if kind is not None}


def _choose(root: Path, category: str | None, categories: Collection[str], layout: Layout | FolderLayout) -> str:
    if not categories:
        raise DataError(_no_category(root, layout))
    if category is None:
        if len(categories) > 1:
            raise DataError(f"{root} holds {len(categories)} categories; {choose(sorted(categories))}")
        return next(iter(categories))
    alike = [name for name in categories if composed(name) == composed(category)]
    if not alike:
        hint = did_you_mean(category, categories)
        raise DataError(f"{root} has no category {category!r}; {hint}it holds {', '.join(sorted(categories))}")
    return category if category in alike else alike[0]


def _no_category(root: Path, layout: Layout | FolderLayout) -> str:
    """Return why no category was found, with the nearest thing that was."""
    asked = "" if isinstance(layout, FolderLayout) or layout == "auto" else f" (layout {layout!r})"
    message = (
        f"no category was found in {root}{asked}: neither it nor a folder in it holds train/ (MVTec AD, BTAD and many "
        "others), normal/ (plain folder), or what other layouts have; check the path and the layout"
    )
    for folder in _subfolders(root):
        inner = [f.name for f in _subfolders(folder) if kind_of(f, layout) is not None]
        if inner:
            return f"{message}. The folder {folder} holds categories ({', '.join(inner[:3])}): give that"
    pointers = sorted(path.name for path in root.glob("*.dvc"))
    if pointers:
        return f"{message}. There is {pointers[0]}: fetch the data (dvc pull)"
    return message


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"cannot list the folder {folder}: {error.strerror}; check its rights") from error
    return [folder / name for name in sorted(names)]
