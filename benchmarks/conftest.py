"""Options of the benchmarks, and the file their results are kept in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import harness  # noqa: E402

from fastbgad.system.files import write_json  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastbgad")
    group.addoption("--save-results", action="store_true", help="keep the figures in benchmarks/results/<machine>.json")
    group.addoption(
        "--official", metavar="PATH", default=None, help="your own checkout of the official BGAD code, as a contender"
    )


@pytest.fixture
def official(request: pytest.FixtureRequest) -> str | None:
    """Return the folder of the official code, if it is given."""
    return request.config.getoption("--official")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Add the GPU, which pytest-benchmark leaves out, and remove the host's name."""
    machine_info.update(kind=harness.machine_kind(), where=harness.where(), node="")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--save-results") and harness.recorded:
        path = harness.RESULTS / f"{harness.machine_kind()}.json"
        kept = {entry["name"]: entry for entry in json.loads(path.read_text())} if path.exists() else {}
        ceilings = harness.cpu_ceilings() if harness.DEVICE.type == "cpu" else None
        kept.update({entry["name"]: {**entry, "ceilings": ceilings} for entry in harness.recorded})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, [kept[name] for name in sorted(kept)])
        print(f"\nwrote {len(harness.recorded)} comparisons to benchmarks/results/{path.name}")
