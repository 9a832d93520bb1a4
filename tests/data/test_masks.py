"""Masks as people save them: each is read as it was meant, or refused with the reason."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageFilter
from scipy import ndimage

from fastbgad.data import read_image, read_mask
from fastbgad.data.masks import read_mask_closely
from fastbgad.errors import ConfigError, DataError
from tests.make_data import save, write_png

RNG_SEED = 3
TALL = (40, 24)  # height, width: not square, so that exchanged axes are noticed


@pytest.fixture
def gray() -> np.ndarray:
    return np.random.default_rng(RNG_SEED).integers(0, 256, TALL, dtype=np.uint8)


@pytest.fixture
def blob() -> np.ndarray:
    """A disc and a scratch two pixels wide, bool [120, 160]."""
    y, x = np.mgrid[:120, :160]
    return (np.hypot(y - 60, x - 90) < 25) | ((np.abs(y - x / 2 - 20) < 1.2) & (x < 50))


def refused(path: Path, *words: str, **options) -> None:
    with pytest.raises(DataError, match=re.escape(str(path))) as caught:
        read_mask(path, **options)
    for word in words:
        assert word in str(caught.value)


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    return float((found & truth).sum() / (found | truth).sum())


@pytest.mark.parametrize("value", [1, 128, 255])
def test_masks_of_two_values(tmp_path, gray, value):
    expected = gray > 100
    for name, pixels in {
        "L.png": expected.astype(np.uint8) * value,
        "RGB.png": np.stack([expected.astype(np.uint8) * value] * 3, axis=2),
        "16.png": expected.astype(np.uint16) * value,
        "F.tif": expected.astype(np.float32) * value,
    }.items():
        mask = read_mask(save(tmp_path / name, pixels))
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, expected)


def test_masks_of_one_bit_and_with_a_reversed_palette(tmp_path, gray):
    expected = gray > 100
    Image.fromarray(expected).save(tmp_path / "bit.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "bit.png"), expected)
    # Index 0 is white here: the colors count, not the indices.
    indexed = Image.fromarray((~expected).astype(np.uint8), mode="P")
    indexed.putpalette([255, 255, 255, 0, 0, 0])
    indexed.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "palette.png"), expected)


@pytest.mark.parametrize("value", [0, 255])
def test_masks_of_one_value(tmp_path, value):
    mask = read_mask(save(tmp_path / "a.png", np.full(TALL, value, np.uint8)))
    assert mask.shape == TALL
    assert mask.all() == mask.any() == bool(value)


# Soft edges


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_jpeg(tmp_path, blob, quality):
    path = tmp_path / "a.jpg"
    Image.fromarray((blob * 255).astype(np.uint8)).save(path, quality=quality)
    reading = read_mask_closely(path)
    assert reading.form == "soft edges"
    assert len(reading.values) > 2
    np.testing.assert_array_equal(reading.mask, np.asarray(Image.open(path)) > 127)
    assert overlap(reading.mask, blob) > 0.93
    again = save(tmp_path / "jpeg as png.png", np.asarray(Image.open(path)))
    np.testing.assert_array_equal(read_mask(again), reading.mask)


@pytest.mark.parametrize("color", [(255, 255, 255), (255, 0, 0), (250, 240, 20)])
def test_colored_jpeg(tmp_path, blob, color):
    path = tmp_path / "a.jpg"
    Image.fromarray((blob[:, :, None] * np.array(color)).astype(np.uint8)).save(path, quality=90)
    assert overlap(read_mask(path), blob) > 0.93


@pytest.mark.parametrize("size", [(80, 60), (320, 240), (333, 251)])
@pytest.mark.parametrize("kernel", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
def test_smoothly_resized(tmp_path, blob, size, kernel):
    soft = Image.fromarray((blob * 255).astype(np.uint8)).resize(size, kernel)
    mask = read_mask(save(tmp_path / "a.png", np.asarray(soft)))
    np.testing.assert_array_equal(mask, np.asarray(soft) > 127)
    assert abs(mask.mean() / blob.mean() - 1) < 0.05


def test_blurred_and_feathered(tmp_path, blob):
    soft = np.asarray(Image.fromarray((blob * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2)))
    np.testing.assert_array_equal(read_mask(save(tmp_path / "a.png", soft)), soft > 127)
    wide = soft.astype(np.uint16) * 257
    np.testing.assert_array_equal(read_mask(save(tmp_path / "b.png", wide)), soft > 127)
    floats = (soft / 255).astype(np.float32)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "c.tif", floats)), floats > 0.5)


def test_two_colors_of_which_none_is_black(tmp_path, blob):
    """As matplotlib saves a mask with its usual colors, and video range."""
    colors = np.where(blob[:, :, None], [0xFD, 0xE7, 0x25], [0x44, 0x01, 0x54]).astype(np.uint8)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "a.png", colors)), blob)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "b.png", np.where(blob, 235, 16).astype(np.uint8))), blob)


def test_the_threshold_is_a_share_of_the_full_range(tmp_path):
    ramp = np.zeros((4, 256), np.uint8)
    ramp[1:3] = np.arange(256)
    path = save(tmp_path / "a.png", ramp)
    for threshold in (0, 0.1, 0.5, 0.9):
        reading = read_mask_closely(path, threshold)
        assert reading.form == "threshold"
        np.testing.assert_array_equal(reading.mask, ramp > threshold * 255)
    for threshold in (-0.1, 1.0, 127):
        with pytest.raises(ConfigError, match=r"0 <= threshold < 1"):
            read_mask(path, threshold)


# Files that are no masks


@pytest.mark.parametrize("values", [(0, 128, 255), (0, 85, 170, 255), (0, 1, 255), (7, 128, 255), (0, 1, 2), (1, 2, 3)])
def test_classes_are_refused(tmp_path, values):
    pixels = np.full((60, 60), values[0], np.uint8)
    for index, value in enumerate(values[1:]):
        pixels[5:50, 5 + 15 * index : 15 + 15 * index] = value
    path = save(tmp_path / "a.png", pixels)
    refused(path, f"{len(values)} different values ({', '.join(map(str, values))})", "--mask-threshold 0")
    np.testing.assert_array_equal(read_mask(path, 0), pixels > 0)


def test_classes_by_color_are_refused(tmp_path):
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[5:20], pixels[30:32], pixels[50:55] = (255, 0, 0), (0, 255, 0), (255, 255, 0)
    path = save(tmp_path / "a.png", pixels)
    refused(path, "4 different values", "#ff0000", "classes")
    np.testing.assert_array_equal(read_mask(path, 0), pixels.any(axis=2))


def test_a_photograph_is_refused(tmp_path, gray):
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).random((64, 64)), 3)
    picture = ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)
    refused(save(tmp_path / "a.png", picture), "is gray", "no mask")
    refused(save(tmp_path / "b.png", gray), "no mask")


def test_negative_and_infinite_values_are_refused(tmp_path):
    for number, value in enumerate((-1, np.nan, np.inf)):
        floats = np.zeros((8, 8), np.float32)
        floats[2, 2] = value
        refused(save(tmp_path / f"{number}.tif", floats), "run from")


# Transparency


@pytest.mark.parametrize("color", [(255, 255, 255), (0, 0, 0), (200, 30, 30)])
@pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255), None])
def test_painted_on_transparent_ground(tmp_path, blob, color, ground):
    """Editors store any color below transparent pixels."""
    pixels = np.zeros((*blob.shape, 4), np.uint8)
    pixels[..., :3] = np.where(blob[:, :, None], color, color if ground is None else ground)
    pixels[..., 3] = blob * 255
    reading = read_mask_closely(save(tmp_path / "a.png", pixels))
    assert reading.form == "alpha"
    np.testing.assert_array_equal(reading.mask, blob)


def test_alpha_with_soft_edges_is_cut_at_half(tmp_path, blob):
    soft = np.asarray(Image.fromarray((blob * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2)))
    pixels = np.full((*blob.shape, 4), 255, np.uint8)
    pixels[..., 3] = soft
    path = save(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(read_mask(path), soft > 127)
    np.testing.assert_array_equal(read_mask(path, 0.8), soft > 204)
    pixels[..., :3] = np.random.default_rng(0).integers(0, 256, (*blob.shape, 3))  # cut out of a photograph
    np.testing.assert_array_equal(read_mask(save(tmp_path / "b.png", pixels)), soft > 127)


def test_gray_and_palette_with_alpha(tmp_path, blob):
    pixels = np.stack([np.full(blob.shape, 255, np.uint8), (blob * 255).astype(np.uint8)], axis=2)
    Image.fromarray(pixels, "LA").save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), blob)
    for name, colors in (("white", [255] * 6), ("red", [0, 0, 0, 255, 0, 0])):
        indexed = Image.fromarray(blob.astype(np.uint8), mode="P")
        indexed.putpalette(colors)
        indexed.save(tmp_path / f"{name}.png", transparency=0)
        np.testing.assert_array_equal(read_mask(tmp_path / f"{name}.png"), blob)


def test_alpha_of_16_bits(tmp_path, blob):
    pixels = np.full((*blob.shape, 4), 65535, np.uint16)
    pixels[..., 3] = np.where(blob, 65535, 0)
    write_png(tmp_path / "rgba.png", pixels, 6)
    write_png(tmp_path / "ga.png", pixels[..., 2:], 4)
    tifffile.imwrite(tmp_path / "rgba.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
    for name in ("rgba.png", "ga.png", "rgba.tif"):
        reading = read_mask_closely(tmp_path / name)
        assert reading.form == "alpha"
        np.testing.assert_array_equal(reading.mask, blob)
    planes = np.moveaxis(pixels, 2, 0)
    tifffile.imwrite(tmp_path / "planes.tif", planes, photometric="rgb", planarconfig="separate", extrasamples=[2])
    refused(tmp_path / "planes.tif", "separate planes with an alpha channel")
    tifffile.imwrite(tmp_path / "color.tif", planes[:3] * blob, photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_mask(tmp_path / "color.tif"), blob)
    tifffile.imwrite(tmp_path / "white.tif", np.where(blob, 0, 65535).astype(np.uint16), photometric="miniswhite")
    np.testing.assert_array_equal(read_mask(tmp_path / "white.tif"), blob)


@pytest.mark.filterwarnings("error")
def test_palette_with_soft_alpha(tmp_path, blob):
    """As the masks of a public data set of cookies: 256 shades of transparency for one color each."""
    soft = np.asarray(Image.fromarray((blob * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2)))
    indexed = Image.fromarray(soft, mode="P")
    indexed.putpalette([200, 40, 40] * 256)
    indexed.save(tmp_path / "a.png", transparency=bytes(range(256)))
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), soft > 127)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0, 0], [200, 40, 40])


@pytest.mark.parametrize("opaque", [255, 254, 200])
def test_colors_count_where_everything_is_visible(tmp_path, blob, opaque):
    pixels = np.zeros((*blob.shape, 4), np.uint8)
    pixels[..., :3] = blob[:, :, None] * 255
    pixels[..., 3] = opaque
    reading = read_mask_closely(save(tmp_path / "a.png", pixels))
    assert reading.form == "two values"
    np.testing.assert_array_equal(reading.mask, blob)


def test_colors_and_alpha_that_disagree_are_refused(tmp_path, blob):
    pixels = np.zeros((*blob.shape, 4), np.uint8)
    pixels[..., :3] = blob[:, :, None] * 255
    pixels[..., 3] = 255
    pixels[:10, :, 3] = 0  # black and white are both visible
    refused(save(tmp_path / "a.png", pixels), "say different things", "without transparency")
    pixels[..., 3] = 0
    refused(save(tmp_path / "b.png", pixels), "say different things")
    keyed = Image.fromarray((blob * 255).astype(np.uint8))
    keyed.save(tmp_path / "c.png", transparency=255)  # the bright color is declared transparent
    refused(tmp_path / "c.png", "say different things")
    keyed.save(tmp_path / "d.png", transparency=0)
    np.testing.assert_array_equal(read_mask(tmp_path / "d.png"), blob)


def test_transparent_everywhere_marks_nothing(tmp_path):
    assert not read_mask(save(tmp_path / "a.png", np.zeros((9, 7, 4), np.uint8))).any()


# Several files


def test_a_folder_is_the_union_of_its_files(tmp_path, blob):
    left = blob.copy()
    left[:, 80:] = False
    save(tmp_path / "m" / "000.png", np.where(left, 255, 0).astype(np.uint8))
    save(tmp_path / "m" / "001.png", np.where(blob & ~left, 249, 0).astype(np.uint8))
    (tmp_path / "m" / "._001.png").write_bytes(b"\0")
    np.testing.assert_array_equal(read_mask(tmp_path / "m"), blob)
    save(tmp_path / "m" / "002.png", np.zeros((5, 5), np.uint8))
    refused(tmp_path / "m", "differ in size (5 x 5, 160 x 120)")
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "holds no image")
