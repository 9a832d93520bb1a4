"""`make gpu`: the whole command in a dry run on a CPU, and the arithmetic of its floors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from roofline import flow_bytes, flow_flops, image_bytes, image_flops  # noqa: E402

KERNELS = "fastbgad triton"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def test_dry_run(tmp_path: Path) -> None:
    """Every contender that can run on a CPU agrees with its oracle, and the file says that nothing was measured."""
    done = run("--dry-run", "--no-tests", "--out", str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["measured"] is False
    assert result["versions"]["triton"] != "absent"
    assert result["cases"]
    for case in result["cases"]:
        assert not any("failed" in entry for entry in case["contenders"].values()), case
        assert case["contenders"][KERNELS]["relative_error"] < 3e-2
        assert case["contenders"][f"{KERNELS}, CUDA graph"] == {"skipped": "CUDA graphs need a GPU"}


def test_an_operation_that_fails_its_tests_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu

    found = {name: {"passed": 3, "failed": []} for name in gpu.TESTS} | {"boundary": {"passed": 2, "failed": ["x"]}}
    monkeypatch.setattr(gpu, "equivalence", lambda: found)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.main(["--dry-run", "--only", "boundary, ", "--out", str(tmp_path)]) == 1
    assert "not timed: the equivalence tests of boundary failed" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    assert all("contenders" not in case for case in json.loads(path.read_text())["cases"])


def test_a_contender_that_differs_is_not_timed() -> None:
    import gpu
    import torch
    from gpu_cases import Case, Contender
    from gpu_timing import Timer

    def never() -> None:
        raise RuntimeError("no such instruction")

    exact = torch.ones(3, dtype=torch.float64)
    contenders = {
        "base": lambda: Contender(lambda: [torch.ones(3)]),
        "fastbgad wrong": lambda: Contender(lambda: [torch.ones(3) * 1.1]),
        "fastbgad nan": lambda: Contender(lambda: [torch.full((3,), float("nan"))]),
        "fastbgad broken": lambda: Contender(never),
    }
    case = Case("case", "flow", lambda: [exact], contenders, 1e-3)
    entries = gpu.measure(case, Timer(torch.device("cpu")), 2, 0, {})["contenders"]
    assert "median_us" in entries["base"]
    assert "differs from the oracle by 1.0e-01" in entries["fastbgad wrong"]["failed"]
    assert "differs from the oracle by inf" in entries["fastbgad nan"]["failed"]
    assert "no such instruction" in entries["fastbgad broken"]["failed"]
    assert all("median_us" not in entry for name, entry in entries.items() if name != "base")


def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr
    assert "Traceback" not in done.stderr


def test_roofline() -> None:
    """Worked out by hand for 40 channels: C1 = C2 = 20, H = 296; per layer 296 * 20 + 40 * 296 + 40 * 40 products."""
    assert flow_flops(1, 40, coupling_layers=1) == 2 * (296 * 20 + 40 * 296)
    assert flow_flops(3, 40, coupling_layers=8) == 3 * 2 * (8 * (296 * 20 + 40 * 296) + 7 * 1600)
    assert flow_flops(1, 41, coupling_layers=1) == 2 * (21 * 298 + 298 * 40)
    assert flow_bytes(10, 40, 2) == 10 * (80 + 4)
    assert image_flops(1024) == sum(flow_flops(n, c) for n, c in ((65536, 40), (16384, 72), (4096, 200)))
    assert image_bytes(64) == 256 * 164 + 64 * 292 + 16 * 804
