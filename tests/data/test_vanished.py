"""Masks that vanish at a model's image size, against `resize_mask` itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbgad.data import Sample, resize_mask
from fastbgad.data.vanished import VanishedMasks, vanished_masks
from fastbgad.errors import DataError


def mask_of(height: int, width: int, *box: int) -> np.ndarray:
    """Return a mask with one rectangle: top, left, height, width."""
    mask = np.zeros((height, width), dtype=bool)
    top, left, tall, wide = box
    mask[top : top + tall, left : left + wide] = True
    return mask


def test_masks_vanish_where_resize_mask_leaves_no_pixel() -> None:
    rng = np.random.default_rng(0)
    outcomes = []
    for _ in range(300):
        height, width, *size = map(int, rng.integers(20, 300, 4))
        box = (*rng.integers(0, (height, width)), *rng.integers(1, 5, 2))
        mask = mask_of(height, width, *map(int, box))
        counts = VanishedMasks((size[0], size[1]))
        outcomes.append(counts.add("crack", mask))
        assert outcomes[-1] == (not resize_mask(mask, (size[0], size[1])).any())
        if outcomes[-1] and (proposed := counts.smallest_size()) is not None:
            assert resize_mask(mask, proposed).any()
            assert all(n % 32 == 0 and size[axis] <= n <= mask.shape[axis] for axis, n in enumerate(proposed))
    assert 30 < sum(outcomes) < 270


def test_the_proposed_size_is_the_smallest_that_keeps_all() -> None:
    masks = [mask_of(480, 480, 101 + 10 * n, 203, 2, 3) for n in range(4)] + [mask_of(480, 480, 7, 7, 200, 200)]
    counts = VanishedMasks((96, 96))
    assert [counts.add("crack", mask) for mask in masks] == [True, True, True, True, False]
    proposed = counts.smallest_size()
    assert proposed == next((n, n) for n in range(128, 481, 32) if all(resize_mask(m, (n, n)).any() for m in masks))
    assert proposed is not None
    assert not VanishedMasks(proposed).add("crack", masks[0])


def test_the_proposed_size_keeps_the_aspect() -> None:
    counts = VanishedMasks((64, 96))
    assert counts.add("crack", mask_of(640, 960, 3, 4, 1, 1))
    assert counts.smallest_size() in [(32 * n, 32 * ((3 * n + 1) // 2)) for n in range(3, 21)]


def test_counts_by_type_and_sentences() -> None:
    counts = VanishedMasks((32, 32))
    assert (counts.sentence(), counts.smallest_size()) == ("", (32, 32))
    gone, kept = mask_of(320, 320, 1, 1, 2, 2), mask_of(320, 320, 0, 0, 100, 100)
    for defect, mask in (("stain", gone), ("crack", kept), ("crack", gone), ("dent", kept), ("crack", gone)):
        counts.add(defect, mask)
    assert counts.by_type == {"crack": (2, 3), "stain": (1, 1)}
    assert counts.total == (3, 5)
    assert counts.sentence() == "2 of 3 masks of crack, 1 of 1 mask of stain vanish at 32 x 32 pixels"
    size = counts.smallest_size()
    assert size is not None
    assert counts.remedy() == f"--image-size {size[0]} {size[1]} keeps all"


def test_masks_that_no_multiple_of_32_keeps() -> None:
    counts = VanishedMasks((32, 32))
    assert counts.add("crack", mask_of(63, 63, 1, 1, 1, 1))
    assert counts.smallest_size() is None
    assert counts.remedy().startswith("no image size up to their own keeps all")


def test_masks_without_pixels_do_not_vanish() -> None:
    counts = VanishedMasks((32, 32))
    assert not counts.add("crack", np.zeros((64, 64), dtype=bool))
    assert counts.total == (0, 1)


def test_files_are_read_once_and_only_those_with_masks(tmp_path: Path) -> None:
    Image.fromarray(mask_of(320, 320, 1, 1, 2, 2).astype(np.uint8) * 255).save(tmp_path / "m.png")
    bad = Sample(Path("nowhere.png"), tmp_path / "m.png", 1, "crack")
    samples = [bad, bad._replace(mask=None), Sample(Path("nowhere.png"), None, 0, "good")]
    assert vanished_masks(samples, (32, 32)).by_type == {"crack": (1, 1)}
    read: list[Sample] = []
    counts = vanished_masks(samples, (32, 32), read=lambda s: read.append(s) or np.ones((8, 8), dtype=bool))
    assert (read, counts.by_type) == ([bad], {})
    with pytest.raises(DataError, match=r"nothing\.png"):
        vanished_masks([bad._replace(mask=tmp_path / "nothing.png")], (32, 32))
