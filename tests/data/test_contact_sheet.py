"""Contact sheets: which images are shown, what is marked, and that nothing in a data set can break one."""

from __future__ import annotations

import base64
import io
import os
import re
import sys

import numpy as np
import pytest
from PIL import Image

from fastbgad.data.contact_sheet import check_sheet_path, write_sheet
from fastbgad.data.sheet_content import SheetCategory, Strip, sheet_strips
from fastbgad.data.summary import CategorySummary, CheckedCategory
from fastbgad.errors import ConfigError, MissingDependencyError
from fastbgad.render.plots import GROUND_TRUTH_COLOR
from tests.make_data import make_mvtec, save


def sheet(root, per_type: int = 6, image_size=(256, 256), check="quick") -> SheetCategory:
    checked = CheckedCategory(root, None, image_size, check=check)
    summary = checked.summary()
    return SheetCategory(summary, sheet_strips(checked, summary, per_type))


def strips(category: SheetCategory) -> dict[str, Strip]:
    return {strip.name: strip for strip in category.strips}


@pytest.fixture
def odd(tmp_path):
    """A category with one mask of every suspicious kind, last by name."""
    folder = make_mvtec(tmp_path, normals=9, per_type=12, types=("crack",), size=100)
    masks = folder / "ground_truth/crack"
    square = np.zeros((100, 100), np.uint8)
    square[20:60, 20:60] = 255
    save(masks / "006_mask.png", square[:50])
    save(masks / "007_mask.png", np.full((100, 100), 255, np.uint8))
    save(masks / "008_mask.png", 255 - square)
    save(masks / "009_mask.png", np.zeros((100, 100), np.uint8))
    dot = np.zeros((100, 100), np.uint8)
    dot[0, 0] = 255
    save(masks / "010_mask.png", dot)
    (folder / "test/crack/011.png").write_bytes(b"no image")
    return tmp_path


def test_suspicious_ones_come_first_and_are_marked(odd):
    crack = strips(sheet(odd, per_type=8, image_size=(32, 32)))["crack"]
    marks = {picture.name: picture.marks for picture in crack.pictures}
    assert (crack.total, crack.suspicious, len(crack.pictures)) == (12, 6, 8)
    assert list(marks)[:6] == [f"{index:03d}.png" for index in range(6, 12)]
    assert marks["006.png"] == ("mask of another size",)
    assert marks["007.png"] == ("covers the whole image",)
    assert marks["008.png"] == ("looks inverted",)
    assert marks["009.png"] == ("mask is empty",)
    assert marks["010.png"] == ("vanishes at 32 x 32",)
    assert marks["011.png"] == ("cannot be read",)
    assert list(marks)[6:] == ["000.png", "005.png"]  # evenly chosen among the others
    assert [m for m in list(marks.values())[6:] if m] == []
    assert "011.png" in crack.pictures[5].error
    assert crack.pictures[5].photo is None
    assert [picture.caption for picture in crack.pictures[1:5]] == ["100 %", "84 %", "0 %", "0.01 %"]
    assert crack.counts == "12 images, 8 shown, 6 suspicious"


def test_normal_images_are_shown_evenly(odd):
    good = strips(sheet(odd, per_type=3))["good"]
    assert not good.anomalous
    assert good.total == 11
    assert [picture.name for picture in good.pictures] == ["000.png", "005.png", "001.png"]  # the last is a test image
    assert all(picture.caption == "" and picture.marks == () for picture in good.pictures)


def test_masks_are_outlined(tmp_path):
    folder = make_mvtec(tmp_path, per_type=2, types=("crack",), size=100)
    dot = np.zeros((100, 100), np.uint8)
    dot[50, 50] = 255
    save(folder / "ground_truth/crack/001_mask.png", dot)
    content = strips(sheet(tmp_path, check="none"))
    outlined = [(picture.photo == GROUND_TRUTH_COLOR).all(axis=2) for picture in content["crack"].pictures]
    assert all(painted.sum() >= 20 for painted in outlined)
    assert not outlined[1][50, 50]  # a single pixel is circled, not hidden
    assert not any((picture.photo == GROUND_TRUTH_COLOR).all(axis=2).any() for picture in content["good"].pictures)
    assert content["crack"].pictures[1].caption == "0.01 %"


def test_a_mask_of_another_size_is_marked_without_a_check(odd):
    crack = strips(sheet(odd, per_type=12, check="none"))["crack"]
    marked = {picture.name: picture.marks for picture in crack.pictures if picture.marks}
    assert marked == {"006.png": ("mask of another size",), "011.png": ("cannot be read",)}


def test_page(odd, tmp_path):
    path = tmp_path / "out" / "sheet.html"
    broken = SheetCategory(CategorySummary("<b>", "/nowhere", problems=("a <script> in it",)), ())
    write_sheet(path, "Data & more", [sheet(odd, per_type=8, image_size=(32, 32)), broken])
    page = path.read_text(encoding="utf-8")
    assert "<h1>Data &amp; more</h1>" in page
    assert "vanishes at 32 x 32" in page
    assert "covers the whole image" in page
    assert "84 %" in page
    assert "a &lt;script&gt; in it" in page
    assert "<script" not in page
    assert not re.search(r"""(?:src|href)="(?!data:|#)""", page)
    assert page.count('class="suspicious"') == 6
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(pictures) == 8 + 8 - 1
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).size == (100, 100)
    assert "prefers-color-scheme: dark" in page


def test_picture(odd, tmp_path):
    path = tmp_path / "sheet.PNG"
    content = sheet(odd, per_type=8, image_size=(32, 32))
    write_sheet(path, "Data", [content])
    one = Image.open(path)
    pixels = np.asarray(one.convert("RGB")).astype(int)
    # Enlarged, the outlines have no sharp edges.
    assert (abs(pixels - GROUND_TRUTH_COLOR).max(axis=2) < 60).sum() > 300
    assert (pixels == (0xD1, 0x37, 0x6B)).all(axis=2).sum() > 6 * 4 * 3 * 170  # a border of three pixels around six
    write_sheet(path, "Data", [content, content])
    two = Image.open(path)
    assert two.width == one.width
    assert two.height > 1.7 * one.height


def test_names_that_are_not_utf8(tmp_path):
    folder = make_mvtec(tmp_path, per_type=2, types=("crack",))
    os.rename(folder / "test/crack/000.png", os.fsencode(folder / "test/crack") + b"/\xff.png")
    os.rename(
        folder / "ground_truth/crack/000_mask.png", os.fsencode(folder / "ground_truth/crack") + b"/\xff_mask.png"
    )
    (folder / "test/crack/001.png").write_bytes(b"")
    content = sheet(tmp_path)
    write_sheet(tmp_path / "sheet.html", "Data", [content])
    write_sheet(tmp_path / "sheet.png", "Data", [content])
    assert "\\xff.png" in (tmp_path / "sheet.html").read_text(encoding="utf-8")


def test_other_suffixes_are_refused(tmp_path):
    for name in ("sheet.pdf", "sheet"):
        with pytest.raises(ConfigError, match=r"\.html or \.png"):
            check_sheet_path(tmp_path / name)


def test_a_page_needs_jinja2(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    check_sheet_path(tmp_path / "sheet.png")
    with pytest.raises(MissingDependencyError, match="jinja2"):
        check_sheet_path(tmp_path / "sheet.html")
