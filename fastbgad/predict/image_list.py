"""Lists of images: found one by one in a stable order, and stored in a file that millions of names fit into."""

from __future__ import annotations

import glob
import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.files import IMAGE_SUFFIXES, ImageSearch, SkippedFiles, holds, is_broken_link
from ..errors import DataError, Notice, OutputError
from ..system.files import atomic_path

# Behind every name: the one byte that a file's name cannot hold, unlike a line break.
_END = b"\0"
# What both engines write into the output folder. It may hold the photographs, too, so it is not left out as a whole.
_RESULT_FOLDERS = ("maps", "shards", "attempts")


@dataclass(frozen=True)
class Part:
    """A run of names within a file that `write_list` wrote."""

    number: int
    offset: int
    """Of its first byte."""
    size: int
    """In bytes."""
    count: int
    """Names."""


@dataclass(frozen=True)
class WrittenList:
    """The result of `write_list`."""

    count: int
    sha256: str
    parts: tuple[Part, ...]


def iterate_images(patterns: Sequence[str | Path], leave_out: str | Path | None = None) -> Iterator[str]:
    """Yield the images that files, folders and globs name, each once, in a stable order.

    Folders are searched by the rule of `fastbgad.data.files`, also those that a glob matches: recursively, through
    links, without hidden names. A file that is named itself is taken whatever its name; of the files that a glob
    matches, those with the suffix of an image are. What is left out is counted in one `Notice` at the end. Folders are
    read one after the other during the iteration, so memory only grows with the largest of them.

    Args:
        patterns: names of files, folders and globs.
        leave_out: the folder that results are written to. It is not searched, and where it holds the images itself its
            maps are left out.

    Raises:
        DataError: a name that matches no image, or a folder that cannot be listed.
    """
    if not patterns:
        raise DataError("no image to score: name files, folders or globs")
    finder = _Finder(leave_out)
    # One folder cannot name an image twice, so nothing need be remembered.
    seen: set[str] | None = None if len(patterns) == 1 and os.path.isdir(patterns[0]) else set()
    found = False
    nothing: DataError | None = None
    for pattern in map(str, patterns):
        matched = False
        for path in finder.images(pattern):
            matched = True
            if seen is not None:
                key = finder.real_name(path)
                if key in seen:
                    continue
                seen.add(key)
            yield path
        found |= matched
        if not matched:
            nothing = finder.nothing(pattern)
            # A shell's photos/* names photos/scores, too.
            if not finder.met_results(pattern):
                raise nothing
    if nothing is not None and not found:
        raise nothing
    if finder.left_out:
        warnings.warn(finder.message(), Notice, stacklevel=3)


def write_list(target: str | Path, images: Iterable[str], part_size: int) -> WrittenList:
    """Write names to a file, atomically and as they come; return where its parts of `part_size` names begin.

    Raises:
        OutputError: the file cannot be written.
    """
    digest = hashlib.sha256()
    parts: list[Part] = []
    begin = position = count = names = 0
    with atomic_path(target) as temporary, temporary.open("wb") as file:
        for image in images:
            entry = os.fsencode(image) + _END
            file.write(entry)
            digest.update(entry)
            position += len(entry)
            count += 1
            names += 1
            if names == part_size:
                parts.append(Part(len(parts), begin, position - begin, names))
                begin, names = position, 0
        if names:
            parts.append(Part(len(parts), begin, position - begin, names))
    return WrittenList(count, digest.hexdigest(), tuple(parts))


def read_part(path: str | Path, part: Part) -> list[Path]:
    """Return the names of one part of a list.

    Raises:
        OutputError: the file is missing or shorter than it was written.
    """
    try:
        with Path(path).open("rb") as file:
            file.seek(part.offset)
            content = file.read(part.size)
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror}; it belongs to the run and must stay") from error
    names = content.split(_END)
    if len(content) != part.size or names.pop() or len(names) != part.count:
        raise OutputError(f"{path} is not the list that was written; choose another output folder")
    return [Path(os.fsdecode(name)) for name in names]


class _Finder:
    """Finds the images of one pattern after the other, and counts what it leaves out."""

    def __init__(self, leave_out: str | Path | None) -> None:
        self.left_out = SkippedFiles()
        """Of all patterns."""
        self._out: str | None = None
        self._results: tuple[str, ...] = ()
        if leave_out is not None:
            self._out = os.path.realpath(leave_out)
            self._results = tuple(os.path.realpath(os.path.join(self._out, name)) for name in _RESULT_FOLDERS)
        self._skipped = SkippedFiles()  # of one pattern
        self._left_results = False  # of one pattern: something that it named itself
        self._roots: list[str] = []  # patterns of which something was left out; more than two are not told apart
        self._last_folder = self._last_real = ""

    def images(self, pattern: str) -> Iterator[str]:
        """Yield the images that a pattern names."""
        self._skipped, self._left_results = SkippedFiles(), False
        # Path drops a leading "./"; so do the names below it.
        path = str(Path(pattern))
        if os.path.isdir(pattern):
            yield from self._below(path)
        elif os.path.isfile(pattern) or is_broken_link(pattern):
            yield from self._unless_result(path)
        elif os.path.lexists(pattern):
            raise DataError(f"{pattern} is a pipe, a socket or a device; save the image in a file")
        else:
            yield from self._matching(pattern)
        if self._skipped:
            self._roots = [*self._roots[:1], path]
            self.left_out.update(self._skipped)

    def nothing(self, pattern: str) -> DataError:
        """Return the error for the last pattern if it named no image."""
        if self._skipped:
            subject = f"the folder {Path(pattern)} holds" if os.path.isdir(pattern) else f"{pattern} names"
            left_out = "; ".join(self._skipped.sentences(Path(pattern)))
            remedy = "choose another output folder" if self._left_results else "to have a file tried, name it itself"
            return DataError(f"{subject} no image that is read: left out {left_out}; {remedy}")
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        if os.path.isdir(pattern):
            return DataError(f"the folder {Path(pattern)} holds no images ({suffixes})")
        if any(True for _ in glob.iglob(pattern, recursive=True)):
            return DataError(f"{pattern} only matches folders without images ({suffixes})")
        return DataError(f"{pattern} is no file, no folder and matches nothing; check the path")

    def message(self) -> str:
        """Return what was left out of all patterns."""
        if len(self._roots) == 1:
            return self.left_out.message(self._roots[0])
        return f"left out: {'; '.join(self.left_out.sentences())}"

    def met_results(self, pattern: str) -> bool:
        """Return True if the last pattern named the folder that results are written to, or something in it."""
        return self._left_results or (self._out is not None and os.path.realpath(pattern) == self._out)

    def real_name(self, path: str) -> str:
        """Return a file's path without links to folders: what different spellings of one image have in common."""
        folder, name = os.path.split(path)
        if folder != self._last_folder or not self._last_real:
            self._last_folder, self._last_real = folder, os.path.realpath(folder)
        return os.path.join(self._last_real, name)

    def _below(self, folder: str) -> Iterator[str]:
        if any(holds(results, os.path.realpath(folder)) for results in self._results):
            self._skipped.add("folder that results are written to", folder)
            self._left_results = True
            return
        search = ImageSearch(() if self._out is None else (self._out, *self._results))
        search.skipped = self._skipped
        yield from search.below(folder, "" if folder == "." else None)

    def _unless_result(self, path: str) -> Iterator[str]:
        """Yield a file, unless it is a map of an earlier call: a shell's photos/*/*.png names those, too."""
        if self._results and any(holds(results, self.real_name(path)) for results in self._results):
            self._skipped.add("file in a folder that results are written to", path)
            self._left_results = True
        else:
            yield path

    def _matching(self, pattern: str) -> Iterator[str]:
        """Yield the images that a glob matches, and those in folders that it matches."""
        searched: set[str] = set()
        for path in sorted({str(Path(match)) for match in glob.glob(pattern, recursive=True)}):
            if _is_covered(path, searched):
                continue
            if os.path.isdir(path):
                searched.add(path)
                yield from self._below(path)
            elif os.path.splitext(path)[1].lower() not in IMAGE_SUFFIXES:
                self._skipped.add("file whose suffix is not that of an image", path)
            elif os.path.isfile(path) or is_broken_link(path):
                yield from self._unless_result(path)
            else:
                self._skipped.add("file that is not a regular one", path)


def _is_covered(path: str, searched: set[str]) -> bool:
    """Return True for what a search came across: below a folder that was searched, and not hidden within it."""
    while searched and not os.path.basename(path).startswith("."):
        folder = os.path.dirname(path)
        if (folder or ".") in searched:
            return True
        if folder in ("", path):
            return False
        path = folder
    return False
