"""Children that crash, hang, spoil their device or are killed: what the others found is kept, and nothing lives on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.supervisor import ChildJob, Supervisor
from tests import ROOT

# A child as the supervisor's own: items by name, run by the functions of the scenario.
CHILD = """
import json, os, subprocess, sys, time
from benchmarks.gpu.events import SPOILED, Events
events = Events()
wanted, skip = json.loads(sys.argv[1]), json.loads(sys.argv[2])
names = [name for name in {names} if wanted is None or name in wanted]
events.items(names)
for name in names:
    events.begin(name)
    print("at", name, flush=True)
{body}
    events.end(name, {{"outcome": "right"}})
"""


class Run:
    """A supervisor over one scenario, and what came of it."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.records: list[dict[str, Any]] = []
        self.log: list[str] = []

    def job(self, names: Sequence[str], body: str, item_seconds: float = 30.0, name: str = "job") -> ChildJob:
        script = self.folder / f"{name}.py"
        script.write_text(CHILD.format(names=list(names), body=textwrap.indent(textwrap.dedent(body), "    ")))

        def command(items: Sequence[str] | None, skip: Sequence[tuple[str, str]]) -> list[str]:
            return [sys.executable, str(script), json.dumps(items), json.dumps(skip)]

        return ChildJob(name, command, item_seconds, {"PYTHONPATH": str(ROOT)})

    def __call__(self, *jobs: ChildJob, seconds: float = 60.0, processes: int = 1) -> dict[str, str]:
        """Run the jobs; returns the outcome of every item."""
        supervisor = Supervisor(self.folder, self.records.append, self.log.append, processes)
        supervisor.run(jobs, time.monotonic() + seconds)
        return {record["item"]: record["outcome"] for record in self.records if "step" not in record}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that ended and was not waited for yet is no living one.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def gone(pid: int) -> bool:
    end = time.monotonic() + 10
    while alive(pid):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_items_in_order_and_their_output(run: Run) -> None:
    assert run(run.job("abc", "")) == {"a": "right", "b": "right", "c": "right"}
    assert [line for line in run.log if "at" in line] == ["[job] at a", "[job] at b", "[job] at c"]


def test_a_crash_costs_one_item(run: Run) -> None:
    body = """
    if name == "b":
        print("about to die", flush=True)
        os.kill(os.getpid(), 11)
    """
    assert run(run.job("abc", body)) == {"a": "right", "b": "crashed", "c": "right"}
    crash = run.records[1]
    assert "SIGSEGV" in crash["message"]
    assert crash["output"][-1] == "about to die"


def test_an_item_that_hangs_is_ended_with_all_it_started(run: Run, tmp_path: Path) -> None:
    body = f"""
    if name == "b":
        compiler = subprocess.Popen(["sleep", "600"])
        open({str(tmp_path / "pid")!r}, "w").write(str(compiler.pid))
        time.sleep(600)
    """
    assert run(run.job("abc", body, item_seconds=2)) == {"a": "right", "b": "timed out", "c": "right"}
    assert gone(int((tmp_path / "pid").read_text()))


def test_what_a_finished_child_started_is_ended(run: Run, tmp_path: Path) -> None:
    """A pool of compilers must not live on beside the next stage's timings."""
    body = f"""
    compiler = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    open({str(tmp_path / "pid")!r}, "w").write(str(compiler.pid))
    """
    assert run(run.job("a", body)) == {"a": "right"}
    assert gone(int((tmp_path / "pid").read_text()))


def test_an_item_is_run_again_without_the_part_that_crashed(run: Run) -> None:
    body = """
    for step in "xyz":
        if [name, step] not in skip:
            events.step(step)
            if (name, step) == ("b", "y"):
                os.abort()
    """
    assert run(run.job("abc", body)) == {"a": "right", "b": "right", "c": "right"}
    (crash,) = (record for record in run.records if "step" in record)
    assert (crash["item"], crash["step"], crash["outcome"]) == ("b", "y", "crashed")


def test_a_spoiled_device_gets_another_process(run: Run) -> None:
    body = """
    if name == "b" and ["b", "y"] not in skip:
        events.step("y")
        events.lost("b", "y", {"outcome": "failed", "message": "an illegal memory access"})
        os._exit(SPOILED)
    if name == "c":
        events.end(name, {"outcome": "failed"})
        os._exit(SPOILED)
    """
    assert run(run.job("abcd", body)) == {"a": "right", "b": "right", "c": "failed", "d": "right"}
    assert [r["message"] for r in run.records if "step" in r] == ["an illegal memory access"]


def test_what_does_not_begin_is_said_once(run: Run, tmp_path: Path) -> None:
    broken = ChildJob("broken", lambda items, skip: [sys.executable, "-c", "import no_such_module"], 30)
    assert run(broken, run.job("a", "")) == {"broken": "crashed", "a": "right"}
    assert "no_such_module" in run.records[0]["output"][-1]


def test_the_deadline_leaves_out_what_has_not_ended(run: Run) -> None:
    body = """
    if name == "b":
        time.sleep(600)
    """
    start = time.monotonic()
    found = run(run.job("abc", body), run.job("d", "", name="later"), seconds=3)
    assert time.monotonic() - start < 20
    assert found == {"a": "right", "b": "left out", "c": "left out", "later": "left out"}


def test_jobs_run_side_by_side(run: Run) -> None:
    """Each waits for the other one to begin."""
    jobs = []
    for mine, other in (("p", "q"), ("q", "p")):
        body = f"""
        open({str(run.folder)!r} + "/" + name, "w")
        while not os.path.exists({str(run.folder)!r} + "/{other}"):
            time.sleep(0.01)
        """
        jobs.append(run.job(mine, body, name=mine))
    assert run(*jobs, processes=2) == {"p": "right", "q": "right"}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_leaves_no_child(run: Run, tmp_path: Path, how: signal.Signals) -> None:
    job = run.job("a", f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)")
    parent = f"""
import sys, time
from pathlib import Path
from benchmarks.gpu.supervisor import ChildJob, Supervisor
import signal
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
command = {job.command(None, [])!r}
Supervisor(Path("."), print, print).run(
    [ChildJob("job", lambda items, skip: command, 60, {job.environment!r})], time.monotonic() + 60
)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(how)
    process.wait()
    assert gone(int((tmp_path / "pid").read_text()))
