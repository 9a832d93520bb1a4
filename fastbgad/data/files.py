"""The one rule by which images are found in folders, for datasets and for `predict`.

Folders are searched recursively, in the order of the names. A file is an image if its suffix says so. Links are
followed, unless they lead to a folder that is searched anyway. Hidden files and folders are left out. Whatever is left
out is counted and named by its reason; only files that are plainly no images (texts, tables, checksums) go unmentioned.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from ..errors import DataError
from ..wording import count, listed

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
    ".tga", ".tif", ".tiff", ".webp",
})
"""Suffixes of images that are read, in lower case."""

# Files beside images that nobody takes for images.
_NO_IMAGE = frozenset({
    ".cfg", ".ckpt", ".csv", ".db", ".dvc", ".gitignore", ".gitkeep", ".htm", ".html", ".ini", ".json", ".jsonl",
    ".list", ".log", ".md", ".md5", ".onnx", ".pdf", ".pt", ".pt2", ".pth", ".py", ".rst", ".safetensors", ".sha256",
    ".toml", ".tsv", ".txt", ".xml", ".yaml", ".yml",
})
# fmt: on
_SHOWN = 3  # names per reason
_MOST_REASONS = 12  # in a message
_MOST_SUFFIXES = 20  # that are counted apart


class SkippedFiles:
    """Files and folders that a search left out: how many for which reason, and the first names of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: defaultdict[str, list[str]] = defaultdict(list)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, reason: str, path: str) -> None:
        """Count a file or folder. The reason follows the word "file" or "folder", such as "file with a hidden name"."""
        self.counts[reason] += 1
        if len(self.names[reason]) < _SHOWN:
            self.names[reason].append(path)

    def update(self, other: SkippedFiles) -> None:
        """Add what another search left out."""
        for reason, number in other.counts.items():
            self.counts[reason] += number
            self.names[reason] = (self.names[reason] + other.names[reason])[:_SHOWN]

    def sentences(self, root: str | os.PathLike[str] | None = None) -> list[str]:
        """Return one phrase per reason: how many, why, and the first names, relative to `root` if they lie below it."""
        phrases = []
        for reason, number in self.counts.items():
            first, _, rest = reason.partition(" ")
            names = [_below_root(name, root) for name in self.names[reason]]
            phrases.append(f"{count(number, first)} {rest} ({listed(names, _SHOWN, total=number)})")
        return phrases

    def message(self, root: str | os.PathLike[str]) -> str:
        """Return the line that says what was left out of a folder, such as a dataset's."""
        return f"left out of {root}: {listed(self.sentences(root), _MOST_REASONS, '; ')}"


class ImageSearch:
    """A search for images; `skipped` fills while its results are consumed.

    Args:
        leave_out: folders whose images are not found, such as one that maps are written to.
        each_once: do not follow links to folders that are searched anyway. False for a dataset, where a link may give a
            folder the name that its layout asks for; then only circles are left out.
    """

    def __init__(self, leave_out: Iterable[str | os.PathLike[str]] = (), each_once: bool = True) -> None:
        self.skipped = SkippedFiles()
        self._each_once = each_once
        self._forbidden = {os.path.realpath(folder) for folder in leave_out}

    def below(self, folder: str, prefix: str | None = None) -> Iterator[str]:
        """Yield the images below a folder, sorted by the parts of their paths.

        A link to a file that does not exist is yielded if its name is that of an image: reading it tells what is wrong.

        Args:
            folder: where to search.
            prefix: another spelling of the folder and a separator, which the yielded paths begin with: "" for ".".

        Raises:
            DataError: a folder cannot be listed, for another reason than its rights.
        """
        start = os.path.join(folder, "") if prefix is None else prefix
        yield from self._walk(folder, start, [os.path.realpath(folder)])

    def _walk(self, folder: str, prefix: str, searched: list[str]) -> Iterator[str]:
        """Yield the images below one folder.

        Args:
            folder: where to search.
            prefix: what the yielded paths begin with.
            searched: the real paths of the first folder and of those that links led to. Where each image is found once
                they are of the whole search, which adds to them, else of those above this folder.
        """
        try:
            with os.scandir(folder) as entries:
                ordered = sorted(entries, key=lambda entry: entry.name)
        except PermissionError:
            self.skipped.add("folder without the right to read it", folder)
            return
        except OSError as error:
            raise DataError(
                f"cannot list the folder {folder}: {error.strerror}; check the disk or leave it out"
            ) from error
        for entry in ordered:
            path = prefix + entry.name
            if _is_folder(entry):
                if self._enters(entry, path, searched):
                    inside = searched
                    if entry.is_symlink() and not self._each_once:
                        inside = [*searched, os.path.realpath(folder), os.path.realpath(path)]
                    yield from self._walk(path, os.path.join(path, ""), inside)
            elif self._is_image(entry, path):
                yield path

    def _enters(self, entry: os.DirEntry[str], path: str, searched: list[str]) -> bool:
        """Return True for a folder that is searched; count it otherwise."""
        if entry.name.startswith("."):
            self.skipped.add("folder with a hidden name", path)
            return False
        if self._forbidden and os.path.realpath(path) in self._forbidden:
            self.skipped.add("folder that results are written to", path)
            return False
        if entry.is_symlink():
            real = os.path.realpath(path)
            above = searched[:1] if self._each_once else [*searched, os.path.realpath(os.path.dirname(path) or ".")]
            if any(holds(real, one) for one in above):
                self.skipped.add("link to a folder that holds this one", path)
                return False
            if not self._each_once:
                return True
            if any(holds(one, real) for one in searched):
                self.skipped.add("link to a folder that is searched anyway", path)
                return False
            searched.append(real)
        elif self._each_once and len(searched) > 1 and os.path.realpath(path) in searched:
            self.skipped.add("folder that a link led to before", path)
            return False
        return True

    def _is_image(self, entry: os.DirEntry[str], path: str) -> bool:
        """Return True for an image; count what is left out."""
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            if suffix in IMAGE_SUFFIXES:
                self.skipped.add("file with a hidden name", path)
            return False
        if suffix in IMAGE_SUFFIXES:
            if os.path.isfile(path) or is_broken_link(path):
                return True
            self.skipped.add("file that is not a regular one", path)
        elif suffix not in _NO_IMAGE:
            self._skip_suffix(suffix, path)
        return False

    def _skip_suffix(self, suffix: str, path: str) -> None:
        if is_broken_link(path):
            self.skipped.add("link to something that does not exist", path)
            return
        reason = f"file with the suffix {suffix}, which is not read" if suffix else "file without a suffix"
        if reason not in self.skipped.counts and len(self.skipped.counts) > _MOST_SUFFIXES:
            reason = "file with another suffix that is not read"
        self.skipped.add(reason, path)


def is_broken_link(path: str | os.PathLike[str]) -> bool:
    """Return True for a link to something that does not exist."""
    return os.path.islink(path) and not os.path.exists(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def holds(folder: str, path: str) -> bool:
    """Return True if a path is a folder or lies below it; both are real paths."""
    return path == folder or path.startswith(os.path.join(folder, ""))


def _below_root(path: str, root: str | os.PathLike[str] | None) -> str:
    start = "" if root is None else os.path.join(os.fspath(root), "")
    return path[len(start) :] if start and path.startswith(start) else path
