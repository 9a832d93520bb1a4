"""A pytest plugin: tell the supervisor of every test, and run only those that are left.

    python -m pytest -p benchmarks.gpu.pytest_events -m equivalence tests/ops/boundary/test_registered.py

WANTED (JSON, in the environment) holds the ids of the tests to run; without it all of them run.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from .context import device_is_spoiled
from .events import SPOILED, Events

WANTED = "FASTBGAD_GPU_TESTS"


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Reporter(Events()), "fastbgad-events")


class _Reporter:
    def __init__(self, events: Events) -> None:
        self.events = events
        self.found: dict[str, Any] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        wanted = os.environ.get(WANTED)
        if wanted is not None:
            names = set(json.loads(wanted))
            items[:] = [item for item in items if item.nodeid in names]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            found = {"outcome": "failed", "message": "it cannot be imported", "traceback": report.longreprtext}
            self.events.begin(report.nodeid)
            self.events.end(report.nodeid, found)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.events.items([item.nodeid for item in session.items])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.events.begin(nodeid)
        self.found = {"outcome": "right", "seconds": 0.0}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.found["seconds"] = round(self.found["seconds"] + report.duration, 3)
        if report.failed:
            last = (report.longreprtext.strip().splitlines() or [""])[-1]
            self.found |= {"outcome": "failed", "message": last, "traceback": report.longreprtext}
        elif report.skipped and self.found["outcome"] == "right":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.found |= {"outcome": "skipped", "message": reason}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.events.end(nodeid, self.found)
        if self.found["outcome"] == "failed" and device_is_spoiled():
            os._exit(SPOILED)  # another process runs the tests that are left
