"""The commands with a category, a kind of defect, an image and a run folder whose names are not UTF-8."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fastbgad.__main__ import main
from tests.cli.conftest import train
from tests.make_data import make_mvtec
from tests.models import SIZE

CATEGORY, DEFECT, IMAGE, RUN = (os.fsdecode(name) for name in (b"k\xe4rn", b"ri\xdf", b"0\xe40", b"r\xfcn"))


def renamed(root: Path) -> Path:
    """The folder of a category, with such names throughout."""
    folder = make_mvtec(root, normals=4, per_type=3, size=SIZE, test_normals=2)
    for part in ("test", "ground_truth"):
        kind = next(kind for kind in sorted((folder / part).iterdir()) if kind.name != "good")
        for path in kind.glob("000*"):
            path.rename(kind / path.name.replace("000", IMAGE))
        kind.rename(folder / part / DEFECT)
    return folder.rename(root / CATEGORY)


def test_every_command_takes_names_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = renamed(tmp_path / "set"), tmp_path / RUN
    assert main(train(tmp_path / "set", out, "--placement", "disk", "--category", CATEGORY)) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "k\\xe4rn: BGAD" in page
    assert "ri\\xdf/" in page
    model = str(out / "model.safetensors")
    assert main(["evaluate", "--model", model, "--data", str(folder), "--out", str(out / "evaluation")]) == 0
    assert "0\\xe40" in page + (out / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert 0 <= json.loads((out / "evaluation" / "metrics.json").read_text())["pixel_auroc"] <= 1
    for maps in ("overlay", "png16", "npy", "none"):
        scores = out / maps
        assert main(["predict", "--model", model, "--maps", maps, "--out", str(scores), str(folder / "test")]) == 0
        assert os.fsencode(f"{IMAGE}.png") in (scores / "scores.csv").read_bytes()
        if maps != "none":
            assert any(IMAGE in path.name for path in (scores / "maps").rglob("*"))
    exported = out / os.fsdecode(b"m\xe4.pt2")
    assert main(["export", "--model", model, "--out", str(exported), "--format", "torch-export"]) == 0
    assert exported.is_file()
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert f"report: {tmp_path}/r\\xfcn/report.html" in printed


def test_a_size_that_the_backbone_cannot_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_mvtec(tmp_path, normals=2, per_type=3, size=SIZE)
    backbone = ["--backbone", "hrnet_w18_small", "--weights", "random", "--image-size", "100", "150"]
    assert main(train(tmp_path, tmp_path / "out", *backbone)) == 2
    assert "Nearby 96 x 128 and 128 x 160 work; choose such an image size" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
