from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from fastbgad.data import FolderLayout, list_categories, open_category
from fastbgad.errors import ConfigError, DataError, DatasetProblemsError, Notice
from tests.make_data import make_btad, make_folder_dataset, make_mvtec, normal_image, save


def problems_of(root, **arguments) -> tuple[str, ...]:
    with pytest.raises(DatasetProblemsError) as caught:
        open_category(root, **arguments)
    return caught.value.problems


def the_problem(root, *parts, **arguments) -> None:
    """Opening `root` reports exactly one problem, which contains all parts."""
    problems = problems_of(root, **arguments)
    assert len(problems) == 1, problems
    for part in parts:
        assert str(part) in problems[0]


def test_mvtec(tmp_path):
    folder = make_mvtec(tmp_path)
    category = open_category(tmp_path, "widget")
    assert (category.name, category.root, category.layout) == ("widget", folder, "mvtec")
    assert [s.image.name for s in category.train] == ["000.png", "001.png", "002.png", "003.png"]
    assert all(s.label == 0 and s.defect == "good" and s.mask is None for s in category.train)
    assert category.defects == ("crack", "dent")
    assert [(s.defect, s.image.name) for s in category.test] == [
        (defect, f"00{i}.png") for defect in ("crack", "dent", "good") for i in range(2)
    ]
    crack = category.test[0]
    assert crack[:4] == (folder / "test/crack/000.png", folder / "ground_truth/crack/000_mask.png", 1, "crack")


def test_a_single_category_needs_no_name(tmp_path):
    folder = make_mvtec(tmp_path)
    assert open_category(folder).name == "widget"
    assert open_category(tmp_path).train == open_category(folder, "widget").train


def test_category_names_are_listed_and_suggested(tmp_path):
    make_mvtec(tmp_path, "bottle")
    make_mvtec(tmp_path, "zipper")
    (tmp_path / "no_category").mkdir()
    assert list_categories(tmp_path) == ["bottle", "zipper"]
    with pytest.raises(DataError, match="choose one of bottle, zipper"):
        open_category(tmp_path)
    with pytest.raises(DataError, match=r"no category 'botle'; did you mean bottle\? it holds bottle, zipper"):
        open_category(tmp_path, "botle")


def test_roots_without_a_category(tmp_path):
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "gone"))):
        open_category(tmp_path / "gone")
    with pytest.raises(DataError, match=re.escape(f"no category was found in {tmp_path}")):
        open_category(tmp_path)
    assert list_categories(tmp_path) == []


def test_unknown_options(tmp_path):
    make_mvtec(tmp_path)
    with pytest.raises(ConfigError, match=r"'visa2'.*visa, "):
        open_category(tmp_path, layout="visa2")
    with pytest.raises(DataError, match=r"no category was found in .* \(layout 'visa'\)"):
        open_category(tmp_path, layout="visa")
    with pytest.raises(ConfigError, match="'fast'"):
        open_category(tmp_path, check="fast")


def test_btad(tmp_path):
    folder = make_btad(tmp_path, "03")
    category = open_category(tmp_path)
    assert (category.name, category.layout, category.defects) == ("03", "btad", ("ko",))
    assert len(category.train) == 4
    assert [s.label for s in category.test] == [0] * 4 + [1] * 3
    assert category.test[-1].mask == folder / "ground_truth/ko/0002.png"
    # Masks of BTAD's third category are bmp files.
    for mask in (folder / "ground_truth/ko").iterdir():
        Image.open(mask).save(mask.with_suffix(".bmp"))
        mask.unlink()
    assert open_category(tmp_path).test[-1].mask == folder / "ground_truth/ko/0002.bmp"


def test_plain_folder_holds_out_normals(tmp_path):
    make_folder_dataset(tmp_path / "parts", normals=10)
    category = open_category(tmp_path / "parts")
    assert (category.name, category.layout, category.defects) == ("parts", "folder", ("anomalous",))
    held_out = [s for s in category.test if s.label == 0]
    assert (len(category.train), len(held_out)) == (8, 2)
    assert not set(held_out) & set(category.train)
    assert open_category(tmp_path / "parts") == category
    other = {
        tuple(s.image.name for s in open_category(tmp_path / "parts", layout=FolderLayout(seed=seed)).train)
        for seed in range(8)
    }
    assert len(other) > 1


def test_plain_folder_with_other_names_types_and_test_normals(tmp_path):
    folder = make_folder_dataset(tmp_path / "parts")
    (folder / "normal").rename(folder / "ok")
    (folder / "anomalous").rename(folder / "scrap")
    for part in ("scrap", "masks"):
        (folder / part / "chipped").mkdir()
        shutil.move(folder / part / "bad00.png", folder / part / "chipped/bad00.png")
    (folder / "masks/bad01.png").rename(folder / "masks/bad01_mask.png")
    save(folder / "fresh/a.png", normal_image(np.random.default_rng(9)))
    layout = FolderLayout(normal="ok", anomalous="scrap", test_normal="fresh")
    category = open_category(folder, layout=layout)
    assert category.defects == ("chipped", "scrap")
    assert len(category.train) == 10
    assert [s.image.name for s in category.test if s.label == 0] == ["a.png"]
    assert {s.mask.name for s in category.test if s.mask} == {"bad00.png", "bad01_mask.png", "bad02.png"}


@pytest.mark.parametrize("arguments", [{"holdout": 0.0}, {"holdout": 1.0}, {"masks": "normal"}])
def test_impossible_folder_layouts(arguments):
    with pytest.raises(ConfigError):
        FolderLayout(**arguments)


def test_other_files_are_ignored(tmp_path):
    folder = make_mvtec(tmp_path)
    (folder / "train/good/Thumbs.db").write_text("x")
    (folder / "train/good/._000.png").write_text("x")
    (folder / "license.txt").write_text("x")
    assert len(open_category(tmp_path).train) == 4


def test_missing_mask(tmp_path):
    folder = make_mvtec(tmp_path)
    (folder / "ground_truth/dent/001_mask.png").unlink()
    the_problem(tmp_path, folder / "test/dent/001.png", "has no mask", folder / "ground_truth/dent/001_mask.png")


def test_missing_mask_folder_is_one_problem(tmp_path):
    folder = make_mvtec(tmp_path)
    shutil.rmtree(folder / "ground_truth/dent")
    the_problem(tmp_path, folder / "ground_truth/dent", "2 images")


def test_mask_without_image(tmp_path):
    folder = make_mvtec(tmp_path)
    (folder / "test/dent/001.png").unlink()
    the_problem(tmp_path, folder / "ground_truth/dent/001_mask.png", "belongs to no image")
    shutil.rmtree(folder / "test/dent")
    the_problem(tmp_path, folder / "ground_truth/dent", folder / "test/dent")


def test_two_masks_for_one_image(tmp_path):
    folder = make_mvtec(tmp_path)
    shutil.copy(folder / "ground_truth/dent/001_mask.png", folder / "ground_truth/dent/001.png")
    the_problem(tmp_path, folder / "test/dent/001.png", "2 masks")


@pytest.mark.parametrize("check", ["full", "quick"])
def test_mask_of_another_size(tmp_path, check):
    folder = make_mvtec(tmp_path)
    mask = save(folder / "ground_truth/dent/001_mask.png", np.full((48, 40), 255, np.uint8))
    the_problem(tmp_path, mask, "40 x 48", "48 x 48", check=check)


@pytest.mark.parametrize("check", ["full", "quick"])
def test_mask_without_anomaly(tmp_path, check):
    folder = make_mvtec(tmp_path)
    mask = save(folder / "ground_truth/dent/001_mask.png", np.zeros((48, 48), np.uint8))
    the_problem(tmp_path, mask, "marks no pixel", check=check)


def test_mask_with_three_values(tmp_path):
    folder = make_mvtec(tmp_path)
    values = np.tile(np.array([0, 100, 255], np.uint8), (48, 16))
    the_problem(tmp_path, save(folder / "ground_truth/dent/001_mask.png", values), "0, 100, 255")


def test_unreadable_image(tmp_path):
    folder = make_mvtec(tmp_path)
    image = folder / "train/good/002.png"
    image.write_bytes(image.read_bytes()[:3000])
    the_problem(tmp_path, image, "damaged")
    # The header is intact, so only decoding finds it.
    assert len(open_category(tmp_path, check="quick").train) == 4
    image.write_bytes(b"")
    the_problem(tmp_path, image, "0 bytes", check="quick")
    assert len(open_category(tmp_path, check="none").train) == 4


def test_folders_of_no_images(tmp_path):
    folder = make_mvtec(tmp_path)
    (folder / "test/empty").mkdir()
    the_problem(tmp_path, folder / "test/empty", "holds no images")
    (folder / "test/empty").rmdir()
    for image in (folder / "train/good").iterdir():
        image.unlink()
    the_problem(tmp_path, folder / "train/good", "holds no images", check="none")
    shutil.rmtree(folder / "train/good")
    the_problem(tmp_path, folder / "train/good", "does not exist")


def test_what_lies_beside_a_missing_folder_is_named(tmp_path):
    folder = make_mvtec(tmp_path)
    (folder / "train/good").rename(folder / "train/normal")
    save(folder / "train/loose.png", normal_image(np.random.default_rng(0)))
    the_problem(tmp_path, folder / "train/good", "in train there are: normal/, 1 image")


def test_one_normal_image(tmp_path):
    single = make_folder_dataset(tmp_path / "single", normals=1)
    the_problem(single, single / "normal", "one image")


def test_normal_images_only(tmp_path):
    folder = make_mvtec(tmp_path, types=())
    with pytest.warns(Notice, match="normal images only.*--method nfad"):
        category = open_category(tmp_path)
    assert (len(category.train), len(category.test), category.defects) == (4, 2, ())
    shutil.rmtree(folder / "test")
    shutil.rmtree(folder / "ground_truth", ignore_errors=True)
    with pytest.warns(Notice, match=r"no folder test/: 1 normal image \(20%\)"):
        category = open_category(tmp_path)
    assert (len(category.train), len(category.test)) == (3, 1)
    plain = make_folder_dataset(tmp_path / "plain", anomalies=0)
    with pytest.warns(Notice, match="normal images only"):
        assert open_category(plain).defects == ()


def test_no_masks_at_all(tmp_path):
    folder = make_mvtec(tmp_path)
    shutil.rmtree(folder / "ground_truth")
    plain = make_folder_dataset(tmp_path / "plain")
    shutil.rmtree(plain / "masks")
    for root, masks, number in ((folder, "ground_truth", 4), (plain, "masks", 3)):
        with pytest.warns(Notice, match=f"{masks} holds no masks: .*nfad.*image AUROC"):
            category = open_category(root)
        assert [sample.mask for sample in category.test if sample.label] == [None] * number
        assert not category.has_masks


def test_images_given_twice(tmp_path):
    folder = make_mvtec(tmp_path)
    first, copy = folder / "train/good/000.png", folder / "test/good/copy.png"
    shutil.copy(first, copy)
    the_problem(tmp_path, first, copy, "in training and test")
    copy.unlink()
    twin = folder / "train/good/twin.png"
    shutil.copy(first, twin)
    open_category(tmp_path)  # twins within one class do no harm
    twin.unlink()
    Image.open(folder / "test/dent/001.png").save(folder / "test/dent/001.bmp")
    the_problem(tmp_path, folder / "test/dent/001.png", folder / "test/dent/001.bmp", "same name")


def test_all_problems_are_reported_at_once(tmp_path):
    folder = make_mvtec(tmp_path, normals=30)
    (folder / "ground_truth/dent/001_mask.png").unlink()
    save(folder / "ground_truth/crack/000_mask.png", np.zeros((48, 48), np.uint8))
    save(folder / "ground_truth/crack/001_mask.png", np.full((10, 10), 255, np.uint8))
    (folder / "test/empty").mkdir()
    broken = sorted((folder / "train/good").iterdir())[:25]
    for path in broken:
        path.write_bytes(b"")
    with pytest.raises(DatasetProblemsError) as caught:
        open_category(tmp_path)
    problems = caught.value.problems
    assert len(problems) == 4 + 25
    for path in broken:
        assert sum(str(path) in problem for problem in problems) == 1
    assert str(caught.value).startswith(f"29 problems in the dataset {folder}")
    assert "and 9 more" in str(caught.value)


def test_sizes_are_read_from_every_file(tmp_path):
    folder = make_mvtec(tmp_path)
    save(folder / "train/good/wide.png", np.zeros((20, 90, 3), np.uint8))
    assert len(open_category(tmp_path).train) == 5
