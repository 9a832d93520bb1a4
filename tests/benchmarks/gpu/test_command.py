"""The staged command without a GPU: walked through in the interpreter, killed on its way, with kernels that are broken.

Broken kernels are those of a copy of the checkout, so the copy also shows that nothing has to be installed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.records import RECORDS, read_records
from tests import ROOT
from tests.grids import slow

WRONG = """

_right = boundary_forward


def boundary_forward(*arguments):
    b_n, b_a, count = _right(*arguments)
    return b_n + 1, b_a, count
"""
CRASHING = """

def score_map(*arguments):
    import os

    os.abort()
"""


def start(cwd: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command as a process of its own, on one thread."""
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    variables = {name: value for name, value in variables.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def results(out: Path) -> dict[str, dict[str, Any]]:
    """What was found of every item."""
    return {record["item"]: record for record in read_records(out / RECORDS) if "item" in record}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the command needs, with a boundary that is wrong and an anomaly map that ends its process."""
    root = tmp_path_factory.mktemp("checkout")
    for folder in ("fastbgad", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    with (root / "kernels" / "boundary.py").open("a") as file:
        file.write(WRONG)
    with (root / "kernels" / "score_map.py").open("a") as file:
        file.write(CRASHING)
    return root


def test_a_wrong_kernel_and_a_crashing_one_are_reported_and_the_others_timed(checkout: Path, tmp_path: Path) -> None:
    """In the smoke test and in the headline; the crash ends one process, never the stage."""
    items = ("boundary, 70 rows", "boundary, 40 rows", "anomaly map", "log-likelihood, 77", "gradient, 40 rows")
    process = start(checkout, tmp_path, "--driver", "interpreter", "--stage", "smoke,headline", "--only", *items)
    output = process.communicate()[0]
    assert process.returncode == 1, output
    found = results(tmp_path)
    assert found["boundary, 40 rows"]["outcome"] == "wrong"
    assert "boundary is off by" in found["boundary, 40 rows"]["message"]
    assert found["log-likelihood, 77 x 9"]["outcome"] == "right"
    for name in ("anomaly map, 1 of 20 pixels", "anomaly map, 4 of 20 pixels"):
        assert found[name]["outcome"] == "crashed"
        assert "SIGABRT" in found[name]["message"]
        assert any("in score_map" in line for line in found[name]["output"])  # where it was
    assert "differs from the reference" in found["boundary, 70 rows"]["contenders"]["fastbgad triton"]["failed"]
    assert "median_us" in found["boundary, 70 rows"]["contenders"]["fastbgad torch"]
    crashed = found["anomaly map and image score"]
    assert "crashed the process" in crashed["contenders"]["fastbgad triton"]["failed"]
    assert "median_us" in crashed["contenders"]["three interpolate calls"]
    assert "median_us" in found["loss with boundary and gradient, 40 rows"]["contenders"]["fastbgad triton"]
    assert "not right:" in output
    assert all(len(line) <= 80 for line in output.splitlines() if not line.startswith(str(tmp_path)))


# A text that chooses a few items of the stage, and none of smoke but its own.
STAGES = {
    "smoke": "flow backward",
    "headline": "training step",
    "whole": "short schedule",
    "tests": "-",
    "tune": "coupling_backward",
    "compiled": "compiled FrEIA",
}


# The others begin and end as headline does: a process that runs items.
@pytest.mark.parametrize(
    "stage", [stage if stage in ("headline", "tests", "tune") else slow(stage) for stage in STAGES]
)
def test_killed_in_any_stage(stage: str, tmp_path: Path) -> None:
    """What was found before is whole and on the disk, and no child lives on."""
    only = ("--only", "environment", STAGES[stage])
    process = start(ROOT, tmp_path, "--driver", "interpreter", "--stage", f"smoke,{stage}", *only)
    end = time.monotonic() + 180
    while not _is_in(stage, _whole(tmp_path)):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)  # well into it
    children = _children(process.pid)
    assert children
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = results(tmp_path)
    assert found["environment"]["outcome"] == "right"
    assert found["environment"]["versions"]["torch"] != "absent"
    assert read_records(tmp_path / RECORDS)[0]["measured"] is False
    for child in children:
        while Path(f"/proc/{child}").exists():
            assert time.monotonic() < end
            time.sleep(0.05)


def test_another_run_adds_to_a_killed_one(tmp_path: Path) -> None:
    (tmp_path / RECORDS).write_text('{"stage": "smoke", "item": "flow", "outcome": "right"}\n{"stage": "smo')
    process = start(ROOT, tmp_path, "--driver", "interpreter", "--stage", "smoke", "--only", "environment")
    assert "1 right" in process.communicate()[0]
    assert process.returncode == 0
    assert set(results(tmp_path)) == {"flow", "environment"}


def _is_in(stage: str, records: list[dict[str, Any]]) -> bool:
    """The first results are there, and this stage has begun."""
    begun = any(record.get("stage") == stage and record["outcome"] == "begins" for record in records)
    return begun and any(record.get("item") == "environment" for record in records)


def _whole(out: Path) -> list[dict[str, Any]]:
    return read_records(out / RECORDS) if (out / RECORDS).exists() else []


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_no_time_left(tmp_path: Path) -> None:
    """Stages that do not begin are said to be left out."""
    process = start(ROOT, tmp_path, "--driver", "interpreter", "--stage", "smoke,headline", "--seconds", "1")
    output = process.communicate()[0]
    assert process.returncode == 0
    assert {name: found["outcome"] for name, found in results(tmp_path).items()} == {
        "smoke": "left out",
        "headline": "left out",
    }
    assert "the 1 s of the run were used up" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is no CUDA GPU here"),
        (("--stage", "smoke,headlines"), "there is no stage 'headlines'; the stages are smoke, headline, whole"),
        (("--driver", "interpreter", "--out", "/proc/none"), "cannot write into /proc/none"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    process = start(ROOT, tmp_path, *arguments)
    output = process.communicate()[0]
    assert process.returncode == 2
    assert message in output
    assert "Traceback" not in output


def test_help_lists_the_stages(tmp_path: Path) -> None:
    output = start(ROOT, tmp_path, "--help").communicate()[0]
    assert "smoke" in output
    assert "every kernel and mode once" in output
    assert "{stages}" not in output
