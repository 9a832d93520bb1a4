"""ONNX files of BGAD in anomalib."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("anomalib")

import fastbgad
from fastbgad.errors import ConfigError, FeatureError
from tests import ROOT

from .engines import SIZE, bgad, folder_data

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_example_exports_what_it_trained(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    script, out = ROOT / "examples" / "anomalib_bgad.py", tmp_path / "out"
    options = {"data": parts, "out": out, "epochs": 2, "image-size": SIZE, "anomalies": 3}
    monkeypatch.setattr(sys, "argv", [str(script), *(f"--{name}={value}" for name, value in options.items())])
    runpy.run_path(str(script), run_name="__main__")
    assert "for fastbgad evaluate and predict" in capsys.readouterr().out

    (torch_file,), (onnx_file,) = out.rglob("model.pt"), out.rglob("model.onnx")
    exported = torch.load(torch_file, weights_only=False)["model"].eval()
    datamodule = folder_data(parts)
    datamodule.setup()
    images = next(iter(datamodule.test_dataloader())).image  # of the model's size: anomalib exports another resizing
    with torch.no_grad():
        expected = exported(images)
    session = onnxruntime.InferenceSession(str(onnx_file))
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True))
    assert names == ["pred_score", "pred_label", "anomaly_map", "pred_mask"]
    for name in ("pred_score", "anomaly_map"):
        torch.testing.assert_close(torch.from_numpy(outputs[name]), getattr(expected, name), rtol=0, atol=1e-4)
    with torch.no_grad():
        raw = exported.model(images)
    detector = fastbgad.BGAD.load(out / "model.safetensors")
    assert torch.equal(detector.predict(images).image_score, raw.pred_score)


def test_what_cannot_be_exported() -> None:
    with pytest.raises(FeatureError, match="no calibration"):
        bgad().to_onnx(".")
    half = bgad(backbone="resnet10t", levels=(1, 2), pre_trained=False, backbone_dtype="bfloat16")
    with pytest.raises(ConfigError, match="backbone_dtype='float32'"):
        half.to_onnx(".")
