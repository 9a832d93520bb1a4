"""Where the data sets lie: the folders of --data, searched for categories that are told apart by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ...data import Category, open_category
from ...data.layouts import Check
from ...errors import DataError
from .cells import Cell, Dataset
from .protocol_file import dataset_facts

# BTAD unpacks to BTech_Dataset_transformed.
_FOLDER_NAMES = re.compile(r"mvtec|btad|btech", re.IGNORECASE)

Place = tuple[Dataset, str]
"""A data set and one of its categories."""


@dataclass(frozen=True)
class Sources:
    """The categories that were found.

    Attributes:
        folders: of each category found, its folder; the first where there are several.
        searched: the folders that were looked into.
    """

    folders: dict[Place, Path]
    searched: tuple[Path, ...]

    def open(self, dataset: Dataset, category: str, check: Check = "quick") -> Category:
        """Opens a category.

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
        if not any(found == dataset for found, _ in self.folders):
            return (
                f"{title} was not found: neither {category} nor another of its categories lies in {searched}; give the "
                "folder that holds them with --data"
            )
        return f"the category {category} of {title} was not found in {searched}; download it, or leave it out"


def find_sources(folders: Sequence[Path]) -> Sources:
    """Looks for the categories of all data sets in folders.

    Each folder holds categories, is one, or holds folders named mvtec*, btad* or btech*, in any case, that hold
    categories.

    Raises:
        DataError: a folder does not exist, or none was given.
    """
    if not folders:
        raise DataError("no folder of data sets was given; name one or more with --data")
    names = {category: dataset for dataset in get_args(Dataset) for category in dataset_facts(dataset).images}
    found: dict[Place, Path] = {}
    searched = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"the folder {folder} does not exist; check --data")
        searched.append(folder)
        searched += sorted(path for path in folder.iterdir() if _FOLDER_NAMES.match(path.name) and path.is_dir())
    for folder in searched:
        for path in _category_folders(folder, names):
            found.setdefault((names[path.name], path.name), path)
    return Sources(found, tuple(searched))


def _category_folders(folder: Path, names: Iterable[str]) -> list[Path]:
    whole = folder.resolve()
    if whole.name in set(names) and (whole / "train").is_dir():
        return [whole]
    return [path for path in sorted(folder.iterdir()) if path.name in set(names) and path.is_dir()]


def places_of(cells: Iterable[Cell]) -> tuple[Place, ...]:
    """The categories that cells are measured on, each once, in their order."""
    return tuple(dict.fromkeys((cell.dataset, cell.category) for cell in cells))
