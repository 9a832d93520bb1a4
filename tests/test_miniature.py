from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from fastbgad.data import open_category, split_known_anomalies
from fastbgad.data.images import read_image, read_mask
from fastbgad.evaluate.metrics import auroc
from fastbgad.experiments.plan.plan import cells_of
from fastbgad.experiments.plan.protocol import make_plan, names
from fastbgad.experiments.plan.protocol_file import dataset_facts
from tests.miniature import BTAD_SUFFIXES, GREY, MASK_FORMATS, Miniature, make_miniature, save_mask

CATEGORIES = [("mvtec", name) for name in dataset_facts("mvtec").images] + [("btad", name) for name in BTAD_SUFFIXES]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> Miniature:
    return make_miniature(tmp_path_factory.mktemp("miniature"))


@pytest.fixture(scope="module")
def opened(miniature):
    return {(dataset, name): open_category(getattr(miniature, dataset), name) for dataset, name in CATEGORIES}


def test_categories_and_types_are_the_real_ones(opened):
    for (dataset, name), category in opened.items():
        assert category.layout == dataset
        assert category.defects == dataset_facts(dataset).types(name)
        assert len(category.train) == 4


def test_formats_are_the_real_ones(opened):
    for (dataset, name), category in opened.items():
        image, mask = category.test[-1].image, next(sample.mask for sample in category.test if sample.label)
        suffixes = (".png", ".png") if dataset == "mvtec" else BTAD_SUFFIXES[name]
        assert (image.suffix, mask.suffix) == suffixes
        with Image.open(image) as opened_image:
            assert opened_image.mode == ("L" if name in GREY else "RGB")


def test_defects_can_be_seen(opened):
    for category in opened.values():
        brightness = [ndimage.uniform_filter(read_image(s.image).mean(2), 7).max() for s in category.test]
        labels = [sample.label for sample in category.test]
        assert auroc(np.array(brightness), np.array(labels)) > 0.9, category.root


def test_every_cell_has_known_and_tested_anomalies(opened):
    plans = [make_plan(name, seeds=[0, 1], num_anomalies=2) for name in names() if name != "num_anomalies"]
    for cell in cells_of(plans):
        category = opened[cell.dataset, cell.category]
        split = split_known_anomalies(category, cell.num_anomalies, seed=cell.seed, types=cell.known_types)
        tested = {s.defect for s in split.test if s.label and (not cell.test_types or s.defect in cell.test_types)}
        assert len(split.known_anomalies) == 2
        assert tested
        assert cell.known_types is None or cell.test_types == cell.known_types or not tested & set(cell.known_types)


def test_the_same_arguments_give_the_same_pixels(miniature, tmp_path):
    again = make_miniature(tmp_path)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert len(files) > 400
    first = miniature.mvtec.parent
    assert all((tmp_path / file).read_bytes() == (first / file).read_bytes() for file in files)
    assert again.btad == tmp_path / "btad"


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
@pytest.mark.parametrize("kind", MASK_FORMATS)
def test_masks_of_every_format_are_read_alike(tmp_path: Path, kind: str, suffix: str):
    mask = np.zeros((20, 33), np.uint8)
    mask[3:9, 5:30] = 1
    save_mask(tmp_path / f"mask{suffix}", mask, kind)
    with Image.open(tmp_path / f"mask{suffix}") as image:
        assert image.mode == kind.split()[0]
    np.testing.assert_array_equal(read_mask(tmp_path / f"mask{suffix}"), mask > 0)
