"""Run the items of a stage in child processes, so that no item can spoil the results of the others.

A child reports over a pipe which item it begins and its results. A child that crashes, hangs or spoils its device is
ended together with everything it has started, and another child runs the items that are left. Output of a child goes to
a log; its last lines go into the record of an item that crashed.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from .events import EVENTS_FD, PARENT_PID, SPOILED

# Lines of a child's output that are kept for the record.
LAST_LINES = 60
# Seconds in which a child must have imported what it needs, and between which the clock is read.
START_SECONDS = 90.0
TICK = 0.2


@dataclass
class ChildJob:
    """Items that run one after the other, in one child process for as long as that lives.

    Attributes:
        name: for the log.
        command: given the items that are left (None: all of them) and what to skip, the command that runs them.
        item_seconds: after so long an item has hung.
        environment: variables of the child, on top of this process's.
    """

    name: str
    command: Callable[[Sequence[str] | None, Sequence[tuple[str, str]]], Sequence[str]]
    item_seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)


class _Child:
    """A running child and how far it has come."""

    def __init__(self, job: ChildJob, items: Sequence[str] | None, skip: list[tuple[str, str]], cwd: Path) -> None:
        self.job, self.skip = job, skip
        self.items = None if items is None else list(items)  # those it has not ended
        self.item: str | None = None
        self.step: str | None = None
        self.reported = False  # it has reported by itself how the step spoiled the device
        self.changed = time.monotonic()
        self.lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        reading, writing = os.pipe()
        environment = {**os.environ, **job.environment, EVENTS_FD: str(writing), PARENT_PID: str(os.getpid())}
        self.process = subprocess.Popen(
            job.command(items, skip),
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            process_group=0,
        )
        os.close(writing)
        os.set_blocking(reading, False)
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.pipes: dict[int, tuple[BinaryIO | int, bytes, bool]] = {
            reading: (reading, b"", True),
            self.process.stdout.fileno(): (self.process.stdout, b"", False),
        }

    def kill(self) -> None:
        """End the child and everything it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        for pipe, _, _ in self.pipes.values():
            os.close(pipe) if isinstance(pipe, int) else pipe.close()


class Supervisor:
    """Run jobs until a deadline.

    Args:
        cwd: where children run.
        record: called with each result: the job's item, its outcome and what the child said of it.
        log: where the output of children goes, line by line.
        processes: children at a time.
    """

    def __init__(
        self, cwd: Path, record: Callable[[dict[str, Any]], object], log: Callable[[str], object], processes: int = 1
    ) -> None:
        self.cwd, self.record, self.log, self.processes = cwd, record, log, processes
        self._selector = selectors.DefaultSelector()
        self._children: list[_Child] = []

    def run(self, jobs: Sequence[ChildJob], deadline: float) -> None:
        """Run all jobs; items that have not ended by `deadline` (of `time.monotonic`) are recorded as left out."""
        waiting: list[tuple[ChildJob, Sequence[str] | None, list[tuple[str, str]]]] = [(job, None, []) for job in jobs]
        try:
            while waiting or self._children:
                late = time.monotonic() > deadline
                if late and waiting:
                    for job, items, _ in waiting:
                        self._leave_out(job, items)
                    waiting = []
                while waiting and len(self._children) < self.processes:
                    self._start(*waiting.pop(0))
                for key, _ in self._selector.select(TICK):
                    self._read(key.data, key.fd)
                for child in list(self._children):
                    left = self._rest_of_job(child, late)
                    if left is not None:
                        waiting.insert(0, left)
        finally:
            self.stop()

    def stop(self) -> None:
        """End every child."""
        for child in self._children:
            child.kill()
            self._forget(child)
        self._children = []

    def _start(self, job: ChildJob, items: Sequence[str] | None, skip: list[tuple[str, str]]) -> None:
        child = _Child(job, items, skip, self.cwd)
        self._children.append(child)
        for fd in child.pipes:
            self._selector.register(fd, selectors.EVENT_READ, child)

    def _forget(self, child: _Child) -> None:
        for fd in child.pipes:
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
        child.close()

    def _read(self, child: _Child, fd: int) -> bool:
        """Read what a pipe of the child has; returns whether there was something."""
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        pipe, before, events = child.pipes[fd]
        if not data:
            self._selector.unregister(fd)
        *lines, rest = (before + (data or b"\n")).split(b"\n")
        child.pipes[fd] = (pipe, rest, events)
        for line in filter(None, lines):
            if events:
                self._event(child, json.loads(line))
            else:
                text = line.decode(errors="replace")
                child.lines.append(text)
                self.log(f"[{child.job.name}] {text}")
        return bool(data)

    def _event(self, child: _Child, event: Mapping[str, Any]) -> None:
        child.changed = time.monotonic()
        kind = event["event"]
        if kind == "items":
            child.items = list(event["items"])
        elif kind == "begin":
            child.item, child.step = event["item"], None
        elif kind == "step":
            child.step = event["step"]
        elif kind == "lost":
            child.reported = True
            self.record({"item": event["item"], "step": event["step"], **event["found"]})
        elif kind == "end":
            child.item = child.step = None
            if child.items is not None and event["item"] in child.items:
                child.items.remove(event["item"])
            self.record({"item": event["item"], **event["found"]})

    def _rest_of_job(
        self, child: _Child, late: bool
    ) -> tuple[ChildJob, Sequence[str] | None, list[tuple[str, str]]] | None:
        """End a child that has ended or must end, and return the rest of its job, None if there is none."""
        job = child.job
        limit = START_SECONDS if child.item is None else job.item_seconds
        outcome, message = "", ""
        if child.process.poll() is not None:
            for fd in list(child.pipes):  # its last words
                while fd in self._selector.get_map() and self._read(child, fd):
                    pass
            status = child.process.returncode
            outcome, message = "crashed", f"the process ended with {_status(status)}"
        elif late:
            outcome, message = "left out", "the stage's time was used up while it ran"
        elif time.monotonic() - child.changed > limit:
            outcome, message = "timed out", f"nothing was heard of it for {limit:.0f} s"
        if not outcome:
            return None
        child.kill()  # what it has started may live on
        self._children.remove(child)
        self._forget(child)
        left, skip = child.items, list(child.skip)
        if child.item is not None:
            found = {"item": child.item, "outcome": outcome, "message": message, "output": list(child.lines)}
            if not child.reported:
                self.record(found | ({"step": child.step} if child.step else {}))
            again = child.step is not None and outcome != "left out"
            if again:  # the rest of this item may be right
                assert child.step is not None
                skip.append((child.item, child.step))
            elif left is not None and child.item in left:
                left.remove(child.item)
        elif (
            left is None or (left and outcome == "timed out") or (left and child.process.returncode not in (0, SPOILED))
        ):
            # It never came to its items: another one would not either.
            self.record({"item": job.name, "outcome": outcome, "message": message, "output": list(child.lines)})
            for item in left or ():
                self.record({"item": item, "outcome": "left out", "message": f"{job.name} {outcome}"})
            return None
        if not left:
            return None
        if late:
            self._leave_out(job, left)
            return None
        return job, left, skip

    def _leave_out(self, job: ChildJob, items: Sequence[str] | None) -> None:
        for item in items if items is not None else [job.name]:
            self.record({"item": item, "outcome": "left out", "message": "the stage's time was used up"})


def _status(code: int) -> str:
    if code >= 0:
        return f"status {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
