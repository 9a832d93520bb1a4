"""Finds the categories below a folder and divides each into training and test images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastbgad.data import Category, Split, list_categories, open_category, split_known_anomalies
from fastbgad.errors import DataError, FastBGADError

KNOWN = 10
"""Known anomalies of a category, if it has at least twice as many."""


def find_categories(data: Path) -> dict[str, Path]:
    """Return name -> folder of every category in `data`: itself, a folder in it, or a folder in one of those.

    A name that occurs twice is written with the folder above it, as `dataset.name`.

    Raises:
        DataError: no such folder, or no category in it.
    """
    folders = sorted(_category_folders(data))
    names = [folder.resolve().name for folder in folders]
    found = {
        name if names.count(name) == 1 else f"{folder.resolve().parent.name}.{name}": folder
        for name, folder in zip(names, folders, strict=True)
    }
    if not found:
        raise DataError(
            f"no category was found in {data}: neither it, nor a folder in it, nor one in those holds train/ (the "
            "layout of MVTec AD) or normal/ (plain folder); check the path"
        )
    return found


def _category_folders(data: Path) -> Iterator[Path]:
    here = list_categories(data)
    if here == [data.resolve().name] and not (data / here[0]).is_dir():
        yield data
        return
    for folder in sorted(path for path in data.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if folder.name in here:
            yield folder
        else:
            yield from (folder / name for name in list_categories(folder))


def open_set(name: str, folder: Path) -> Category:
    """Open a category under the name of `find_categories`; raises `DataError` naming what is wrong with it."""
    category = open_category(folder, check="quick")
    return Category(name, category.root, category.layout, category.train, category.test)


def known_count(category: Category) -> int:
    """Return how many anomalies are known: `KNOWN`, but at most half of the anomalous test images."""
    return min(KNOWN, sum(sample.label for sample in category.test) // 2)


def split_set(category: Category, seed: int) -> Split:
    """Return the split of a seed, the same for every contender: known anomalies leave the test of all of them.

    Raises:
        DataError: the test would have no normal image, or no anomalous one.
    """
    split = split_known_anomalies(category, known_count(category), seed=seed)
    if all(sample.label for sample in split.test):
        raise DataError(f"{category.root} has no normal test image, so nothing can be measured on it; add some")
    return split


def reason_of(error: BaseException) -> str:
    """Return one line that says what went wrong; an error that is not fastbgad's is named by its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FastBGADError) and text else f"{type(error).__name__}: {text or 'no message'}"
