"""A camera of 12 bits from training to prediction: every command scales its images alike."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbgad import BGAD
from fastbgad.__main__ import main
from tests.cli.conftest import train
from tests.make_data import make_mvtec, save
from tests.models import SIZE


def to_twelve_bits(root: Path) -> None:
    """Store every image as a camera of 12 bits does: gray, in 16 bits, of values up to 4095."""
    for path in root.rglob("*.png"):
        if "ground_truth" not in path.parts:
            gray = np.asarray(Image.open(path).convert("L"))
            save(path, np.rint(gray * (4095 / 255)).astype(np.uint16))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same images in 8 bits of gray, and as of a camera of 12."""
    eight = tmp_path_factory.mktemp("eight")
    make_mvtec(eight, normals=5, per_type=3, size=SIZE)
    twelve = tmp_path_factory.mktemp("twelve") / "set"
    shutil.copytree(eight, twelve)
    to_twelve_bits(twelve)
    for path in eight.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    return eight, twelve


def scores(model: Path, images: Path, out: Path, *more: str) -> list[str]:
    command = ["predict", str(images), "--model", str(model), "--out", str(out), "--maps", "none", *more]
    assert main(command) == 0
    with (out / "scores.csv").open() as file:
        return [row["score"] for row in csv.DictReader(file)]


def test_all_commands_scale_alike(sets: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    eight, twelve = sets
    models = {}
    for name, root in (("eight", eight), ("twelve", twelve)):
        assert main(train(root, tmp_path / name)) == 0
        printed = capsys.readouterr()
        models[name] = tmp_path / name / "model.safetensors"
        assert ("use 12: values 0 to 4095" in printed.err) == (name == "twelve")
    assert "bit_depth" not in BGAD.load(models["eight"]).history
    assert BGAD.load(models["twelve"]).history["bit_depth"] == 12
    assert (tmp_path / "eight/metrics.json").read_text().split("seconds")[0] == (
        tmp_path / "twelve/metrics.json"
    ).read_text().split("seconds")[0]

    expected = scores(models["eight"], eight / "widget/test", tmp_path / "a")
    assert scores(models["twelve"], twelve / "widget/test", tmp_path / "b") == expected
    assert scores(models["eight"], twelve / "widget/test", tmp_path / "c", "--bit-depth", "12") == expected

    capsys.readouterr()
    tables = []
    for model, root in (("eight", eight), ("twelve", twelve)):
        assert main(["evaluate", "--model", str(models[model]), "--data", str(root)]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]


def test_a_brighter_lot_is_not_scaled_differently(sets: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    _, twelve = sets
    assert main(train(twelve, tmp_path / "run")) == 0
    brighter = tmp_path / "brighter"
    shutil.copytree(twelve, brighter)
    image = save(brighter / "widget/test/good/000.png", np.full((SIZE, SIZE), 5000, np.uint16))
    command = ["evaluate", "--model", str(tmp_path / "run/model.safetensors"), "--data", str(brighter)]
    assert main(command) == 2
    assert f"the image {image} holds the value 5000" in capsys.readouterr().err
