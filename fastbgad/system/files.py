"""Files that are either written whole or not at all.

Each writer fills a temporary file beside the target, flushes it to the disk and renames it over the target, so a
crash, a full disk or Ctrl-C never leaves half a file, and never costs what was there before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import OutputError


def make_folder(path: str | Path) -> Path:
    """Creates a folder with its parents and returns it; raises `OutputError` where that is not allowed."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create the folder {path}: {error.strerror}; choose another output folder") from error
    return path


@contextlib.contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `target` that becomes `target` when the block ends without an error.

    Raises `OutputError` when the folder cannot be written or the disk is full; the temporary file is removed then.
    """
    target = Path(target)
    make_folder(target.parent)
    # The suffix is kept: image and array writers choose their format by it.
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=target.suffix, dir=target.parent)
    except OSError as error:
        raise _cannot_write(target, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush_to_disk(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        raise _cannot_write(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(target: str | Path, content: bytes) -> None:
    """Writes `content` to `target` atomically."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


def write_text(target: str | Path, content: str) -> None:
    """Writes `content` to `target` atomically, as UTF-8."""
    write_bytes(target, content.encode())


def write_json(target: str | Path, content: Any) -> None:
    """Writes `content` as readable JSON to `target` atomically. NaN is refused: it is not JSON."""
    write_text(target, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_with(target: str | Path, write: Callable[[Path], object]) -> None:
    """Calls `write(path)` on a temporary path that then becomes `target`."""
    with atomic_path(target) as temporary:
        write(temporary)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cannot_write(target: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"cannot write {target}: {reason}; free some space or choose another output folder")


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    # The only portable way to read the umask is to set it; tempfile creates files with mode 600.
    mask = os.umask(0)
    os.umask(mask)
    return mask
