"""`fastbgad check`: the report in the terminal, as JSON and as a sheet, and its exit codes."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from fastbgad.__main__ import main
from tests.make_data import make_folder_dataset, make_mvtec, save


def lines(capsys) -> list[str]:
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def facts_of(capsys, *arguments: object, code: int = 0) -> dict:
    assert main(["check", *map(str, arguments), "--json"]) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def test_report(tmp_path, capsys):
    folder = make_mvtec(tmp_path, normals=5, per_type=3, types=("crack", "dent"), size=100)
    square = np.zeros((100, 100), np.uint8)
    square[20:40, 20:60] = 255
    for index in range(3):
        save(folder / f"ground_truth/crack/{index:03d}_mask.png", square)
    save(folder / "ground_truth/dent/001_mask.png", 255 - square)
    (folder / "test/raw.cr2").write_bytes(b"")
    assert main(["check", str(tmp_path)]) == 0
    printed = lines(capsys)
    assert printed[0] == f"widget: MVTec AD (layout mvtec), {folder}"
    assert "good 5 2 –" in printed
    assert "crack – 3 3 8.0" in printed
    assert any(line.startswith("dent – 3 3 ") and line.endswith("92 1 inverted?") for line in printed)
    assert "sizes all 100 x 100 (height x width)" in printed
    assert "values 8 bits" in printed
    assert "at 256 x 256 every mask is kept" in printed
    assert "would be used training: 5 normal, 3 known anomalies; test: 2 normal, 3 anomalous" in printed
    assert "- 1 file with the suffix .cr2, which is not read (test/raw.cr2)" in printed
    assert printed[-1] == "no problems, but look at the notes"


def test_folders_that_are_no_categories_are_named(tmp_path, capsys):
    make_mvtec(tmp_path, "bottle")
    folder = make_mvtec(tmp_path, "cable")
    (folder / "train").rename(folder / "trian")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/license.txt").write_text("x")
    assert main(["check", str(tmp_path)]) == 0
    assert lines(capsys)[-1] == f"not looked at, since their folders have no known layout: cable (in {tmp_path})"
    assert main(["check", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["not_categories"] == ["cable"]
    assert main(["check", str(tmp_path / "bottle")]) == 0
    assert "not looked at" not in capsys.readouterr().out


def test_several_categories_of_which_some_have_problems(tmp_path, capsys):
    make_mvtec(tmp_path, "bottle")
    folder = make_mvtec(tmp_path, "cable")
    (folder / "test/crack/000.png").write_bytes(b"no image")
    (tmp_path / "visa/Data/Images").mkdir(parents=True)
    (tmp_path / "visa/split_csv").mkdir()
    assert main(["check", str(tmp_path)]) == 2
    printed = lines(capsys)
    assert printed[0] == "3 categories"
    assert "bottle mvtec 4 2 4 2 – –" in printed
    assert "cable mvtec 4 2 4 2 1 –" in printed
    assert printed.count("nothing is wrong") == 1
    assert any("cable/test/crack/000.png is not an image" in line for line in printed)
    assert any(line.startswith("visa: VisA (layout visa)") for line in printed)
    assert main(["check", str(tmp_path), "--category", "bottle"]) == 0
    assert "3 categories" not in lines(capsys)


def test_a_category_that_cannot_be_opened_stops_no_other(tmp_path, capsys):
    make_mvtec(tmp_path, "bottle")
    # Real-IAD says in a JSON file which images belong to which part.
    for name in ("OK", "NG/AK"):
        save(tmp_path / "audiojack" / name / "0.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "audiojack/audiojack.json").write_text("{ no JSON")
    facts = facts_of(capsys, tmp_path, code=2)
    jack, bottle = facts["categories"]
    assert (bottle["name"], bottle["problems"]) == ("bottle", [])
    assert jack["name"] == "audiojack"
    assert "audiojack.json" in jack["problems"][0]
    assert main(["check", str(tmp_path), "--sheet", str(tmp_path / "sheet.html")]) == 2
    assert any(line.startswith("- ") and "audiojack.json" in line for line in lines(capsys))
    assert "audiojack.json" in (tmp_path / "sheet.html").read_text()


def test_json(tmp_path, capsys):
    make_mvtec(tmp_path, per_type=3)
    facts = facts_of(capsys, tmp_path, "--image-size", 64, 96, "--num-anomalies", 1)
    assert (facts["data"], facts["check"], facts["image_size"]) == (str(tmp_path), "quick", [64, 96])
    (category,) = facts["categories"]
    assert category["split"] == {"normals": 4, "known": 1, "tested_normal": 2, "tested_anomalous": 5}
    assert category["vanished"] == {"image_size": [64, 96], "masks": 0, "of": 6, "smallest_size": [64, 96]}
    assert facts_of(capsys, tmp_path, "--num-anomalies", 50, code=2)["categories"][0]["split"] is None


def test_json_stands_alone(tmp_path, capsys, monkeypatch):
    make_mvtec(tmp_path)
    monkeypatch.setattr("fastbgad.render.console.check_bar", None)
    assert facts_of(capsys, tmp_path, "--sheet", tmp_path / "sheet.png")["categories"][0]["name"] == "widget"


def test_masks_that_vanish(tmp_path, capsys):
    folder = make_mvtec(tmp_path, per_type=2, size=100)
    dot = np.zeros((100, 100), np.uint8)
    dot[0, 0] = 255
    save(folder / "ground_truth/dent/001_mask.png", dot)
    assert main(["check", str(tmp_path), "--image-size", "32", "32"]) == 0
    printed = lines(capsys)
    assert any(line.startswith("dent – 2 2 0.01 ") and line.endswith(" 1 vanished") for line in printed)
    (losses,) = [line for line in printed if line.startswith("at 32 x 32 ")]
    assert "images are reduced up to 3.1 times; 1 of 4 masks vanished: no pixel is left; --image-size " in losses


def test_full_finds_what_quick_does_not(tmp_path, capsys):
    folder = make_mvtec(tmp_path)
    whole = (folder / "test/good/000.png").read_bytes()
    (folder / "test/good/000.png").write_bytes(whole[: len(whole) // 2])
    shutil.copy(folder / "train/good/001.png", folder / "test/good/001.png")
    assert facts_of(capsys, tmp_path)["categories"][0]["problems"] == []
    assert facts_of(capsys, tmp_path, "--check", "none")["categories"][0]["sizes"] is None
    problems = facts_of(capsys, tmp_path, "--check", "full", code=2)["categories"][0]["problems"]
    assert len(problems) == 2
    assert "000.png is damaged" in problems[0]
    assert "the same image is in training and test" in problems[1]


def test_options_for_files(tmp_path, capsys):
    folder = make_folder_dataset(tmp_path / "photos", anomalies=2)
    classes = np.zeros((48, 48), np.uint8)
    classes[:10, :10], classes[20:30, 20:30] = 1, 2
    for mask in sorted((folder / "masks").iterdir()):
        mask.unlink()
        save(mask.with_name(f"{mask.stem}_truth.png"), classes)
    assert facts_of(capsys, folder, code=2)["categories"][0]["problems"]
    category = facts_of(capsys, folder, "--mask-suffix", "_truth", "--mask-threshold", 0)["categories"][0]
    assert category["problems"] == []
    assert category["mask_threshold"] == 0
    assert category["types"][1]["masks"]["most"] == pytest.approx(200 / 48**2)


def test_names_that_are_not_utf8(tmp_path, capsys):
    folder = make_mvtec(tmp_path, per_type=2, types=("crack",))
    os.rename(folder / "test/crack/000.png", os.fsencode(folder / "test/crack") + b"/\xff.png")
    assert main(["check", str(tmp_path)]) == 2
    assert "\\xff.png" in capsys.readouterr().out
    problems = facts_of(capsys, tmp_path, code=2)["categories"][0]["problems"]
    assert any("\udcff.png" in problem for problem in problems)


def test_names_are_no_markup(tmp_path, capsys):
    make_mvtec(tmp_path, types=("[bold]crack", "dent"))
    assert main(["check", str(tmp_path)]) == 0
    assert any(line.startswith("[bold]crack – 2 2") for line in lines(capsys))


@pytest.mark.parametrize("suffix", ["html", "png"])
def test_sheet(tmp_path, capsys, suffix):
    make_mvtec(tmp_path / "data")
    path = tmp_path / f"sheet.{suffix}"
    assert main(["check", str(tmp_path / "data"), "--sheet", str(path), "--per-type", "1"]) == 0
    assert f"contact sheet: {path}" in capsys.readouterr().out
    assert path.stat().st_size > 3000
    if suffix == "html":
        assert path.read_text().count("<img") == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sheet", "sheet.pdf"], "name it .html or .png"),
        (["--per-type", "0"], "per_type is 0"),
        (["--num-anomalies", "-1"], "num_anomalies -1"),
        (["--image-size", "0", "5"], "the image size"),
        (["--category", "wiget"], "did you mean widget?"),
        (["--mask-threshold", "3"], "mask_threshold is 3"),
    ],
)
def test_wrong_input(tmp_path, capsys, arguments, said):
    make_mvtec(tmp_path)
    assert main(["check", str(tmp_path), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err


def test_folders_without_a_category(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "missing"):
        assert main(["check", str(folder)]) == 2
        assert str(folder) in capsys.readouterr().err
