"""The folders of --data, searched for categories, which are told apart by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ...data import Category, open_category
from ...data.inspection import Check
from ...errors import DataError
from .cells import Cell, Dataset
from .protocol_file import dataset_facts

# BTAD unpacks to BTech_Dataset_transformed.
_FOLDER_NAMES = re.compile(r"mvtec|btad|btech", re.IGNORECASE)

CategoryKey = tuple[Dataset, str]
"""A data set and one of its categories."""


@dataclass(frozen=True)
class Sources:
    """Folders of categories.

    Attributes:
        folders: the folder of each category, the first where there are several.
        searched: the folders that were searched.
    """

    folders: dict[CategoryKey, Path]
    searched: tuple[Path, ...]

    def open(self, dataset: Dataset, category: str, check: Check = "quick") -> Category:
        """Open a category.

        Raises:
            DataError: it was not found, or (`DatasetProblemsError`) its files are not fit for use.
        """
        folder = self.folders.get((dataset, category))
        if folder is None:
            raise DataError(self._not_found(dataset, category))
        return open_category(folder.parent, folder.name, dataset, check)

    def _not_found(self, dataset: Dataset, category: str) -> str:
        searched = ", ".join(map(str, self.searched))
        title = dataset_facts(dataset).title
        if not any(other == dataset for other, _ in self.folders):
            return (
                f"{title} was not found: neither {category} nor another of its categories lies in {searched}; give the "
                "folder that holds them with --data"
            )
        return f"the category {category} of {title} was not found in {searched}; download it, or leave it out"


def find_sources(folders: Sequence[Path]) -> Sources:
    """Search folders for the categories of all data sets.

    Each folder holds categories, is one, or holds folders named mvtec*, btad* or btech*, in any case, that hold
    categories.

    Raises:
        DataError: a folder does not exist, or none was given.
    """
    if not folders:
        raise DataError("no folder of data sets was given; name one or more with --data")
    names = {category: dataset for dataset in get_args(Dataset) for category in dataset_facts(dataset).images}
    category_folders: dict[CategoryKey, Path] = {}
    searched = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"the folder {folder} does not exist; check --data")
        searched.append(folder)
        searched += sorted(path for path in folder.iterdir() if _FOLDER_NAMES.match(path.name) and path.is_dir())
    for folder in searched:
        for path in _category_folders(folder, names):
            category_folders.setdefault((names[path.name], path.name), path)
    return Sources(category_folders, tuple(searched))


def _category_folders(folder: Path, names: Iterable[str]) -> list[Path]:
    whole = folder.resolve()
    if whole.name in set(names) and (whole / "train").is_dir():
        return [whole]
    return [path for path in sorted(folder.iterdir()) if path.name in set(names) and path.is_dir()]


def categories_of(cells: Iterable[Cell]) -> tuple[CategoryKey, ...]:
    """Return the categories that cells are measured on, each once, in their order."""
    return tuple(dict.fromkeys((cell.dataset, cell.category) for cell in cells))
