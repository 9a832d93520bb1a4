from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
from scipy import ndimage

from fastbgad.data import (
    AnomalySynthesis,
    AugmentedAnomalies,
    DecodedImages,
    load_sample,
    open_category,
    rand_augment_cut_paste,
    split_known_anomalies,
    synthesis,
)
from fastbgad.errors import ConfigError, DataError
from tests.make_data import make_mvtec, save


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def scene():
    """A flat normal image, an anomalous one whose region is far brighter, and its mask of one L-shaped region."""
    normal = torch.full((3, 64, 80), 60, dtype=torch.uint8)
    mask = torch.zeros(64, 80, dtype=torch.bool)
    mask[10:26, 12:18] = True
    mask[20:26, 12:30] = True
    anomalous = torch.full((3, 64, 80), 100, dtype=torch.uint8)
    anomalous[:, mask] = torch.randint(190, 230, (3, int(mask.sum())), generator=seeded(0)).to(torch.uint8)
    return normal, anomalous, mask


def test_only_the_masked_pixels_change(scene):
    normal, anomalous, mask = scene
    before = [t.clone() for t in scene]
    for seed in range(20):
        image, pasted = rand_augment_cut_paste(normal, anomalous, mask, None, seeded(seed))
        assert (image.shape, image.dtype) == (normal.shape, torch.uint8)
        assert (pasted.shape, pasted.dtype) == (mask.shape, torch.bool)
        assert pasted.any()
        assert torch.equal(image[:, ~pasted], normal[:, ~pasted])
        changed = (image != normal).any(0)
        assert changed[pasted].float().mean() > 0.9
    assert all(torch.equal(a, b) for a, b in zip(scene, before, strict=True))


def test_without_transforms_the_region_is_moved_as_it_is(scene):
    normal, anomalous, mask = scene
    image, pasted = rand_augment_cut_paste(normal, anomalous, mask, None, seeded(1), transforms=0)
    assert pasted.sum() == mask.sum()
    assert torch.equal(image[:, pasted], anomalous[:, mask])
    assert not torch.equal(pasted, mask)


def test_one_connected_region_is_pasted(scene):
    normal, anomalous, _ = scene
    mask = torch.zeros(64, 80, dtype=torch.bool)
    mask[5:10, 5:10] = mask[10:14, 10:14] = True  # one region: they touch at a corner
    mask[40:43, 50:60] = True
    sizes = set()
    for seed in range(30):
        _, pasted = rand_augment_cut_paste(normal, anomalous, mask, None, seeded(seed), transforms=0)
        sizes.add(int(pasted.sum()))
    assert sizes == {25 + 16, 30}


def test_a_region_inside_the_bounding_box_of_another_stays_behind(scene):
    normal, anomalous, mask = scene
    mask = mask.clone()
    mask[12:15, 22:25] = True  # in the inner corner of the L
    sizes = set()
    for seed in range(20):
        _, pasted = rand_augment_cut_paste(normal, anomalous, mask, None, seeded(seed), transforms=0)
        sizes.add(int(pasted.sum()))
    assert sizes == {9, int(mask.sum()) - 9}


def test_the_generator_decides_every_bit_and_nothing_else_is_disturbed(scene):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first = [rand_augment_cut_paste(*scene, None, seeded(seed)) for seed in range(12)]
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    torch.manual_seed(99)
    second = [rand_augment_cut_paste(*scene, None, seeded(seed)) for seed in range(12)]
    for (image, mask), (image_again, mask_again) in zip(first, second, strict=True):
        assert torch.equal(image, image_again)
        assert torch.equal(mask, mask_again)
    assert len({image.numpy().tobytes() for image, _ in first}) == 12


def test_the_centre_lies_in_the_foreground(scene):
    normal, anomalous, mask = scene
    foreground = torch.zeros_like(mask)
    foreground[25:40, 30:50] = True
    centres = set()
    for seed in range(20):
        _, pasted = rand_augment_cut_paste(normal, anomalous, mask, foreground, seeded(seed))
        rows, columns = ndimage.find_objects(pasted.numpy().astype(int))[0]
        center = (rows.start + (rows.stop - rows.start) // 2, columns.start + (columns.stop - columns.start) // 2)
        assert foreground[center]
        centres.add(center)
    assert len(centres) > 12


def test_every_place_of_the_foreground_is_possible():
    normal, anomalous = torch.zeros(3, 6, 6, dtype=torch.uint8), torch.full((3, 6, 6), 255, dtype=torch.uint8)
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[2, 3] = True
    places = set()
    for seed in range(400):
        _, pasted = rand_augment_cut_paste(normal, anomalous, mask, None, seeded(seed), transforms=0)
        places.add(tuple(pasted.nonzero()[0].tolist()))
    assert len(places) == 36


@pytest.mark.parametrize("transform", synthesis._TRANSFORMS, ids=lambda t: t.__name__)
def test_each_transform_keeps_image_and_mask_together(transform, monkeypatch, scene):
    normal, anomalous, mask = scene
    monkeypatch.setattr(synthesis, "_TRANSFORMS", (transform,))
    results = [rand_augment_cut_paste(normal, anomalous, mask, None, seeded(seed), 1) for seed in range(8)]
    plain = [rand_augment_cut_paste(normal, anomalous, mask, None, seeded(seed), 0) for seed in range(8)]
    for image, pasted in results:
        # Region 190..230, its surroundings 100: had the mask lost its region, most pasted pixels would be dark.
        assert (image[:, pasted].float().mean(0) > 125).float().mean() > 0.8
        assert 0.3 * mask.sum() < pasted.sum() < 2.2 * mask.sum()
    signatures = [(int(m.sum()), sorted(i[:, m].flatten().tolist()), m.nonzero().tolist()) for i, m in results]
    assert signatures != [(int(m.sum()), sorted(i[:, m].flatten().tolist()), m.nonzero().tolist()) for i, m in plain]


@pytest.mark.parametrize("transform", synthesis._TRANSFORMS, ids=lambda t: t.__name__)
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (33, 2), (64, 80)])
def test_each_transform_takes_regions_of_any_size(transform, shape, monkeypatch, scene):
    normal, anomalous, _ = scene
    mask = torch.zeros(64, 80, dtype=torch.bool)
    mask[: shape[0], -shape[1] :] = True
    monkeypatch.setattr(synthesis, "_TRANSFORMS", (transform,))
    for seed in range(4):
        image, pasted = rand_augment_cut_paste(normal, anomalous, mask, None, seeded(seed), 1)
        assert image.shape == normal.shape
        assert pasted.any()


def test_a_foreground_without_room_is_ignored_rather_than_failing(scene):
    normal, anomalous, mask = scene
    foreground = torch.zeros_like(mask)
    foreground[0, 0] = True  # no region of this size can be centred there
    _, pasted = rand_augment_cut_paste(normal, anomalous, mask, foreground, seeded(0))
    assert pasted.sum() == mask.sum()


def test_unfit_arguments(scene):
    normal, anomalous, mask = scene
    with pytest.raises(DataError, match="marks no pixel"):
        rand_augment_cut_paste(normal, anomalous, torch.zeros_like(mask), None, seeded(0))
    with pytest.raises(DataError, match="different sizes"):
        rand_augment_cut_paste(normal[:, 1:], anomalous, mask, None, seeded(0))
    with pytest.raises(DataError, match="different sizes"):
        rand_augment_cut_paste(normal, anomalous, mask[1:], None, seeded(0))


@pytest.mark.parametrize(
    "arguments", [{"repeat": -1}, {"cut_paste": -1}, {"repeat": 0, "cut_paste": 0}, {"transforms": 11}]
)
def test_impossible_recipes(arguments):
    with pytest.raises(ConfigError):
        AnomalySynthesis(**arguments)


@pytest.fixture
def split(tmp_path):
    make_mvtec(tmp_path)
    return split_known_anomalies(open_category(tmp_path), 2)


def test_plan_of_an_epoch(split):
    plan = AugmentedAnomalies(split.known_anomalies, split.normals, AnomalySynthesis(2, 3), 32)
    assert len(plan) == 10
    assert [plan.is_synthetic(i) for i in range(10)] == [False, False, True, True, True] * 2
    assert [plan.source(i) for i in range(10)] == [split.known_anomalies[0]] * 5 + [split.known_anomalies[1]] * 5
    for index in (-1, 10):
        with pytest.raises(IndexError):
            plan.get(0, index)


def test_real_items_are_the_unaugmented_images(split):
    plan = AugmentedAnomalies(split.known_anomalies, split.normals, AnomalySynthesis(), 32)
    expected = load_sample(split.known_anomalies[1], (32, 32))
    for epoch, index in [(0, 10), (3, 14)]:
        item = plan.get(epoch, index)
        assert torch.equal(item.image, expected.image)
        assert torch.equal(item.mask, expected.mask)
        item.image.zero_()  # the plan keeps its own copy
    assert torch.equal(plan.get(0, 10).image, expected.image)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_items_depend_on_seed_epoch_and_index_alone(split, cache_bytes):
    def make(seed: int) -> AugmentedAnomalies:
        decoded = DecodedImages((32, 32), cache_bytes)
        return AugmentedAnomalies(split.known_anomalies, split.normals, AnomalySynthesis(), 32, seed, decoded)

    def content(plan: AugmentedAnomalies, epoch: int, index: int) -> bytes:
        item = plan.get(epoch, index)
        assert item.mask.any()
        return item.image.numpy().tobytes() + item.mask.numpy().tobytes()

    keys = [(epoch, index) for epoch in range(3) for index in range(20) if make(0).is_synthetic(index)]
    plan, again = make(0), make(0)
    first = {key: content(plan, *key) for key in keys}
    assert {key: content(again, *key) for key in reversed(keys)} == first
    assert len(set(first.values())) == len(keys)
    assert content(make(1), *keys[0]) != first[keys[0]]


def test_synthetic_items_are_pasted_onto_the_object(tmp_path):
    folder = make_mvtec(tmp_path, normals=1)
    y, x = np.mgrid[:48, :48]
    disc = np.hypot(y - 24, x - 24) < 12
    save(folder / "train/good/000.png", np.where(disc, 40, 220).astype(np.uint8))
    split = split_known_anomalies(open_category(tmp_path), 2)

    def centres(in_foreground: bool) -> list[bool]:
        recipe = AnomalySynthesis(repeat=0, cut_paste=10, in_foreground=in_foreground)
        plan = AugmentedAnomalies(split.known_anomalies, split.normals, recipe, 48)
        found = []
        for index in range(len(plan)):
            rows, columns = ndimage.find_objects(plan.get(0, index).mask.numpy().astype(int))[0]
            found.append(
                bool(np.hypot((rows.start + rows.stop) / 2 - 24, (columns.start + columns.stop) / 2 - 24) < 15)
            )
        return found

    assert all(centres(True))
    assert not all(centres(False))


def test_a_vanishing_anomaly_is_an_error(tmp_path):
    folder = make_mvtec(tmp_path)
    mask = np.zeros((48, 48), np.uint8)
    mask[0, 0] = 255
    for path in (folder / "ground_truth").rglob("*.png"):
        save(path, mask)
    split = split_known_anomalies(open_category(tmp_path), 2)
    plan = AugmentedAnomalies(split.known_anomalies, split.normals, AnomalySynthesis(), 8)
    with pytest.raises(DataError, match=re.escape(str(split.known_anomalies[0].image)) + ".*larger image size"):
        plan.get(0, 9)


def test_plans_without_images(split):
    assert len(AugmentedAnomalies((), split.normals, AnomalySynthesis(), 32)) == 0
    with pytest.raises(DataError, match="no normal images"):
        AugmentedAnomalies(split.known_anomalies, (), AnomalySynthesis(), 32)
    assert len(AugmentedAnomalies(split.known_anomalies, (), AnomalySynthesis(4, 0), 32)) == 8
