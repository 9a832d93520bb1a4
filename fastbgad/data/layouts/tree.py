"""The images of a category by the folders that they lie in, from one search.

Names are compared as people see them: composed and decomposed letters are equal, and a folder may be written Train or
TRAIN where `train` is looked for.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..files import ImageSearch


class ImageFile(NamedTuple):
    """An image below a folder."""

    path: Path
    part: str
    """Its path relative to the folder."""

    @property
    def key(self) -> str:
        """The relative path without suffix, in composed letters: what an image and its mask have in common."""
        return composed(os.path.splitext(self.part)[0])


class Folder:
    """A folder and the images below it.

    Attributes:
        path: of the folder.
        files: the names of the images in the folder itself, sorted.
        folders: the folders in it that hold images, by their names, sorted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: list[str] = []
        self.folders: dict[str, Folder] = {}

    @property
    def name(self) -> str:
        """The name in composed letters."""
        return composed(self.path.name)

    def find(self, *names: str) -> Folder | None:
        """Return the folder that a path of names leads to, None if there is no image in it."""
        folder: Folder | None = self
        for name in names:
            folder = None if folder is None else folder._child(name)
        return folder

    def images(self) -> list[ImageFile]:
        """Return all images below the folder, sorted by their relative paths in composed letters."""
        found = [ImageFile(self.path / part, part) for part in self._parts("")]
        return sorted(found, key=lambda file: composed(file.part).split(os.sep))

    def _parts(self, prefix: str) -> Iterator[str]:
        yield from (prefix + name for name in self.files)
        for name, folder in self.folders.items():
            yield from folder._parts(os.path.join(prefix, name, ""))

    def _child(self, name: str) -> Folder | None:
        if name in self.folders:
            return self.folders[name]
        alike = [folder for key, folder in self.folders.items() if _seen(key) == _seen(name)]
        return alike[0] if len(alike) == 1 else None


def read_tree(root: Path, search: ImageSearch) -> Folder:
    """Return the images below a folder; what is left out is counted by `search`.

    Raises:
        DataError: a folder cannot be listed.
    """
    tree = Folder(root)
    start = len(os.path.join(root, ""))
    for path in search.below(str(root)):
        *parents, name = path[start:].split(os.sep)
        folder = tree
        for parent in parents:
            if parent not in folder.folders:
                folder.folders[parent] = Folder(folder.path / parent)
            folder = folder.folders[parent]
        folder.files.append(name)
    return tree


def composed(name: str) -> str:
    """Return a name in composed letters (Unicode NFC); file systems of Macs decompose them."""
    return unicodedata.normalize("NFC", name)


def _seen(name: str) -> str:
    return composed(name).casefold()
