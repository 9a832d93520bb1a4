"""Miniatures of public datasets, each in its own layout: what is read, divided, left out and said."""

from __future__ import annotations

import csv
import json
import os
import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fastbgad.data import Category, list_categories, open_category, read_mask, split_known_anomalies
from fastbgad.data.layouts import FileOptions
from fastbgad.errors import DataError, DatasetProblemsError, Notice
from tests.make_data import anomalous_image, make_folder_dataset, make_mvtec, normal_image, save

RNG = np.random.default_rng(5)


def normal(path: Path) -> Path:
    return save(path, normal_image(RNG))


def anomaly(image: Path, mask: Path | None, value: int = 255) -> np.ndarray:
    """Write an anomalous image and its mask; return the truth."""
    pixels, marked = anomalous_image(RNG)
    save(image, pixels)
    if mask is not None:
        save(mask, np.where(marked > 0, value, 0).astype(np.uint8))
    return marked > 0


def opened(root: Path, *arguments, **options) -> tuple[Category, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        category = open_category(root, *arguments, **options)
    assert all(issubclass(warning.category, Notice) for warning in caught)
    return category, [str(warning.message) for warning in caught]


def counts(category: Category) -> tuple[int, dict[str, int], int]:
    """Numbers of training normals, of test images by type, and of anomalies set aside for training."""
    return len(category.train), dict(Counter(sample.defect for sample in category.test)), len(category.known)


def make_loco(root: Path) -> np.ndarray:
    """Return the union of the two masks of the first image."""
    for index in range(3):
        for part in ("train", "validation", "test"):
            normal(root / part / "good" / f"{index:03d}.png")
    union = np.zeros((48, 48), bool)
    for defect in ("logical_anomalies", "structural_anomalies"):
        for index in range(2):
            masks = root / "ground_truth" / defect / f"{index:03d}"
            first = anomaly(root / "test" / defect / f"{index:03d}.png", masks / "000.png", 3)
            if (defect, index) == ("logical_anomalies", 0):
                second = np.zeros((48, 48), np.uint8)
                second[40:46, 2:9] = 249
                save(masks / "001.png", second)
                union = first | (second > 0)
    (root / "defects_config.json").write_text("[]")
    return union


def test_loco(tmp_path):
    union = make_loco(tmp_path / "loco" / "juice")
    category, said = opened(tmp_path / "loco")
    assert category.layout == "loco"
    assert counts(category) == (3, {"good": 3, "logical_anomalies": 2, "structural_anomalies": 2}, 0)
    first = category.test[3]
    assert first.name == "logical_anomalies/000.png"
    np.testing.assert_array_equal(read_mask(first.mask, first.decoding.mask_threshold), union)
    assert len(said) == 1
    assert "3 files in validation, the part for validation, which is not used" in said[0]
    # A part that is damaged or of another size is named.
    save(tmp_path / "loco/juice/ground_truth/logical_anomalies/000/002.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(DatasetProblemsError, match="differ in size"):
        open_category(tmp_path / "loco")


def test_mvtec_ad_2(tmp_path):
    root = tmp_path / "can"
    for index in range(4):
        normal(root / "train/good" / f"{index:03d}_regular.png")
        normal(root / "validation/good" / f"{index:03d}_regular.png")
        normal(root / "test_private" / f"{index:03d}_regular.png")
        normal(root / "test_private_mixed" / f"{index:03d}_mixed.png")
    for index in range(2):
        normal(root / "test_public/good" / f"{index:03d}_shift_1.png")
        name = f"{index:03d}_overexposed"
        anomaly(root / "test_public/bad" / f"{name}.png", root / "test_public/ground_truth/bad" / f"{name}_mask.png")
    category, said = opened(tmp_path)
    assert category.layout == "mvtec_ad_2"
    assert counts(category) == (4, {"good": 2, "bad": 2}, 0)
    assert category.has_masks
    assert len(said) == 1
    for name, reason in (
        ("validation", "not used"),
        ("test_private", "no public labels"),
        ("test_private_mixed", "no"),
    ):
        assert f"4 files in {name}, " in said[0]
        assert reason in said[0]


def test_mvtec_3d(tmp_path):
    root = tmp_path / "bagel"
    for index in range(3):
        for folder in ("train/good", "validation/good", "test/good"):
            normal(root / folder / "rgb" / f"{index:03d}.png")
            save(root / folder / "xyz" / f"{index:03d}.tiff", np.zeros((48, 48), np.float32))
        save(root / "test/good/gt" / f"{index:03d}.png", np.zeros((48, 48), np.uint8))
        anomaly(root / "test/hole/rgb" / f"{index:03d}.png", root / "test/hole/gt" / f"{index:03d}.png", value=2)
        save(root / "test/hole/xyz" / f"{index:03d}.tiff", np.zeros((48, 48), np.float32))
    category, said = opened(tmp_path)
    assert category.layout == "mvtec_3d"
    assert counts(category) == (3, {"good": 3, "hole": 3}, 0)
    assert all(sample.image.parent.name == "rgb" for sample in (*category.train, *category.test))
    assert len(said) == 1
    assert "3 files in train/good/xyz, which hold depths" in said[0]
    assert "6 files in validation" in said[0]


def make_visa(root: Path, table: bool = True) -> Path:
    images, masks = root / "candle/Data/Images", root / "candle/Data/Masks/Anomaly"
    rows = []
    for index in range(6):
        normal(images / "Normal" / f"{index:04d}.JPG")
        rows.append(
            ("candle", "test" if index > 3 else "train", "normal", f"candle/Data/Images/Normal/{index:04d}.JPG", "")
        )
    for index in range(3):
        anomaly(images / "Anomaly" / f"{index:03d}.JPG", masks / f"{index:03d}.png", value=index + 1)
        names = (
            f"candle/Data/{kind}/Anomaly/{index:03d}.{suffix}" for kind, suffix in (("Images", "JPG"), ("Masks", "png"))
        )
        rows.append(("candle", "test", "anomaly", *names))
    (root / "candle/image_anno.csv").write_text("image,label,mask\n")
    if table:
        rows.append(("pcb1", "train", "normal", "pcb1/Data/Images/Normal/0000.JPG", ""))
        (root / "split_csv").mkdir()
        with (root / "split_csv/1cls.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("object", "split", "label", "image", "mask"), *rows])
    return root


def test_visa(tmp_path, monkeypatch):
    root = make_visa(tmp_path / "visa")
    assert list_categories(root) == ["candle"]
    category, said = opened(root)
    assert category.layout == "visa"
    assert counts(category) == (4, {"good": 2, "anomaly": 3}, 0)
    assert [sample.label for sample in category.test] == [1, 1, 1, 0, 0]
    assert said == []
    # Masks of the values 1, 2, 3 are whole.
    assert all(read_mask(s.mask, s.decoding.mask_threshold).sum() > 20 for s in category.test if s.label)
    monkeypatch.chdir(root / "candle")
    relative, _ = opened(Path())
    assert counts(relative) == counts(category)
    (root / "candle/Data/Images/Normal/0001.JPG").unlink()
    with pytest.raises(DatasetProblemsError, match=r"line 3 of .*1cls.csv names .*0001.JPG, which does not exist"):
        open_category(root)


def test_visa_without_its_table(tmp_path):
    category, said = opened(make_visa(tmp_path / "visa", table=False))
    assert counts(category) == (5, {"good": 1, "anomaly": 3}, 0)
    assert len(said) == 1
    assert "there is no" in said[0]
    assert "1cls.csv: 1 normal image (20%) are kept for the test" in said[0]
    root = make_visa(tmp_path / "again")
    (root / "split_csv/1cls.csv").write_text("image,label\n")
    with pytest.raises(DataError, match="has the columns image, label; it should have object, split"):
        open_category(root)
    (root / "split_csv/1cls.csv").write_bytes(b"\xff\xfe\0")
    with pytest.raises(DataError, match=r"cannot read .*1cls.csv"):
        open_category(root)


def make_kolektor2(root: Path) -> Path:
    for part, first in (("train", 10000), ("test", 20000)):
        for index in range(6):
            name = f"{first + index}"
            if index % 3:
                normal(root / part / f"{name}.png")
                save(root / part / f"{name}_GT.png", np.zeros((48, 48), np.uint8))
            else:
                anomaly(root / part / f"{name}.png", root / part / f"{name}_GT.png")
    return root


@pytest.mark.parametrize("check", ["full", "quick", "none"])
def test_kolektor2(tmp_path, check):
    category, said = opened(make_kolektor2(tmp_path / "KolektorSDD2"), check=check)
    assert (category.name, category.layout) == ("KolektorSDD2", "kolektor2")
    assert counts(category) == (4, {"good": 4, "defect": 2}, 2)
    assert said == []
    assert [sample.image.name for sample in category.known] == ["10000.png", "10003.png"]
    split = split_known_anomalies(category)
    assert (len(split.normals), len(split.known_anomalies), len(split.test)) == (4, 2, 6)


def test_kolektor2_with_a_missing_partner(tmp_path):
    root = make_kolektor2(tmp_path / "set")
    (root / "train/10001_GT.png").unlink()
    (root / "test/20002.png").unlink()
    with pytest.raises(DatasetProblemsError) as caught:
        open_category(root)
    assert set(caught.value.problems) == {
        f"the mask {root}/test/20002_GT.png belongs to no image; add the image or remove the mask",
        f"{root}/train/10001.png has no mask; add {root}/train/10001_GT.png",
    }


def test_kolektor(tmp_path):
    root = tmp_path / "KolektorSDD"
    for part in range(5):
        for index in range(4):
            image, mask = (
                root / f"kos{part + 1:02d}" / name for name in (f"Part{index}.jpg", f"Part{index}_label.bmp")
            )
            if index == 3:
                anomaly(image, mask)
            else:
                normal(image)
                save(mask, np.zeros((48, 48), np.uint8))
    category, said = opened(root)
    assert category.layout == "kolektor"
    assert counts(category) == (12, {"good": 3, "defect": 5}, 0)
    assert len({sample.name for sample in category.test}) == 8  # Part3.jpg is in every folder
    assert len(said) == 1
    assert "3 normal images (20%) are kept for the test" in said[0]


def make_real_iad(root: Path, table: bool) -> Path:
    folder = root / "realiad_256/audiojack"
    entries: dict[str, list[dict[str, object]]] = {"train": [], "test": []}

    def entry(part: str, kind: str, image: str, mask: str | None = None) -> None:
        fields = {"category": "audiojack", "anomaly_class": kind, "image_path": image, "mask_path": mask}
        entries[part].append(fields)

    for index in range(5):
        image = f"OK/S{index:04d}/audiojack_{index:04d}_OK_C1.jpg"
        normal(folder / image)
        entry("test" if index > 2 else "train", "OK", image)
    for kind in ("AK", "BX"):
        for index in range(2):
            name = f"NG/{kind}/S{index:04d}/audiojack_{index:04d}_NG_{kind}_C1"
            anomaly(folder / f"{name}.jpg", folder / f"{name}.png")
            entry("test", kind, f"{name}.jpg", f"{name}.png")
    if table:
        meta = {"normal_class": "OK", "prefix": "audiojack/", "pre_transform": "x"}
        path = root / "realiad_jsons/audiojack.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"meta": meta, **entries}))
    return root


def test_real_iad(tmp_path):
    root = make_real_iad(tmp_path, table=True)
    category, said = opened(root / "realiad_256")
    assert category.layout == "real_iad"
    assert counts(category) == (3, {"good": 2, "AK": 2, "BX": 2}, 0)
    assert category.has_masks
    assert said == []
    assert len({sample.name for sample in category.test}) == 6
    with pytest.raises(DataError, match=r"The folder .*realiad_256 holds categories \(audiojack\): give that"):
        open_category(root)
    table = root / "realiad_jsons/audiojack.json"
    entries = json.loads(table.read_text())
    entries["test"][-1]["mask_path"] = None
    table.write_text(json.dumps(entries))
    with pytest.raises(DatasetProblemsError, match=r"entry 6 of test in .*audiojack.json names no mask"):
        open_category(root / "realiad_256")
    (root / "realiad_256/audiojack/OK/S0001/audiojack_0001_OK_C1.jpg").unlink()
    with pytest.raises(DatasetProblemsError, match=r"entry 2 of train in .*audiojack.json names .*S0001"):
        open_category(root / "realiad_256")
    (root / "realiad_jsons/audiojack.json").write_text('{"train": 3}')
    with pytest.raises(DataError, match="is not the JSON file of a category of Real-IAD"):
        open_category(root / "realiad_256")


def test_real_iad_without_its_table(tmp_path):
    category, said = opened(make_real_iad(tmp_path, table=False) / "realiad_256")
    assert counts(category) == (4, {"good": 1, "AK": 2, "BX": 2}, 0)
    assert category.has_masks
    assert len(said) == 1
    assert "realiad_jsons/audiojack.json was found neither" in said[0]


def test_mpdd_and_btad_are_like_mvtec(tmp_path):
    """MPDD has the layout of MVTec AD; folders may be written in capitals."""
    folder = make_mvtec(tmp_path / "mpdd")
    category, said = opened(tmp_path / "mpdd")
    assert (category.layout, said) == ("mvtec", [])
    (folder / "train/good").rename(folder / "train/Good")
    (folder / "train").rename(folder / "TRAIN")
    (folder / "test").rename(folder / "Test")
    again, said = opened(tmp_path / "mpdd")
    assert counts(again) == counts(category)
    assert said == []


def test_folders_deeper_and_linked_are_read(tmp_path):
    folder = make_mvtec(tmp_path / "set", types=("crack",))
    normal(folder / "train/good/shift2/000.png")  # the same name as in the folder above
    anomaly(folder / "test/crack/more/000.png", folder / "ground_truth/crack/more/000_mask.png")
    for index in range(3):
        normal(tmp_path / "elsewhere" / f"x{index}.png")
    os.symlink(tmp_path / "elsewhere", folder / "train/good/linked")
    category, said = opened(tmp_path / "set")
    assert counts(category) == (8, {"good": 2, "crack": 3}, 0)
    assert [sample.name for sample in category.test[:3]] == ["crack/000.png", "crack/001.png", "crack/more/000.png"]
    assert said == []


def test_links_give_folders_the_names_of_a_layout(tmp_path):
    folder = make_mvtec(tmp_path / "set", types=("crack",))
    (folder / "train/good").rename(folder / "photos of May")
    os.symlink("../photos of May", folder / "train/good")
    category, said = opened(tmp_path / "set")
    assert counts(category) == (4, {"good": 2, "crack": 2}, 0)
    assert said == []


def test_everything_left_out_is_named_in_one_notice(tmp_path):
    folder = make_mvtec(tmp_path, types=("crack",))
    normal(folder / "train/bad/000.png")
    normal(folder / "test/loose.png")
    normal(folder / "depth/000.png")
    normal(folder / ".ipynb_checkpoints/000.png")
    (folder / "train/good/._000.png").write_bytes(b"\0")
    (folder / "train/good/raw.cr2").write_bytes(b"\0")
    (folder / "license.txt").write_text("x")
    category, said = opened(tmp_path)
    assert counts(category) == (4, {"good": 2, "crack": 2}, 0)
    assert len(said) == 1
    for part in (
        f"left out of {folder}: ",
        "1 folder with a hidden name (.ipynb_checkpoints)",
        "1 file with a hidden name (train/good/._000.png)",
        "1 file with the suffix .cr2, which is not read (train/good/raw.cr2)",
        "1 file in train/bad, where MVTec AD has none (train/bad/000.png)",
        "1 file in test, where MVTec AD has none (test/loose.png)",
        "1 file in depth, where MVTec AD has none (depth/000.png)",
    ):
        assert part in said[0]
    assert "license" not in said[0]


@pytest.mark.parametrize("suffix", ["ppm", "pgm", "gif", "jfif", "JPG", "tga", "jp2"])
def test_other_suffixes_are_read(tmp_path, suffix):
    folder = make_mvtec(tmp_path)
    kind = {"jfif": "JPEG", "JPG": "JPEG", "pgm": "PPM", "jp2": "JPEG2000"}.get(suffix, suffix.upper())
    picture = Image.fromarray(normal_image(RNG)).convert("L" if suffix in ("pgm", "gif") else "RGB")
    picture.save(folder / f"train/good/100.{suffix}", format=kind)
    category, said = opened(tmp_path)
    assert (len(category.train), said) == (5, [])


def test_links_without_their_content_are_problems(tmp_path):
    folder = make_mvtec(tmp_path)
    (folder / "train/good/000.png").unlink()
    os.symlink("../../.git/annex/objects/key", folder / "train/good/000.png")
    for check in ("full", "quick"):
        with pytest.raises(DatasetProblemsError, match=r"link to a file that does not exist.*git annex get, dvc pull"):
            open_category(tmp_path, check=check)
    shutil.rmtree(folder)
    (tmp_path / "train.dvc").write_text("outs:\n")
    with pytest.raises(DataError, match=r"There is train.dvc: fetch the data \(dvc pull\)"):
        open_category(tmp_path)


def test_masks_by_another_ending(tmp_path):
    folder = make_mvtec(tmp_path)
    for mask in (folder / "ground_truth").rglob("*.png"):
        mask.rename(mask.with_name(mask.name.replace("_mask", "_label")))
    with pytest.raises(DatasetProblemsError) as caught:
        open_category(tmp_path)
    assert len(caught.value.problems) == 2  # one per type
    assert all("--mask-suffix _label" in problem for problem in caught.value.problems)
    category, said = opened(tmp_path, files=FileOptions(mask_suffix="_label"))
    assert (category.has_masks, said) == (True, [])


def test_twelve_bits_are_found_and_can_be_given(tmp_path):
    folder = make_folder_dataset(tmp_path / "set")
    for path in (*(folder / "normal").iterdir(), *(folder / "anomalous").iterdir()):
        save(path, RNG.integers(0, 4096, (48, 48), dtype=np.uint16))
    for check in ("full", "quick", "none"):
        category, said = opened(folder, check=check)
        assert {sample.decoding.bit_depth for sample in (*category.train, *category.test)} == {12}
        assert any("use 12: values 0 to 4095" in sentence for sentence in said)
    category, said = opened(folder, files=FileOptions(bit_depth=16))
    assert (category.train[0].decoding.bit_depth, said) == (16, [])
    # An image beyond the depth that others have is no reason to scale all of them differently.
    bright = next((folder / "anomalous").iterdir())
    save(bright, np.full((48, 48), 60000, np.uint16))
    with pytest.raises(DatasetProblemsError, match="holds the value 60000, but images of 12 bits end at 4095"):
        open_category(folder)


def test_eight_bits_and_all_of_sixteen_have_no_note(tmp_path):
    folder = make_folder_dataset(tmp_path / "set")
    category, said = opened(folder)
    assert (category.train[0].decoding.bit_depth, said) == (None, [])
    for path in (folder / "normal").iterdir():
        save(path, RNG.integers(0, 65536, (48, 48), dtype=np.uint16))
    category, said = opened(folder)
    assert (category.train[0].decoding.bit_depth, said) == (16, [])


def test_unusual_masks_are_noted(tmp_path):
    folder = make_mvtec(tmp_path, types=("crack", "stain", "all"), per_type=3, size=64)
    soft = sorted((folder / "ground_truth/crack").iterdir())
    for path in soft:
        Image.open(path).filter(ImageFilter.GaussianBlur(1)).save(path)
    inverted = sorted((folder / "ground_truth/stain").iterdir())[:2]
    for path in inverted:
        save(path, 255 - np.asarray(Image.open(path)))
    whole = sorted((folder / "ground_truth/all").iterdir())[0]
    save(whole, np.full((64, 64), 255, np.uint8))
    _, said = opened(tmp_path)
    assert len(said) == 3
    assert f"more than two values in 3 of 9 masks (such as {soft[0]}: 0, " in said[0]
    assert "127 of 255" in said[0]
    assert f"the whole image is marked in 1 of 3 masks of type all (such as {whole}: 100%)" in said[1]
    assert f"inverted, it seems: 2 of 3 masks of type stain (such as {inverted[0]}: " in said[2]
