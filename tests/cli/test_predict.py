"""`fastbgad predict` end to end, in this process."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastbgad.__main__ import main
from tests.make_data import save


def test_predict(run: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    root, out = run
    command = ["predict", str(root / "widget" / "test"), "--model", str(out / "model.safetensors")]
    assert main([*command, "--out", str(tmp_path / "scores")]) == 0
    assert "scored 8 images" in capsys.readouterr().out
    assert len(list((tmp_path / "scores" / "maps").iterdir())) == 8


def test_predict_with_a_corrupt_image(run: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    root, out = run
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    good = root / "widget" / "test" / "good" / "000.png"
    command = ["predict", str(good), str(tmp_path / "bad.png"), "--model", str(out / "model.safetensors")]
    assert main([*command, "--out", str(tmp_path / "scores")]) == 2
    printed = capsys.readouterr().out
    assert "scored 1 images" in printed
    assert "bad.png" in printed


def test_bit_depth(run: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    photo = save(tmp_path / "a.png", np.full((64, 64), 4096, np.uint16))
    command = ["predict", str(photo), "--model", str(run[1] / "model.safetensors"), "--maps", "none"]
    assert main([*command, "--out", str(tmp_path / "unknown")]) == 2
    assert "give --bit-depth 14 for a camera of 14 bits, or 16 for a dark image" in capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "16"), "--bit-depth", "16"]) == 0
    assert main([*command, "--out", str(tmp_path / "12"), "--bit-depth", "12"]) == 2
    assert str(photo) in capsys.readouterr().out.split("could not be read")[1]
    assert main([*command, "--out", str(tmp_path / "17"), "--bit-depth", "17"]) == 2
    assert "bit_depth is 17; give the bits of the camera, 1 to 16" in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["scores", "."])
def test_own_maps_are_no_photographs(run: tuple[Path, Path], tmp_path: Path, capsys, inside: str) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(run[0] / "widget" / "test" / "good", photos)
    command = ["predict", str(photos), "--model", str(run[1] / "model.safetensors"), "--out", str(photos / inside)]
    assert main(command) == 0
    lines = (photos / inside / "scores.csv").read_text()
    assert "note" not in capsys.readouterr().err
    for _ in range(2):
        assert main([*command, "--resume"]) == 0
        assert (photos / inside / "scores.csv").read_text() == lines
        name = "maps" if inside == "." else "scores"
        told = f"fastbgad: note: left out of {photos}: 1 folder that results are written to ({name})\n"
        assert capsys.readouterr().err == told


def test_what_is_left_out_and_links_without_a_target(run: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    photos, line2 = tmp_path / "photos", tmp_path / "line2"
    shutil.copytree(run[0] / "widget" / "test" / "good", line2)
    photos.mkdir()
    (photos / "line2").symlink_to(line2)
    (photos / "gone.png").symlink_to(tmp_path / "annex" / "key")
    (photos / "._a.png").write_bytes(b"\0\5\x16\7")
    (photos / "b.heic").write_bytes(b"")
    command = ["predict", str(photos), "--model", str(run[1] / "model.safetensors"), "--out", str(tmp_path / "scores")]
    assert main([*command, "--maps", "none"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("note") == 1
    assert f"left out of {photos}: 1 file with a hidden name (._a.png); 1 file with the suffix .heic" in printed.err
    assert "1 images could not be read" in printed.out
    with (tmp_path / "scores" / "scores.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    good = sorted(path.name for path in line2.iterdir())
    assert [line["image"] for line in lines] == [f"{photos}/gone.png", *(f"{photos}/line2/{name}" for name in good)]
    assert [bool(line["error"]) for line in lines] == [True, *([False] * len(good))]
