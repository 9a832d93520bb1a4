"""The run folder of a bulk prediction: a list of images in shards, each a CSV file that is written atomically.

manifest.json     model, list of images and options of the run; others are refused
images.list       the names of all images, of which a worker reads its own; nobody holds millions of them
shards/000042.csv the lines of one shard, written when all its images are done
maps/000042/      its maps
attempts/000042   a line for every time a worker began the shard; gone when it is done
scores.csv        all shards joined, when all are there
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, OutputError
from ..system.files import atomic_path, make_folder, write_bytes, write_json
from .image_list import Part, WrittenList, iterate_images, read_part, write_list
from .local import COLUMNS, CSV_FILE, MapFormat, csv_bytes

MANIFEST_FILE = "manifest.json"
LIST_FILE = "images.list"
FORMAT = 1

_HEADER = csv_bytes([COLUMNS])


@dataclass(frozen=True)
class ShardFolder:
    """The files of a run folder; plain names only, so that it can be sent to a worker."""

    path: Path

    def names(self, part: Part) -> list[Path]:
        """Return the images of a shard."""
        return read_part(self.path / LIST_FILE, part)

    def table(self, part: Part) -> Path:
        """Return the shard's CSV file."""
        return self.path / "shards" / f"{part.number:06d}.csv"

    def maps(self, part: Part) -> str:
        """Return the folder of the shard's maps within `maps/`.

        One folder per shard: file systems dislike folders with a million files, and the names of maps need only be
        unique within the shard.
        """
        return f"{part.number:06d}"

    def lines(self, part: Part, names: Sequence[Path]) -> list[list[str]] | None:
        """Return a finished shard's lines without the header; None if it is missing, damaged, or of other images."""
        try:
            with self.table(part).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                text = file.read()
            header, *lines = list(csv.reader(io.StringIO(text, newline="")))
        except FileNotFoundError:
            return None
        except (ValueError, csv.Error):
            return None
        except OSError as error:
            raise OutputError(f"cannot read {self.table(part)}: {error.strerror}") from error
        whole = text.endswith("\n") and header == list(COLUMNS) and all(len(line) == len(COLUMNS) for line in lines)
        return lines if whole and [line[0] for line in lines] == [str(path) for path in names] else None

    def write(self, part: Part, lines: Sequence[Sequence[str]]) -> None:
        """Write a shard's lines, atomically, and forget the attempts at it."""
        write_bytes(self.table(part), _HEADER + csv_bytes(lines))
        self._attempts(part).unlink(missing_ok=True)

    def begin(self, part: Part, worker: str) -> int:
        """Record that a worker begins a shard; return how often that happened since the run was started or resumed."""
        path = self._attempts(part)
        make_folder(path.parent)
        try:
            with path.open("a+", encoding="utf-8") as file:
                file.write(f"{worker}\n")
                file.seek(0)
                return len(file.readlines())
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}; free some space") from error

    def forget_attempts(self) -> None:
        """Reset the attempts at every shard."""
        for path in (self.path / "attempts").glob("*"):
            path.unlink(missing_ok=True)

    def remove_fragments(self, folder: Path) -> None:
        """Remove temporary files that a killed worker left in a folder."""
        for path in folder.glob(".*"):
            with suppress(OSError):
                path.unlink()

    def join(self, parts: Sequence[Part]) -> Path:
        """Join all shards into `scores.csv`, atomically, one shard in memory at a time.

        Raises:
            OutputError: a shard is missing or damaged, or the file cannot be written.
        """
        target = self.path / CSV_FILE
        with atomic_path(target) as temporary, temporary.open("wb") as file:
            file.write(_HEADER)
            for part in parts:
                lines = self.lines(part, self.names(part))
                if lines is None:
                    raise OutputError(f"{self.table(part)} is missing or damaged; --resume computes it again")
                file.write(csv_bytes(lines))
        return target

    def _attempts(self, part: Part) -> Path:
        return self.path / "attempts" / f"{part.number:06d}"


@dataclass(frozen=True)
class Waiting:
    """A shard with images that have no score yet."""

    part: Part
    count: int
    """Its images without a score: all of them, or those that could not be read the last time."""


@dataclass(frozen=True)
class ShardedRun:
    """A run folder that is ready to be worked on."""

    folder: ShardFolder
    parts: tuple[Part, ...]
    waiting: tuple[Waiting, ...]
    count: int
    """Images on the list."""

    @property
    def waiting_images(self) -> int:
        """Images that have no score yet."""
        return sum(shard.count for shard in self.waiting)


def open_run(
    patterns: Sequence[str | Path],
    out: str | Path,
    *,
    model_sha256: str,
    maps: MapFormat,
    shard_size: int,
    bit_depth: int | None = None,
    resume: bool,
) -> ShardedRun:
    """List the images; begin a run folder, or find out what an earlier run left to do.

    Images of finished shards that could not be read are waiting again, as with the local engine.

    Raises:
        DataError: see `iterate_images`.
        ConfigError: a shard size below 1.
        OutputError: the folder belongs to another run, holds a run and `resume` is false, or cannot be written.
    """
    if shard_size < 1:
        raise ConfigError(f"the shard size is {shard_size}; it must be at least 1")
    folder = ShardFolder(make_folder(out).absolute())
    earlier = _read_manifest(folder.path)
    if earlier is None and ((folder.path / CSV_FILE).exists() or any((folder.path / "shards").glob("*.csv"))):
        raise OutputError(
            f"{folder.path} holds scores but no {MANIFEST_FILE}, so they do not come from --engine ray; choose another "
            "folder"
        )
    if earlier is not None and not any((folder.path / "shards").glob("*.csv")):
        earlier = None  # no shard was finished, so the folder may be used again
    if earlier is not None and not resume:
        raise OutputError(f"{folder.path} holds a run already; choose another folder, or --resume to finish that run")
    listing = folder.path / (LIST_FILE if earlier is None else f".new.{LIST_FILE}")
    try:
        images = write_list(listing, iterate_images(patterns, leave_out=out), shard_size)
        facts: dict[str, object] = {
            "format": FORMAT,
            "model_sha256": model_sha256,
            "images": images.count,
            "images_sha256": images.sha256,
            "shard_size": shard_size,
            "maps": maps,
            "bit_depth": bit_depth,
        }
        if earlier is not None:
            # There was no choice before.
            _compare(folder.path, {"bit_depth": None, **earlier}, facts)
            # The same bytes; a list that went missing or was damaged is whole again.
            listing.replace(folder.path / LIST_FILE)
    finally:
        if listing.name != LIST_FILE:
            listing.unlink(missing_ok=True)
    if earlier is None:
        # Before any shard: shards without a manifest could belong to anything.
        write_json(folder.path / MANIFEST_FILE, facts)
    make_folder(folder.path / "shards")
    folder.remove_fragments(folder.path / "shards")
    folder.forget_attempts()
    return ShardedRun(folder, images.parts, tuple(_waiting(folder, images)), images.count)


def _waiting(folder: ShardFolder, images: WrittenList) -> Iterator[Waiting]:
    tables = {path.name for path in (folder.path / "shards").iterdir()}
    for part in images.parts:
        lines = folder.lines(part, folder.names(part)) if folder.table(part).name in tables else None
        missing = part.count if lines is None else sum(line[-1] != "" for line in lines)
        if missing:
            yield Waiting(part, missing)


def _read_manifest(folder: Path) -> dict[str, object] | None:
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} is damaged ({error}); choose another folder") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise OutputError(f"{path} is not the manifest of a prediction; choose another folder")
    if content["format"] > FORMAT:
        raise OutputError(
            f"{path} has format {content['format']}, this fastbgad reads up to {FORMAT}; upgrade fastbgad"
        )
    return content


def _compare(folder: Path, earlier: dict[str, object], now: dict[str, object]) -> None:
    """Raise `OutputError` where a run folder was begun for something else."""

    def differs(*names: str) -> bool:
        return any(earlier.get(name) != now[name] for name in names)

    if differs("model_sha256"):
        raise OutputError(f"{folder} was begun with another model; take that one or choose another folder")
    for name, option in (("shard_size", "--shard-size"), ("maps", "--maps"), ("bit_depth", "--bit-depth")):
        if differs(name) and earlier.get(name) is None:
            raise OutputError(f"{folder} was begun without {option}; leave it out or choose another folder")
        if differs(name):
            given = f"not {now[name]}" if now[name] is not None else "which is missing now"
            raise OutputError(
                f"{folder} was begun with {option} {earlier.get(name)}, {given}; take {option} {earlier.get(name)} or "
                "choose another folder"
            )
    if differs("images", "images_sha256"):
        raise OutputError(
            f"{folder} was begun for another list of images ({earlier.get('images')} then, {now['images']} now); name "
            "the same ones, or choose another folder"
        )
