"""Every script in examples/ runs as the README says, on a small data set in place of the demo's."""

from __future__ import annotations

import re
import runpy
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from fastbgad.data.images import read_image
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


def wide_images() -> dict[str, Any]:
    """Images whose values a plain conversion to RGB would change, by file name."""
    ramp = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50)
    color = np.stack([ramp % 251, ramp % 241, ramp % 239], axis=2).astype(np.uint8)
    alpha = np.dstack([color, (ramp % 7 * 36).astype(np.uint8)])
    return {
        "sixteen.png": Image.fromarray(ramp * 32),
        "sixteen.tif": Image.fromarray(ramp * 32),
        "integers.tif": Image.fromarray(ramp.astype(np.int32) * 32),
        "floats.tif": Image.fromarray((ramp / ramp.max()).astype(np.float32)),
        "color.png": Image.fromarray(color),
        "alpha.png": Image.fromarray(alpha),
        "gray_alpha.png": Image.fromarray(alpha[:, :, 2:].copy()),
        "palette.png": Image.fromarray(color).quantize(),
        "bilevel.png": Image.fromarray(color[:, :, 0]).convert("1"),
    }


@pytest.fixture(scope="module")
def run_onnx() -> dict[str, Any]:
    """The functions of run_onnx.py."""
    pytest.importorskip("onnxruntime")
    return runpy.run_path(str(EXAMPLES / "run_onnx.py"))


@pytest.mark.parametrize("name", wide_images())
def test_run_onnx_reads_as_fastbgad_does(run_onnx: dict[str, Any], name: str, tmp_path: Path) -> None:
    wide_images()[name].save(tmp_path / name)
    expected = read_image(tmp_path / name)
    assert len(np.unique(expected)) > 1
    found = run_onnx["read"](tmp_path / name, expected.shape[:2], 16)
    assert (found.dtype, found.shape) == (np.float32, (1, 3, 40, 50))
    assert np.array_equal(np.rint(found[0].transpose(1, 2, 0) * 255), expected)


def test_run_onnx_scales_by_the_depth_of_the_camera(run_onnx: dict[str, Any], tmp_path: Path) -> None:
    ramp = np.linspace(0, 4095, 40 * 50).astype(np.uint16).reshape(40, 50)
    Image.fromarray(ramp).save(tmp_path / "camera.png")
    found = run_onnx["read"](tmp_path / "camera.png", (40, 50), 12)
    assert np.array_equal(np.rint(found[0] * 255), np.repeat(np.rint(ramp * (255 / 4095))[None], 3, axis=0))
    Image.fromarray(ramp + np.uint16(1)).save(tmp_path / "camera.png")
    with pytest.raises(SystemExit, match=r"camera\.png: its values 1 to 4096 are outside of the model's 0 to 4095"):
        run_onnx["read"](tmp_path / "camera.png", (40, 50), 12)
    (tmp_path / "color.png").write_bytes(wide_png(np.stack([ramp] * 3)))
    with pytest.raises(SystemExit, match=r"color\.png: pillow misreads 16-bit files of this kind"):
        run_onnx["read"](tmp_path / "color.png", (40, 50), 12)
    assert np.array_equal(
        np.rint(run_onnx["read"](tmp_path / "color.png", (40, 50), 16)[0] * 255), np.stack([ramp >> 8] * 3)
    )


def test_run_onnx_refuses_what_pillow_misreads(run_onnx: dict[str, Any], tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 40 * 50).astype(np.uint16).reshape(40, 50)
    planes = np.stack([ramp, ramp[::-1], ramp[:, ::-1]])
    tifffile.imwrite(tmp_path / "planar.tif", planes, photometric="rgb", planarconfig="separate")
    tifffile.imwrite(tmp_path / "white.tif", ramp, photometric="miniswhite")
    tifffile.imwrite(tmp_path / "color.tif", planes.transpose(1, 2, 0), photometric="rgb")
    for name, depth in (("planar", 16), ("planar", None), ("white", 16), ("color", 12)):
        with pytest.raises(SystemExit, match=rf"{name}\.tif: pillow misreads 16-bit files of this kind"):
            run_onnx["read"](tmp_path / f"{name}.tif", (40, 50), depth)
    found = run_onnx["read"](tmp_path / "color.tif", (40, 50), 16)[0] * 255
    assert np.abs(found.transpose(1, 2, 0) - read_image(tmp_path / "color.tif")).max() <= 1.001
    Image.fromarray(ramp // 16).save(tmp_path / "dark.png")
    with pytest.raises(SystemExit, match=r"dark\.png: it uses few of its 16 bits, and the model does not know"):
        run_onnx["read"](tmp_path / "dark.png", (40, 50), None)


def wide_png(planes: NDArray[np.uint16]) -> bytes:
    """A PNG file of 16-bit color, [3, H, W], which pillow cannot write."""
    rows = planes.transpose(1, 2, 0).astype(">u2")
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)), b"IEND": b""}
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text() + (ROOT / "tests" / "export" / "test_detector.py").read_text()
    assert all(path.name in tested for path in EXAMPLES.glob("*.py"))
