"""Claims of processes on jobs, on one or several machines that share a folder.

A claim is the file KEY.N, where N counts the holders so far; only the highest number counts. The process that creates
the next number holds the job, and a file system lets exactly one process create a file. So a job whose holder died goes
to one successor, however many processes notice at the same time, and no file that another process may just have made is
ever moved or removed.

A holder on this machine is dead when its process is; one on another machine when its file has not been touched for a
while. Times are those of the file system, so machines whose clocks differ do not misjudge each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from ...errors import OutputError
from ...system.files import create_new, make_folder, write_json
from ...system.ranks import Rank

HEARTBEAT = 20.0
"""Seconds between two signs of life of a holder."""
LIMIT = 300.0
"""Seconds without a sign of life after which a holder on another machine counts as dead."""

_UPTIME = Path("/proc/uptime")


class Claim:
    """A job that this process holds until `release`. As a context manager it is released at the end of the block."""

    def __init__(self, path: Path, key: str, number: int, heartbeat: float) -> None:
        self.key: str = key
        self._path = path
        self._number = number
        self._heartbeat = heartbeat
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"claim {key}", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._released.wait(self._heartbeat):
            # A file system that is unavailable for a moment must not end the job; the next beat tries again.
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def release(self, done: bool = False) -> None:
        """Give the job back; `done`: it will not be needed again, because its results are written."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        if not done:
            # The file stays: if it were removed, a process with an old list of claims could create it again beside a
            # newer holder. Where it cannot be written, the claim ends with this process.
            with contextlib.suppress(OutputError):
                write_json(self._path, {"released": True})
            return
        for number in range(1, self._number + 1):
            self._path.with_name(f"{self.key}.{number}").unlink(missing_ok=True)

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Claims:
    """The claims in a folder.

    Args:
        folder: on a file system that all machines share; made when the first claim is taken.
        heartbeat: seconds between two signs of life of a holder.
        limit: seconds without one after which a holder on another machine counts as dead.
    """

    def __init__(self, folder: Path, heartbeat: float = HEARTBEAT, limit: float = LIMIT) -> None:
        self.folder: Path = folder
        self.heartbeat: float = heartbeat
        self.limit: float = limit

    def take(self, key: str) -> Claim | None:
        """Take a job that no living process holds; return None if one does, or was quicker."""
        make_folder(self.folder)
        last = self._numbers().get(key, 0)
        if last and self._is_alive(self._path(key, last)):
            return None
        path = self._path(key, last + 1)
        holder = {"machine": machine_identity(), "pid": os.getpid(), "started": process_start(os.getpid())}
        if not create_new(path, json.dumps({**holder, "time": time.time()}).encode()):
            return None
        return Claim(path, key, last + 1, self.heartbeat)

    def held(self) -> set[str]:
        """Return the keys of all jobs that a living process holds, this one included."""
        return {key for key, number in self._numbers().items() if self._is_alive(self._path(key, number))}

    def clock(self) -> float:
        """Return the file system's time in seconds, with which the times of files in the folder are comparable."""
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                return os.fstat(file.fileno()).st_mtime
        except OSError:
            # No folder yet, or a read-only one: nothing in it is new.
            return time.time()

    def _path(self, key: str, number: int) -> Path:
        return self.folder / f"{key}.{number}"

    def _numbers(self) -> dict[str, int]:
        """Return the highest number of every key."""
        numbers: dict[str, int] = defaultdict(int)
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                key, _, number = entry.name.rpartition(".")
                if key and not key.startswith(".") and number.isdecimal():
                    numbers[key] = max(numbers[key], int(number))
        return numbers

    def _is_alive(self, path: Path) -> bool:
        try:
            text, touched = path.read_text(errors="replace"), path.stat().st_mtime
        except FileNotFoundError:
            return False
        holder = _parse(text)
        if holder.get("released"):
            return False
        if holder.get("machine") == machine_identity():
            started = process_start(holder.get("pid", 0))
            return started is not None and started == holder.get("started")
        # This includes a file that cannot be parsed: its holder may have died while writing, or may be writing now.
        return self.clock() - touched < self.limit


def _parse(text: str) -> dict[str, Any]:
    try:
        holder = json.loads(text)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


@cache
def machine_identity() -> str:
    """Return a name for this machine since its last start, and for the namespace of its process numbers."""
    boot, space = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Containers on one machine may have the same host name but count their processes separately.
        space = os.readlink("/proc/self/ns/pid")
    return " ".join(filter(None, (socket.gethostname(), boot, space)))


def process_start(pid: int) -> int | None:
    """Return the start of a process of this machine, in clock ticks since the machine's; None if it does not run.

    Together with the number it distinguishes a process from a later one with the same number.
    """
    try:
        # The name, in parentheses, may hold anything; the state follows it, the start is the 20th field from there.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Z and X: it has ended, and its parent has not collected the exit status.
    return None if fields[0] in "ZX" else int(fields[19])


def launch_age(rank: Rank) -> float:
    """Return the seconds since processes were launched together, 0 for a process alone or where that is unknown."""
    # The launcher is the parent. It started before any of its processes could fail at something.
    return process_age(os.getppid()) if rank.world > 1 else 0.0


def process_age(pid: int) -> float:
    """Return the seconds since a process of this machine started, 0 where that is unknown."""
    started = process_start(pid)
    if started is None:
        return 0.0
    try:
        uptime = float(_UPTIME.read_text().split()[0])
    except (OSError, ValueError):
        return 0.0
    # A container may show an uptime of its own beside its host's start times.
    return max(0.0, uptime - started / os.sysconf("SC_CLK_TCK"))
