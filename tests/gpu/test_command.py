"""The staged command without a GPU: walked through in the interpreter, killed on its way, with kernels that are broken.

Broken kernels are those of a copy of the checkout, so the copy also shows that nothing has to be installed.
"""

from __future__ import annotations

import json
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

ROOT = Path(__file__).parents[2]

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


@pytest.mark.parametrize("stage", ["smoke", "headline", "whole", "tests", "tune", "compiled"])
def test_killed_in_any_stage(stage: str, tmp_path: Path) -> None:
    """What was found before is whole and on the disk."""
    process = start(ROOT, tmp_path, "--driver", "interpreter", "--stage", stage)
    end = time.monotonic() + 120
    while not any(record.get("stage") == "run" for record in _whole(tmp_path)):
        assert time.monotonic() < end
        time.sleep(0.05)
    if stage in ("smoke", "headline"):  # these have results after seconds
        while not results(tmp_path):
            assert time.monotonic() < end
            time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = read_records(tmp_path / RECORDS)
    assert before[0]["stages"] == [stage]
    assert before[0]["measured"] is False
    # The same folder takes another run's results in addition.
    again = start(ROOT, tmp_path, "--driver", "interpreter", "--stage", "smoke", "--only", "environment")
    assert again.communicate()
    assert again.returncode == 0
    after = read_records(tmp_path / RECORDS)
    assert after[: len(before)] == before
    assert results(tmp_path)["environment"]["outcome"] == "right"


def _whole(out: Path) -> list[dict[str, Any]]:
    return read_records(out / RECORDS) if (out / RECORDS).exists() else []


def test_no_time_left(tmp_path: Path) -> None:
    """Stages that do not begin are said to be left out."""
    process = start(ROOT, tmp_path, "--driver", "interpreter", "--stage", "smoke,headline", "--seconds", "1")
    output = process.communicate()[0]
    assert process.returncode == 0
    assert {name: found["outcome"] for name, found in results(tmp_path).items()} == {
        "smoke": "left out", "headline": "left out"
    }  # fmt: skip
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
    assert json.dumps("{stages}") not in output
