"""Every script in examples/ runs as the README says, on a small data set in place of the demo's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

from .make_data import make_mvtec

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mvtec(tmp_path_factory.mktemp("data"), normals=6, per_type=4, size=64, test_normals=4)


def run(script: str, folder: Path, *arguments: object) -> str:
    """What the script printed; it must not fail."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1])


@pytest.mark.parametrize("freia", [False, True])
def test_official_bgad(data: Path, tmp_path: Path, freia: bool) -> None:
    options = ["--data", data, "--epochs", 3, "--image-size", 64, "--anomalies", 2, *(["--freia"] if freia else [])]
    text = run("official_bgad.py", tmp_path, *options)
    assert number(r"image AUROC ([\d.]+)", text) > 0.7
    assert (tmp_path / "runs" / "official" / "bgad" / "weights" / "widget.pt").is_file()


def test_cflow_ad(data: Path, tmp_path: Path) -> None:
    text = run("cflow_ad.py", tmp_path, "--data", data, "--image-size", 64, "--images", 2)
    assert number(r"difference of a log-likelihood: ([\d.e+-]+)", text) < 1e-5


def test_anomalib_cflow(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("anomalib")
    text = run("anomalib_cflow.py", tmp_path, "--data", data, "--image-size", 128)
    assert number(r"difference of an anomaly map: ([\d.e+-]+)", text) < 1e-4
    assert "image_AUROC" in text


@pytest.mark.slow  # tests/compat/anomalib runs it within its own process, on another data set
def test_anomalib_bgad(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("anomalib")
    options = ["--data", data, "--epochs", 2, "--image-size", 64, "--anomalies", 2]
    assert "for fastbgad evaluate and predict" in run("anomalib_bgad.py", tmp_path, *options)
    assert (tmp_path / "runs" / "anomalib" / "model.safetensors").is_file()


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text() + (ROOT / "tests" / "export" / "test_detector.py").read_text()
    assert all(path.name in tested for path in EXAMPLES.glob("*.py"))
