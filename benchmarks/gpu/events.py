"""Events that a child process of the supervisor reports over its pipe."""

from __future__ import annotations

import ctypes
import json
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

EVENTS_FD = "FASTBGAD_GPU_EVENTS"
PARENT_PID = "FASTBGAD_GPU_PARENT"
# The exit status of a child whose device is spoiled: nothing can be launched on it, so another child goes on.
SPOILED = 75
_PR_SET_PDEATHSIG = 1


class Events:
    """The pipe to the supervisor, or nothing where this process has none."""

    def __init__(self) -> None:
        fd = os.environ.pop(EVENTS_FD, None)
        self._fd = None if fd is None else int(fd)
        if self._fd is not None:
            os.set_inheritable(self._fd, False)  # compilers that this process starts must not hold the pipe open
            die_with_parent()

    def items(self, items: Sequence[str]) -> None:
        """Say which items this process runs, in their order."""
        self._send({"event": "items", "items": list(items)})

    def begin(self, item: str) -> None:
        """Say that an item begins."""
        self._send({"event": "begin", "item": item})

    def step(self, step: str) -> None:
        """Say which part of the item begins: if it crashes the process, the item is run again without it."""
        self._send({"event": "step", "step": step})

    def end(self, item: str, found: Mapping[str, Any]) -> None:
        """Say what was found; `found` holds "outcome" at least."""
        self._send({"event": "end", "item": item, "found": dict(found)})

    def lost(self, item: str, step: str, found: Mapping[str, Any]) -> None:
        """Say that a part of an item has spoiled the device; this process ends, the item is run without the part."""
        self._send({"event": "lost", "item": item, "step": step, "found": dict(found)})

    def _send(self, event: Mapping[str, Any]) -> None:
        if self._fd is not None:
            data = json.dumps(event).encode() + b"\n"
            while data:
                data = data[os.write(self._fd, data) :]


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, however that happens (Linux)."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    parent = os.environ.get(PARENT_PID)
    if parent is not None and os.getppid() != int(parent):  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)
