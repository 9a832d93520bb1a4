"""A Triton that is missing, too old or hard to read: what is said, and what is computed without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastbgad.kernels.triton_version import LOWEST, triton_version, why_not_this_triton

NEEDED = ".".join(map(str, LOWEST))
OBSTACLE = f"triton 3.2.0 is installed, the kernels need {NEEDED} or newer: pip install 'triton>={NEEDED}'"

# In a process of its own: what "auto" and impl="triton" do, with TRITON_INTERPRET set as for kernels on a CPU.
CALLS = """
import json, torch
from fastbgad.errors import BackendError
from fastbgad.ops import log_likelihood
from fastbgad.ops.dispatch import resolve_impl

class OnGPU:
    device, dtype = torch.device("cuda"), torch.float32

z, log_det = torch.randn(5, 4), torch.zeros(5)
step = torch.compile(lambda z, log_det: log_likelihood(z, log_det, impl="auto"), fullgraph=True, backend="eager")
said = {"auto on a GPU": resolve_impl("auto", OnGPU), "same": torch.equal(step(z, log_det), log_likelihood(z, log_det))}
try:
    log_likelihood(z, log_det, impl="triton")
except BackendError as error:
    said["error"] = str(error)
print(json.dumps(said))
"""


def write_triton(folder: Path, text: str) -> Path:
    """A package that only looks like Triton; importing it fails."""
    (folder / "triton").mkdir()
    (folder / "triton" / "__init__.py").write_text(f'"""isort:skip_file"""\n{text}\nraise ImportError("imported")\n')
    return folder


def run_with(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a Python command that finds the packages in `folder` before all others."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return write_triton(tmp_path, "__version__ = '3.2.0'")


def test_what_is_read_is_what_triton_says_of_itself() -> None:
    triton = pytest.importorskip("triton", reason="triton is not installed")
    assert triton_version() == triton.__version__
    assert why_not_this_triton(triton_version()) is None


@pytest.mark.parametrize("version", ["3.3.1", "2.3.1", "3.2.0+gitb2684bf3", "3.0.0.post1"])
def test_older_ones_are_named_with_the_remedy(version: str) -> None:
    assert why_not_this_triton(version) == OBSTACLE.replace("3.2.0", version)


@pytest.mark.parametrize("version", [NEEDED, f"{NEEDED}.0", "3.10.0", "4.0.0rc1", "3.8.0+rocm7", "unknown"])
def test_newer_ones_and_unreadable_ones_may_try(version: str) -> None:
    assert why_not_this_triton(version) is None


def test_a_missing_one_is_named_with_the_remedy() -> None:
    assert f"not installed: pip install 'triton>={NEEDED}'" in str(why_not_this_triton(None))


@pytest.mark.parametrize(
    ("text", "version"),
    [('__version__ = "3.2.0+xpu"', "3.2.0+xpu"), ("from ._version import __version__", "unknown")],
)
def test_versions_are_read_without_importing(
    text: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(write_triton(tmp_path, text))
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert triton_version() == version


def test_a_folder_called_triton_is_not_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triton").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert triton_version() is None


def test_operations_with_an_old_triton(old: Path) -> None:
    """The portable path is taken, also under torch.compile; an explicit choice fails and says why."""
    done = run_with(old, "-c", CALLS)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["auto on a GPU"] == "torch"
    assert said["same"]
    assert said["error"] == f'impl="triton": {OBSTACLE}; use impl="torch" or "auto"'


@pytest.mark.parametrize("command", ["resources", "tune"])
def test_commands_of_the_kernels_with_an_old_triton(command: str, old: Path) -> None:
    done = run_with(old, "-m", f"fastbgad.kernels.{command}")
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"error: {OBSTACLE}\n"
    assert run_with(old, "-m", f"fastbgad.kernels.{command}", "--help").returncode == 0
