"""Exported detectors: the same results as the model in every format, checked before they count, clear when refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastbgad.__main__ import main
from fastbgad.backbones import create_backbone
from fastbgad.config import FlowConfig
from fastbgad.errors import (
    BackendError,
    ConfigError,
    FastBGADError,
    FeatureError,
    MissingDependencyError,
    OutputError,
)
from fastbgad.export import detector as export
from fastbgad.export import export_detector
from fastbgad.export import formats as export_formats
from fastbgad.export import graph as export_graph
from fastbgad.export.check import check_images
from fastbgad.export.graph import ExportedDetector, ExportedFlow
from fastbgad.model import BGAD
from fastbgad.model.scoring import Calibration
from tests import ROOT
from tests.exports import SMALL, assert_same, batch_of, make_model

OUTPUTS = ["anomaly_map", "image_score", "image_side", "decision", "log_likelihood_0", "log_likelihood_1"]


@pytest.fixture(scope="module")
def gabor() -> BGAD:
    return make_model("gabor", (65, 97))


@pytest.fixture(scope="module")
def resnet() -> BGAD:
    return make_model("resnet18", (64, 64))


@pytest.fixture(scope="module")
def tiny() -> BGAD:
    """What exports in a second."""
    return make_model("resnet18", (64, 64), FlowConfig(coupling_layers=1, condition_channels=4), levels=(1,))


@pytest.fixture(scope="module")
def onnx_file(gabor: BGAD, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("export") / "gabor.onnx"
    export_detector(gabor, path)
    return path


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_onnx_runtime(gabor: BGAD, onnx_file: Path, batch: int) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    images = batch_of(gabor.image_size, batch)
    found = session.run(None, {"images": images.numpy()})
    assert_same({name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}, gabor, images)


def test_what_an_onnx_file_holds(gabor: BGAD, onnx_file: Path) -> None:
    import onnx

    model = onnx.load(onnx_file)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert not [node.op_type for node in model.graph.node if node.op_type in ("Loop", "Scan", "If", "Softplus", "Sin")]
    assert [value.name for value in model.graph.input] == ["images"]
    assert [value.name for value in model.graph.output] == OUTPUTS
    shapes = [
        [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (model.graph.input[0], model.graph.output[0], model.graph.output[1])
    ]
    assert shapes == [["batch", 3, 65, 97], ["batch", 65, 97], ["batch"]]
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata["fastbgad.image_size"] == [65, 97]
    assert metadata["fastbgad.sides"] == ["normal", "margin", "anomalous"]
    assert (metadata["fastbgad.threshold_b_n"], metadata["fastbgad.threshold_b_a"]) == gabor.thresholds()
    assert metadata["fastbgad.version"]
    assert metadata["fastbgad.bit_depth"] is None
    assert str(ROOT).encode() not in onnx_file.read_bytes()
    assert list(onnx_file.parent.iterdir()) == [onnx_file]  # no external data, nothing temporary


def test_torch_export(resnet: BGAD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "detector.pt2"
    monkeypatch.setattr(resnet, "history", {"bit_depth": 12})
    summary = export_detector(resnet, str(path), "torch-export")
    assert summary.file_bytes == path.stat().st_size
    assert summary.operations > 100
    assert summary.difference.small
    assert summary.narrow is None
    extra = {export_formats.METADATA_FILE: ""}
    module = torch.export.load(path, extra_files=extra).module()
    metadata = json.loads(extra[export_formats.METADATA_FILE])
    assert json.loads(metadata["fastbgad.image_size"]) == [64, 64]
    assert json.loads(metadata["fastbgad.bit_depth"]) == 12
    for batch in (1, 2, 5):
        images = batch_of(resnet.image_size, batch)
        assert_same(module(images), resnet, images)
    assert str(ROOT).encode() not in path.read_bytes()


@pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="needs a C++ compiler")
@pytest.mark.slow  # the C++ compiler alone takes half a minute
def test_aoti(tiny: BGAD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "detector.pt2"
    monkeypatch.setattr(tiny, "history", {"bit_depth": 12})
    export_detector(tiny, path, "aoti")
    package = torch._inductor.aoti_load_package(str(path))
    assert json.loads(package.get_metadata()["fastbgad.threshold_b_a"]) == tiny.thresholds()[1]
    assert json.loads(package.get_metadata()["fastbgad.bit_depth"]) == 12
    for batch in (1, 2, 5):
        images = batch_of(tiny.image_size, batch)
        assert_same(package(images), tiny, images)


def test_a_narrow_backbone_is_exported_in_float32(tmp_path: Path) -> None:
    model = make_model("resnet18", (64, 64), dtype="bfloat16")
    summary = export_detector(model, tmp_path / "m.pt2", "torch-export")
    assert summary.difference.anomaly_map < 1e-5
    assert summary.narrow is not None
    dtype, difference = summary.narrow
    assert dtype == "bfloat16"
    assert 1e-5 < difference.anomaly_map < 0.2
    assert any("bfloat16" in name for name in summary.facts())
    assert next(model.backbone.parameters()).dtype == torch.bfloat16
    state = torch.export.load(tmp_path / "m.pt2").state_dict
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


def test_the_command(tiny: BGAD, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny.save(tmp_path / "model.safetensors")
    out = tmp_path / "new" / "detector.pt2"
    command = ["export", "--model", str(tmp_path / "model.safetensors"), "--out", str(out)]
    assert main([*command, "--format", "torch-export"]) == 0
    printed, errors = capfd.readouterr()
    assert errors == ""
    assert [line.split("  ")[0] for line in printed.splitlines()] == ["file", "operations", "differs from the model by"]
    assert str(out) in printed
    assert "MiB" in printed
    assert main(command) == 2
    printed, errors = capfd.readouterr()
    assert (printed, errors.count("\n")) == ("", 1)
    assert "ends in .onnx" in errors


def test_onnx_is_written_quietly(tiny: BGAD, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn) -> None:
    pytest.importorskip("onnxscript")
    export_detector(tiny, tmp_path / "detector.onnx")
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    printed = capsys.readouterr().out
    assert "fastbgad export --model" in printed
    assert "torch-export" in printed


def test_the_example_scores_image_files(gabor: BGAD, onnx_file: Path, tmp_path: Path) -> None:
    """It runs without torch and without fastbgad, and reads files as fastbgad does."""
    pixels = (check_images((65, 97))[0].permute(1, 2, 0) * 255).to(torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    Image.fromarray(np.full((40, 30), 128, np.uint8)).save(tmp_path / "grey.png")
    code = (
        "import runpy, sys\n"
        "sys.modules['torch'] = sys.modules['fastbgad'] = None\n"
        "sys.argv.pop(0)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    script = ROOT / "examples" / "run_onnx.py"
    files = [tmp_path / "photo.png", tmp_path / "grey.png"]
    arguments = ["-c", code, str(script), str(onnx_file), *map(str, files)]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    assert [Path(line[3]) for line in lines] == files
    wanted = gabor.predict(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    assert float(lines[0][0]) == pytest.approx(float(wanted.image_score), abs=1e-3)
    assert lines[0][1] == ("normal", "margin", "anomalous")[int(wanted.image_side)]
    assert len(script.read_text().splitlines()) < 60
    usage = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert usage.returncode == 1
    assert "usage" in usage.stderr


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Path]:
    """A file from before that a failing export must leave as it is, and alone in its folder."""
    path = tmp_path / "out" / "detector.pt2"
    path.parent.mkdir()
    path.write_text("from before")
    yield path
    assert path.read_text() == "from before"
    assert list(path.parent.iterdir()) == [path]


def test_a_graph_that_computes_something_else(tiny: BGAD, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ExportedFlow.forward
    monkeypatch.setattr(ExportedFlow, "forward", lambda self, features: plain(self, features) + 0.01)
    with pytest.raises(BackendError, match="does not compute what the model does") as stop:
        export_detector(tiny, kept, "torch-export")
    assert str(kept) in str(stop.value)


@pytest.mark.parametrize("wrong", [{"align_corners": False}, {"mode": "nearest", "align_corners": None}])
def test_wrong_scoring_shows_though_the_map_is_flat(
    tiny: BGAD, kept: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    """A trained model finds generated images so unlikely that its map is flat."""
    model, own, plain = copy.deepcopy(tiny), tiny.calibration(), export_graph.interpolate
    model.set_calibration(Calibration(own.level_max + 500, own.offset, own.boundaries + 50))
    assert float(model.predict(check_images(model.image_size)).anomaly_map.std()) < 1e-6  # all but rounding
    monkeypatch.setattr(export_graph, "interpolate", lambda maps, **options: plain(maps, **{**options, **wrong}))
    with pytest.raises(BackendError, match="does not compute what the model does"):
        export_detector(model, kept, "torch-export")


def test_outputs_that_are_not_those_of_the_model(tiny: BGAD, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ExportedDetector.forward
    monkeypatch.setattr(ExportedDetector, "forward", lambda self, images: {**plain(self, images), "decision": images})
    with pytest.raises(BackendError, match="the outputs are"):
        export_detector(tiny, kept, "torch-export")


def test_whatever_an_exporter_raises(tiny: BGAD, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        print("pages of text")
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(BackendError, match=r"cannot express this model \(first line\); choose another") as stop:
        export_detector(tiny, kept, "torch-export")
    assert "second" not in str(stop.value)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OutputError, match="No space left"):
        export_detector(tiny, kept, "torch-export")


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("m.onnx", {"format": "tflite"}, ConfigError, "choose one of onnx, torch-export, aoti"),
        ("m.pt2", {}, ConfigError, "ends in .onnx"),
        ("m.onnx", {"format": "torch-export"}, ConfigError, "ends in .pt2"),
        ("m", {"format": "aoti"}, ConfigError, "ends in .pt2"),
        ("m.pt2", {"format": "torch-export", "device": "cuda:99"}, ConfigError, "not on this machine"),
        ("m.pt2", {"format": "torch-export", "device": "tpu!"}, ConfigError, "give auto, cpu"),
        ("file/m.pt2", {"format": "torch-export"}, OutputError, "cannot create the folder"),
    ],
)
def test_requests_that_cannot_be_met(
    tiny: BGAD, tmp_path: Path, name: str, options: dict[str, Any], error: type[FastBGADError], message: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=message):
        export_detector(tiny, tmp_path / name, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_without_calibration(tmp_path: Path) -> None:
    model = BGAD(create_backbone("resnet18", (1,), weights="random"), (64, 64), flow=SMALL)
    with pytest.raises(FeatureError, match="no calibration"):
        export_detector(model, tmp_path / "m.pt2", "torch-export")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package(tiny: BGAD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"{package}: pip install 'fastbgad\[export\]'"):
        export_detector(tiny, tmp_path / "m.onnx")


def test_a_device_for_onnx(tiny: BGAD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "choose_device", lambda name: torch.device("cuda"))
    with pytest.raises(ConfigError, match="bound to no device"):
        export_detector(tiny, tmp_path / "m.onnx", device="cuda")


def test_a_model_too_large_for_onnx(tiny: BGAD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(export_formats, "MOST_ONNX_BYTES", 1000)
    with pytest.raises(BackendError, match="an ONNX file holds 2 GiB at most; choose the format torch-export"):
        export_detector(tiny, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_no_compiler(tiny: BGAD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BackendError, match="no compiler no-such-compiler: install one"):
        export_detector(tiny, tmp_path / "m.pt2", "aoti")
