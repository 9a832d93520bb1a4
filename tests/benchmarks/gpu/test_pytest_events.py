"""Tests under the supervisor: every outcome is told, and a crash costs one test."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import pytest_events
from benchmarks.gpu.supervisor import ChildJob, Supervisor
from tests import ROOT

TESTS = """
import os
import pytest

def test_right():
    pass

def test_wrong():
    assert [1, 2, 3] == [1, 2, 4], "not the same"

@pytest.fixture
def broken():
    raise OSError("no device")

def test_broken_fixture(broken):
    pass

@pytest.mark.skip(reason="not today")
def test_skipped():
    pass

def test_crash():
    print("last words", flush=True)
    os.abort()

@pytest.mark.parametrize("value", ["a b", "c"])
def test_behind(value):
    pass
"""


def run(folder: Path, source: str) -> dict[str, dict[str, Any]]:
    """What the supervisor records of a file of tests, by the names of the tests."""
    path = folder / "test_some.py"
    path.write_text(source)
    records: list[dict[str, Any]] = []

    def command(items: Sequence[str] | None, skip: Sequence[tuple[str, str]]) -> list[str]:
        plugins = ["-p", pytest_events.__name__, "-p", "no:cacheprovider"]
        call = [sys.executable, "-m", "pytest", "-q", *plugins, "--rootdir", str(folder), str(path)]
        return call if items is None else ["env", f"{pytest_events.WANTED}={json.dumps(list(items))}", *call]

    supervisor = Supervisor(ROOT, records.append, lambda text: None)
    supervisor.run([ChildJob("tests", command, 30, {"PYTHONPATH": str(ROOT)})], time.monotonic() + 120)
    return {record["item"].rpartition("::")[2]: record for record in records}


def test_every_outcome(tmp_path: Path) -> None:
    found = run(tmp_path, TESTS)
    assert {name: record["outcome"] for name, record in found.items()} == {
        "test_right": "right",
        "test_wrong": "failed",
        "test_broken_fixture": "failed",
        "test_skipped": "skipped",
        "test_crash": "crashed",
        "test_behind[a b]": "right",
        "test_behind[c]": "right",
    }
    assert "not the same" in found["test_wrong"]["traceback"]
    assert "no device" in found["test_broken_fixture"]["traceback"]
    assert "not today" in found["test_skipped"]["message"]
    assert "SIGABRT" in found["test_crash"]["message"]
    assert any("last words" in line or "test_crash" in line for line in found["test_crash"]["output"])


def test_a_file_that_cannot_be_imported(tmp_path: Path) -> None:
    (record,) = run(tmp_path, "import no_such_module\n").values()
    assert record["outcome"] == "failed"
    assert "no_such_module" in record["traceback"]
