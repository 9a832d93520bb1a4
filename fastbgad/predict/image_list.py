"""Lists of images: found one by one in a stable order, and stored in a file that millions of names fit into."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.files import IMAGE_SUFFIXES
from ..errors import DataError, OutputError
from ..system.files import atomic_path

# Behind every name: the one byte that a file's name cannot hold, unlike a line break.
_END = b"\0"


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
    """Yield the images that files, folders (searched recursively) and globs name, each once, in a stable order.

    Folders are read one after the other during the iteration, so memory only grows with the largest of them.
    Links to folders are not followed, and folders without the right to read are passed over.

    Args:
        patterns: names of files, folders and globs.
        leave_out: a folder whose images are not found, such as one that maps are written to.

    Raises:
        DataError: a name that matches nothing, a folder without images, or one that cannot be listed.
    """
    if not patterns:
        raise DataError("no image to score: name files, folders or globs")
    forbidden = None if leave_out is None else os.path.abspath(leave_out)
    # One folder cannot name an image twice, so nothing need be remembered.
    seen: set[str] | None = set() if len(patterns) > 1 else None
    for pattern in patterns:
        matched = False
        for path in _matching(pattern, forbidden):
            matched = True
            if seen is not None:
                if path in seen:
                    continue
                seen.add(path)
            yield path
        if not matched:
            if os.path.isdir(pattern):
                suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
                raise DataError(f"the folder {Path(pattern)} holds no images ({suffixes})")
            raise DataError(f"{pattern} is no file, no folder and matches nothing; check the path")


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


def _matching(pattern: str | Path, forbidden: str | None) -> Iterator[str]:
    path = Path(pattern)
    if path.is_dir():
        # Path drops a leading "./"; so do the names below it.
        yield from _below(str(path), "" if str(path) == "." else os.path.join(str(path), ""), forbidden)
    elif path.is_file():
        yield str(path)
    else:
        matches = sorted(glob.glob(str(pattern), recursive=True))
        # Different spellings of a path are one image.
        yield from dict.fromkeys(str(Path(match)) for match in matches if os.path.isfile(match))


def _below(folder: str, prefix: str, forbidden: str | None) -> Iterator[str]:
    """Yield the images below a folder, sorted by the parts of their paths."""
    if forbidden is not None and os.path.abspath(folder) == forbidden:
        return
    try:
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
    except PermissionError:
        return
    except OSError as error:
        raise DataError(f"cannot list the folder {folder}: {error.strerror}; check the disk or leave it out") from error
    for entry in ordered:
        path = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _below(path, os.path.join(path, ""), forbidden)
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and entry.is_file():
            yield path
