"""A category in numbers: counts, coverage, forms of masks, sizes, bits, what is lost and what would be used."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastbgad.data.layouts import FileOptions
from fastbgad.data.summary import CategorySummary, CheckedCategory, coverage_text
from fastbgad.errors import ConfigError
from tests.make_data import make_folder_dataset, make_mvtec, save


def summary_of(root, num_anomalies=None, image_size=(256, 256), check="quick", files=None) -> CategorySummary:
    return CheckedCategory(root, None, image_size, check=check, files=files).summary(num_anomalies)


def square(side: int, low: int, high: int, value: int = 255) -> np.ndarray:
    mask = np.zeros((side, side), np.uint8)
    mask[low:high, low:high] = value
    return mask


def types(summary: CategorySummary) -> dict:
    return {kind.name: kind for kind in summary.types}


def test_counts_sizes_and_split(tmp_path):
    folder = make_mvtec(tmp_path, normals=5, per_type=3, test_normals=2)
    save(folder / "train/good/wide.png", np.zeros((20, 90, 3), np.uint8))
    summary = summary_of(tmp_path)
    assert (summary.name, summary.root, summary.layout, summary.title) == ("widget", str(folder), "mvtec", "MVTec AD")
    assert [(t.name, t.training, t.test) for t in summary.types] == [("good", 6, 2), ("crack", 0, 3), ("dent", 0, 3)]
    assert summary.types[0].masks is None
    assert (summary.sizes.different, summary.sizes.heights, summary.sizes.widths) == (2, (20, 48), (48, 90))
    assert (summary.sizes.most_common, summary.sizes.most_common_images) == ((48, 48), 13)
    assert summary.bits == ((8, 14),)
    assert summary.bit_depth is None
    split = summary.split
    assert (split.normals, split.known, split.tested_normal, split.tested_anomalous) == (6, 3, 2, 3)
    assert summary_of(tmp_path, num_anomalies=1).split.known == 1
    assert summary.problems == summary.notes == ()


def test_more_anomalies_than_there_are_is_a_problem(tmp_path):
    make_mvtec(tmp_path, per_type=2)
    summary = summary_of(tmp_path, num_anomalies=50)
    assert summary.split is None
    assert "num_anomalies is 50" in summary.problems[0]
    with pytest.raises(ConfigError):
        summary_of(tmp_path, num_anomalies=-1)


def test_a_single_anomaly_is_a_note(tmp_path):
    make_mvtec(tmp_path, per_type=1, types=("crack",))
    summary = summary_of(tmp_path)
    assert summary.split is None
    assert summary.problems == ()
    assert "only one anomalous image" in summary.notes[-1]


def test_forms_and_coverage_of_masks(tmp_path):
    folder = make_mvtec(tmp_path, per_type=6, types=("crack", "dent"), size=40)
    masks = folder / "ground_truth/crack"
    save(masks / "000_mask.png", np.full((40, 40), 255, np.uint8))
    save(masks / "001_mask.png", 255 - square(40, 10, 20))
    save(masks / "002_mask.png", np.zeros((40, 40), np.uint8))
    soft = square(40, 10, 30)
    soft[9, 10:30] = 80
    save(masks / "003_mask.png", soft)
    alpha = np.zeros((40, 40, 4), np.uint8)
    alpha[10:20, 10:20] = (255, 0, 0, 255)
    save(masks / "004_mask.png", alpha)
    (masks / "005_mask.png").write_bytes(b"no image")
    crack, dent = (types(summary_of(tmp_path))[name].masks for name in ("crack", "dent"))
    assert (crack.number, crack.without, crack.unreadable) == (6, 0, 1)
    assert (crack.empty, crack.whole, crack.inverted, crack.soft_edges, crack.alpha) == (1, 1, 1, 1, 1)
    assert (crack.least, crack.median, crack.most) == (0, 400 / 1600, 1)
    assert (dent.empty, dent.whole, dent.inverted, dent.soft_edges, dent.alpha, dent.unreadable) == (0,) * 6
    assert 0 < dent.least <= dent.median <= dent.most < 0.2
    assert sum("marks no pixel" in p for p in summary_of(tmp_path).problems) == 1


def test_masks_that_vanish(tmp_path):
    folder = make_mvtec(tmp_path, per_type=2, types=("crack", "dent"), size=200)
    for defect in ("crack", "dent"):
        for index in range(2):
            save(folder / f"ground_truth/{defect}/{index:03d}_mask.png", square(200, 50, 150))
    thin = np.zeros((200, 200), np.uint8)
    thin[0, 0] = 255
    save(folder / "ground_truth/dent/001_mask.png", thin)
    small = summary_of(tmp_path, image_size=(32, 32))
    assert types(small)["crack"].masks.vanished == 0
    assert types(small)["dent"].masks.vanished == 1
    assert (small.vanished.masks, small.vanished.of, small.vanished.image_size) == (1, 4, (32, 32))
    assert small.vanished.smallest_size is not None
    kept = summary_of(tmp_path, image_size=small.vanished.smallest_size)
    assert kept.vanished.masks == 0
    assert kept.vanished.smallest_size == small.vanished.smallest_size


def test_without_looking_at_files(tmp_path):
    make_mvtec(tmp_path, per_type=3)
    summary = summary_of(tmp_path, check="none")
    masks = types(summary)["crack"].masks
    assert (masks.number, masks.without, masks.least, masks.vanished, masks.unreadable) == (3, 0, None, None, None)
    assert summary.sizes is summary.vanished is None
    assert summary.bits == ()
    assert summary.split.known == 3


def test_bits_and_depth(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(5):
        save(tmp_path / f"normal/{index}.png", rng.integers(0, 4096, (30, 40)).astype(np.uint16))
    save(tmp_path / "normal/z8.png", np.zeros((30, 40), np.uint8))
    summary = summary_of(tmp_path)
    assert summary.bits == ((8, 1), (16, 5))
    assert summary.bit_depth == 12
    assert any("use 12" in note for note in summary.notes)
    assert summary_of(tmp_path, files=FileOptions(bit_depth=14)).bit_depth == 14
    split = summary.split
    assert (split.known, split.tested_anomalous, split.normals, split.tested_normal) == (0, 0, 5, 1)


def test_anomalies_without_masks(tmp_path):
    make_folder_dataset(tmp_path, anomalies=4)
    for mask in (tmp_path / "masks").iterdir():
        mask.unlink()
    (tmp_path / "masks").rmdir()
    summary = summary_of(tmp_path)
    masks = types(summary)["anomalous"].masks
    assert (masks.number, masks.without, masks.unreadable, masks.least) == (0, 4, 0, None)
    assert summary.vanished is None


def test_known_anomalies_of_the_dataset(tmp_path):
    """KolektorSDD2 has anomalous images in train/, from which known ones are drawn; the whole test set is tested."""
    for part, good, bad in (("train", 4, 3), ("test", 2, 5)):
        for index in range(good + bad):
            save(tmp_path / f"k/{part}/{index}.png", np.full((40, 40, 3), 100 + index, np.uint8))
            mask = square(40, 10, 20) if index < bad else np.zeros((40, 40), np.uint8)
            save(tmp_path / f"k/{part}/{index}_GT.png", mask)
    summary = summary_of(tmp_path)
    assert summary.layout == "kolektor2"
    anomalous = summary.types[1]
    assert (anomalous.training, anomalous.test, anomalous.masks.number) == (3, 5, 8)
    assert (summary.split.known, summary.split.tested_anomalous) == (3, 5)


def test_what_is_left_out_is_named(tmp_path):
    folder = make_mvtec(tmp_path)
    for name in ("a.cr2", "b.cr2", ".hidden.png"):
        (folder / "train/good" / name).write_bytes(b"")
    summary = summary_of(tmp_path)
    by_reason = {skipped.reason: skipped for skipped in summary.skipped}
    raw = by_reason["file with the suffix .cr2, which is not read"]
    assert raw.number == 2
    assert raw.first == (str(folder / "train/good/a.cr2"), str(folder / "train/good/b.cr2"))
    assert by_reason["file with a hidden name"].number == 1
    assert any("train/good/a.cr2, train/good/b.cr2" in sentence for sentence in summary.skipped_sentences)


def test_threshold_in_use(tmp_path):
    make_mvtec(tmp_path)
    assert summary_of(tmp_path).mask_threshold is None
    assert summary_of(tmp_path, files=FileOptions(mask_threshold=0.25)).mask_threshold == 0.25


def test_as_json(tmp_path):
    make_mvtec(tmp_path)
    facts = json.loads(json.dumps(summary_of(tmp_path).as_dict(), allow_nan=False))
    assert facts["types"][1]["masks"]["number"] == 2
    assert facts["bits"] == [{"bits": 8, "images": 10}]
    assert facts["sizes"]["most_common"] == [48, 48]
    assert "skipped_sentences" not in facts


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0"),
        (1, "100"),
        (0.9999, "100.0"),
        (0.992, "99.2"),
        (0.5, "50"),
        (0.0123, "1.2"),
        (0.00123, "0.12"),
        (1e-6, "<0.01"),
    ],
)
def test_coverage_text(share, text):
    assert coverage_text(share) == text
