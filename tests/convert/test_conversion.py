"""The command `fastbgad convert`, calibration, and arguments that do not fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastbgad.__main__ import main
from fastbgad.convert import convert
from fastbgad.convert.model import ReadOptions
from fastbgad.data import open_category
from fastbgad.errors import ConfigError, OutputError
from fastbgad.evaluate.evaluation import evaluate_model
from fastbgad.model import BGAD

from .foreign_code import SIZE, SMALL, Foreign, uncalibrated


def test_command_without_data(official: Foreign, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """An uncalibrated model: evaluate works with the official calibration, everything else says what to do."""
    out = str(tmp_path / "model.safetensors")
    command = ["convert", str(official.path), out, "--image-size", str(SIZE), str(SIZE)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for expected in ("checkpoint of official BGAD", "tf_efficientnet_b0.aa_in1k", "tanh (assumed", "none: predict"):
        assert expected in printed
    assert main(command) == 2
    assert "exists already; choose another file, or --force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    folder = tmp_path / "evaluation"
    evaluate = ["evaluate", "--model", out, "--data", str(data), "--calibration"]
    assert main([*evaluate, "official", "--out", str(folder)]) == 0
    assert "none: the model has no calibration" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "report.html"}
    assert main([*evaluate, "training"]) == 2
    assert "convert ... --data DIR" in capsys.readouterr().err
    assert main(["predict", str(data), "--model", out, "--out", str(tmp_path / "scores")]) == 2
    error = capsys.readouterr().err
    assert "this model has no calibration" in error
    assert "convert ... --data DIR" in error
    assert not (tmp_path / "scores").exists()
    assert main(["info", "--model", out]) == 0
    assert "no calibration" in capsys.readouterr().out


def test_command_with_data(official: Foreign, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "model.safetensors"
    size = ["--image-size", str(SIZE), str(SIZE)]
    assert main(["convert", str(official.path), str(out), *size, "--data", str(data), "--beta", "0.2"]) == 0
    assert "on 4 normal images" in capsys.readouterr().out
    assert main(["predict", str(data / "widget" / "test"), "--model", str(out), "--out", str(tmp_path / "scores")]) == 0
    model = BGAD.load(out)
    assert model.calibrated
    # what an official calibration of the same images gives
    category = open_category(data)
    evaluation = evaluate_model(model, category.test, calibration="official")
    plain = BGAD.load(uncalibrated(official, tmp_path))
    assert torch.equal(evaluate_model(plain, category.test, calibration="official").maps, evaluation.maps)
    # a model that was converted before is calibrated without its checkpoint
    again = tmp_path / "again.safetensors"
    arguments = ["convert", str(tmp_path / "plain.safetensors"), str(again), "--data", str(data), "--beta", "0.2"]
    assert main(arguments) == 0
    assert torch.equal(BGAD.load(again).boundaries, model.boundaries)
    assert torch.equal(BGAD.load(again).level_max, model.level_max)


def test_arguments_that_do_not_fit(official: Foreign, data: Path, tmp_path: Path) -> None:
    model = uncalibrated(official, tmp_path)
    normals = open_category(data).train
    for call, message in (
        (lambda: convert(official.path, tmp_path / "x.pt"), "only models of fastbgad have the suffix"),
        (lambda: convert(official.path, tmp_path / "x.safetensors", "bgad"), "only models of fastbgad have the suffix"),
        (lambda: convert(model, tmp_path / "x.safetensors"), "a model of fastbgad already; give --data"),
        (lambda: convert(model, tmp_path / "x.pt", normals=normals), "holds no calibration; leave --data out"),
        (lambda: convert(model, tmp_path / "x.pt", options=SMALL), "holds its image_size"),
        (lambda: convert(model, tmp_path / "x.pt", "pytorch"), "to is 'pytorch'"),  # type: ignore[arg-type]
        (lambda: convert(official.path, tmp_path / "x.safetensors", normals=normals, beta=2), "beta"),
        (lambda: ReadOptions(clamp=-1), "clamp is -1"),
        (lambda: ReadOptions(clamp_form="sigmoid"), "clamp_form is 'sigmoid'"),  # type: ignore[arg-type]
        (lambda: ReadOptions(image_size=(0, 3)), "image size"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(OutputError, match="exists already"):
        convert(official.path, model)
    with pytest.raises(OutputError):
        convert(official.path, official.path / "below_a_file.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"plain.safetensors"}


def test_help_teaches(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for expected in ("fastbgad convert official.pt", "--clamp-form {None,tanh,scaled_tanh}", "--calibration official"):
        assert expected in printed
