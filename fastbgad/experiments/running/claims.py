"""Who does which job: claims of processes on one or several machines, held by files alone.

A claim is the file KEY.N, where N counts the holders so far; only the highest number counts. Whoever creates the next
number holds the job, and a file system lets exactly one process create a file. So a job whose holder died goes to one
successor, however many processes notice at the same time, and no file that somebody else may just have made is ever
moved or removed.

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
    """A job that this process holds until `release`; as a context manager it is released at the end of the block."""

    def __init__(self, path: Path, key: str, number: int, heartbeat: float) -> None:
        self.key, self._path, self._number, self._heartbeat = key, path, number, heartbeat
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"claim {key}", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._released.wait(self._heartbeat):
            # A file system that is away for a moment must not end the job; the next beat tries again.
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def release(self, done: bool = False) -> None:
        """Gives the job back; `done`: nobody needs it any more, because its results are written."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        if not done:
            # The number stays taken: were it free again, someone who still believed the claim before it to be the
            # last one could create it beside a newer holder. Where it cannot be written, it ends with this process.
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
        self.folder, self.heartbeat, self.limit = folder, heartbeat, limit

    def take(self, key: str) -> Claim | None:
        """Takes a job that nobody holds; None if somebody does, or was quicker."""
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
        """The keys of all jobs that a living process holds, this one included."""
        return {key for key, number in self._numbers().items() if self._is_alive(self._path(key, number))}

    def clock(self) -> float:
        """The file system's time in seconds, which the times of all files in the folder are to be compared with."""
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                return os.fstat(file.fileno()).st_mtime
        except OSError:
            # No folder yet, or one that may only be read: nothing in it is new.
            return time.time()

    def _path(self, key: str, number: int) -> Path:
        return self.folder / f"{key}.{number}"

    def _numbers(self) -> dict[str, int]:
        """The highest number of every key."""
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
        # Also one that cannot be read: its holder may have died while writing, or may just now be writing.
        return self.clock() - touched < self.limit


def _parse(text: str) -> dict[str, Any]:
    try:
        holder = json.loads(text)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


@cache
def machine_identity() -> str:
    """Names this machine, since it was started, and within it the space in which process numbers are unique."""
    boot, space = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Containers on one machine may have the same host name, but each counts its processes anew.
        space = os.readlink("/proc/self/ns/pid")
    return " ".join(filter(None, (socket.gethostname(), boot, space)))


def process_start(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since the machine did; None if there is none.

    Together with the number it tells a process from a later one that was given the same number.
    """
    try:
        # The name, in parentheses, may hold anything; the state follows it, the start is the 20th field from there.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Z and X: it has ended, and only its parent has not asked how.
    return None if fields[0] in "ZX" else int(fields[19])


def launch_age(place: Rank) -> float:
    """Seconds since processes were launched together, as far as this machine can tell; 0 for one alone."""
    # The launcher is the parent. It started before any of the processes it launches could fail at something.
    return process_age(os.getppid()) if place.world > 1 else 0.0


def process_age(pid: int) -> float:
    """Seconds since a process of this machine started; 0 where that cannot be told."""
    started = process_start(pid)
    if started is None:
        return 0.0
    try:
        uptime = float(_UPTIME.read_text().split()[0])
    except (OSError, ValueError):
        return 0.0
    # A container may show an uptime of its own beside its host's start times.
    return max(0.0, uptime - started / os.sysconf("SC_CLK_TCK"))
