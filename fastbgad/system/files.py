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
from ..wording import printable


def make_folder(path: str | Path) -> Path:
    """Create a folder with its parents and return it; raise `OutputError` where that is not allowed."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create the folder {path}: {error.strerror}; choose another output folder") from error
    return path


@contextlib.contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `target` that becomes `target` when the block ends without an error.

    Raises:
        OutputError: the folder cannot be written, or the disk is full; the temporary file is removed then.
    """
    target = Path(target)
    make_folder(target.parent)
    # The suffix is kept: image and array writers choose their format by it.
    with _temporary_beside(target, f".{target.stem}.", target.suffix) as temporary:
        yield temporary
        _flush_to_disk(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)


def create_new(target: str | Path, content: bytes) -> bool:
    """Create a file with its whole content at once; return False if it is there already.

    Of several processes on machines that share a file system, exactly one succeeds.

    Raises:
        OutputError: the file cannot be written.
    """
    target = Path(target)
    with _temporary_beside(target, ".new.", "") as temporary:
        temporary.write_bytes(content)
        temporary.chmod(0o644)
        _flush_to_disk(temporary)
        return _link(temporary, target, content)


def write_bytes(target: str | Path, content: bytes) -> None:
    """Write `content` to `target` atomically."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


def write_text(target: str | Path, content: str) -> None:
    """Write `content` to `target` atomically, as UTF-8; bytes of names that are not UTF-8 are escaped (`printable`)."""
    write_bytes(target, printable(content).encode())


def write_json(target: str | Path, content: Any) -> None:
    """Write `content` as readable JSON to `target` atomically; raise `ValueError` for NaN, which is not JSON."""
    # json escapes all but ASCII, so that names which are not UTF-8 come back as they were.
    write_text(target, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_with(target: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write(path)` on a temporary path that then becomes `target`."""
    with atomic_path(target) as temporary:
        write(temporary)


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _temporary_beside(target: Path, prefix: str, suffix: str) -> Iterator[Path]:
    """Yield a new empty file in the folder of `target`. It is removed at the end, if it is still there."""
    try:
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(target, error) from error


def _link(temporary: Path, target: Path, content: bytes) -> bool:
    """Give a file its name `target` as well; return False if another file has that name."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        # NFS may have made the link and lost the answer, and then says that it exists.
        return os.stat(temporary).st_nlink == 2
    except OSError:
        # A file system without hard links: only the creation is atomic there, the content comes a moment later.
        try:
            handle = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "wb") as file:
            file.write(content)
    return True


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
