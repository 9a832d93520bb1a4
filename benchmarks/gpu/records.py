"""Keep what a run finds in a file of JSON lines: each is on the disk before the next one is asked for."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORDS = "records.jsonl"
# Outcomes that someone has to look at.
TROUBLES = ("wrong", "failed", "crashed", "timed out")

Record = dict[str, Any]


class RecordError(Exception):
    """A file of records cannot be used; the message names it."""


class Records:
    """Append records to a file that survives the end of the run, whenever that comes."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`/records.jsonl, which another run may have begun; raises `OSError`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / RECORDS
        self._file = self.path.open("ab")
        # A run that was killed while it wrote has left part of a line, which must not swallow the next one.
        content = self.path.read_bytes()
        self._file.truncate(content.rfind(b"\n") + 1)

    def add(self, record: Mapping[str, Any]) -> None:
        """Write one line and wait until the disk has it."""
        self._file.write(json.dumps(plain(record)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def read_records(path: Path) -> list[Record]:
    """Return all whole records of a file; a last line that was cut short is left out.

    Raises:
        RecordError: the file cannot be read, or a line before the last one is damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise RecordError(f"line {number} of {path} is damaged ({error}); delete it, or run again") from error
    return found


def plain(value: Any) -> Any:
    """Return `value` as JSON takes it: text in place of what is not finite and of what JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)
