from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from fastbgad.data.layouts.pairs import pair_masks
from fastbgad.data.layouts.tree import ImageFile

IMAGES, MASKS = Path("images"), Path("masks")


def pairs(images: list[str], masks: list[str], suffix: str | None = None) -> tuple[dict[str, str], list[str]]:
    found = pair_masks(
        [ImageFile(IMAGES / name, name) for name in images],
        [ImageFile(MASKS / name, name) for name in masks],
        IMAGES,
        MASKS,
        suffix,
    )
    return {key: str(path.relative_to(MASKS)) for key, path in found.masks.items()}, found.problems


@pytest.mark.parametrize("mask", ["000.png", "000_mask.png", "000_Mask.PNG", "000_MASK.bmp", "000.jpg"])
def test_usual_names(mask):
    assert pairs(["000.png"], [mask]) == ({"000": mask}, [])


def test_folders_deeper():
    assert pairs(["a/1.png", "b/1.png"], ["b/1_mask.png", "a/1.png"]) == ({"a/1": "a/1.png", "b/1": "b/1_mask.png"}, [])
    assert pairs(["a/1.png", "2.png"], ["1_mask.png", "2.png"]) == ({"a/1": "1_mask.png", "2": "2.png"}, [])
    found, problems = pairs(["a/1.png", "b/1.png"], ["1_mask.png"])
    assert found == {}
    assert len(problems) == 3  # it is not clear whose it is


def test_a_folder_of_parts():
    assert pairs(["000.png", "001.png"], ["000/000.png", "000/001.png", "001/000.png"]) == (
        {"000": "000", "001": "001"},
        [],
    )
    found, problems = pairs(["000.png"], ["000/000.png", "000_mask.png"])
    assert found == {}
    assert len(problems) == 1
    assert "images/000.png has 2 masks: masks/000_mask.png, masks/000" in problems[0]


@pytest.mark.parametrize("ending", ["-mask", "_GT", "_label", ".png_mask", "-seg"])
def test_other_endings_are_named_once_and_can_be_given(ending):
    images = [f"{index:03d}.png" for index in range(5)]
    masks = [f"{index:03d}{ending}.png" for index in range(5)]
    found, problems = pairs(images, masks)
    assert found == {}
    assert len(problems) == 1
    assert problems[0].startswith(f"5 images of images without mask: for 000.png there is masks/000{ending}.png (also ")
    assert f"rename it to 000_mask.png, or give --mask-suffix {ending}" in problems[0]
    for suffix in (ending, f"{ending}.png"):
        assert pairs(images, masks, suffix) == ({f"{index:03d}": masks[index] for index in range(5)}, [])


def test_case_and_prefixes_are_named():
    _, problems = pairs(["IMG_1.png"], ["img_1_mask.png"])
    assert len(problems) == 1
    assert "for IMG_1.png there is masks/img_1_mask.png; rename it to IMG_1_mask.png" in problems[0]
    _, problems = pairs(["1.png", "2.png"], ["mask_1.png", "mask_2.png"])
    assert len(problems) == 1
    assert "rename it to 1_mask.png" in problems[0]


def test_similar_names_are_not_confused():
    """The mask of 10 is no mask of 1 with the ending 0."""
    found, problems = pairs(["1.png", "10.png"], ["10_mask.png"])
    assert found == {"10": "10_mask.png"}
    assert problems == ["images/1.png has no mask; add masks/1_mask.png"]
    found, problems = pairs(["1.png", "2.png"], ["2_mask.png", "9_mask.png"])
    assert found == {"2": "2_mask.png"}
    assert problems == [
        "images/1.png has no mask; add masks/1_mask.png",
        "the mask masks/9_mask.png belongs to no image in images; add the image or remove the mask",
    ]


def test_letters_composed_or_not():
    nfc, nfd = (unicodedata.normalize(form, "prüf") for form in ("NFC", "NFD"))
    assert pairs([f"{nfc}.png"], [f"{nfd}_mask.png"]) == ({nfc: f"{nfd}_mask.png"}, [])
    assert pairs([f"{nfd}.png"], [f"{nfc}.png"]) == ({nfc: f"{nfc}.png"}, [])
