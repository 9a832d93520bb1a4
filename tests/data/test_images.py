from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbgad.data import image_size, read_image, read_mask, resize_image, resize_mask
from fastbgad.data.foreground import foreground_mask, otsu_threshold
from fastbgad.errors import DataError
from tests.make_data import save, stored_as

RNG_SEED = 3
TALL = (40, 24)  # height, width: not square, so that exchanged axes are noticed


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(RNG_SEED).integers(0, 256, (*TALL, 3), dtype=np.uint8)


@pytest.fixture
def gray() -> np.ndarray:
    return np.random.default_rng(RNG_SEED).integers(0, 256, TALL, dtype=np.uint8)


def refuses(read, path: Path, *words: str) -> None:
    """`read(path)` raises a DataError that names the file and every word."""
    with pytest.raises(DataError, match=re.escape(str(path))) as caught:
        read(path)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp"])
def test_rgb_is_read_exactly(tmp_path, rgb, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(rgb).save(path, lossless=True)
    np.testing.assert_array_equal(read_image(path), rgb)
    assert image_size(path) == TALL


def test_greyscale_is_repeated(tmp_path, gray):
    image = read_image(save(tmp_path / "a.png", gray))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, np.stack([gray] * 3, axis=2))


def test_alpha_is_dropped_and_colours_are_kept(tmp_path, rgb, gray):
    alpha = np.concatenate([rgb, gray[:, :, None]], axis=2)
    alpha[:5, :, 3] = 0
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", alpha)), rgb)


def test_palette_is_looked_up(tmp_path, gray):
    indexed = Image.fromarray(gray % 4, mode="P")
    colors = np.array([[10, 20, 30], [200, 0, 0], [0, 150, 7], [1, 2, 255]], np.uint8)
    indexed.putpalette(colors.ravel().tolist())
    indexed.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colors[gray % 4])


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, gray, name):
    image = read_image(save(tmp_path / name, gray.astype(np.uint16) * 257))
    np.testing.assert_array_equal(image[:, :, 0], gray)


def test_32_bit_integers_are_scaled_like_16_bits(tmp_path, gray):
    path = save(tmp_path / "a.tif", gray.astype(np.int32) * 257)
    np.testing.assert_array_equal(read_image(path)[:, :, 1], gray)
    refuses(read_image, save(tmp_path / "b.tif", gray.astype(np.int32) * 257 + 70000), "outside 0..65535")
    refuses(read_image, save(tmp_path / "c.tif", gray.astype(np.int32) - 300), "outside 0..65535")


def test_floats_must_lie_in_the_unit_interval(tmp_path, gray):
    path = save(tmp_path / "a.tif", (gray / 255).astype(np.float32))
    np.testing.assert_array_equal(read_image(path)[:, :, 2], gray)
    refuses(read_image, save(tmp_path / "b.tif", gray.astype(np.float32)), "outside 0..1")
    broken = (gray / 255).astype(np.float32)
    broken[0, 0] = np.nan
    refuses(read_image, save(tmp_path / "c.tif", broken), "nan")


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    # The upper left quarter of the upright scene is white; each orientation tag undoes one stored arrangement.
    upright = np.zeros((32, 16, 3), np.uint8)
    upright[:16, :8] = 255
    stored = stored_as(upright, orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, quality=95)
    image = read_image(path)
    assert image.shape == upright.shape
    np.testing.assert_array_equal(image > 127, upright > 127)
    assert image_size(path) == (32, 16)


@pytest.mark.parametrize("read", [read_image, read_mask, image_size])
def test_missing_and_empty_files_are_named(tmp_path, read):
    refuses(read, tmp_path / "gone.png", "does not exist", "check the path")
    (tmp_path / "empty.png").touch()
    refuses(read, tmp_path / "empty.png", "0 bytes", "copy it again")
    (tmp_path / "text.png").write_text("not an image at all")
    refuses(read, tmp_path / "text.png", "not an image")
    (tmp_path / "folder.png").mkdir()
    refuses(read, tmp_path / "folder.png", "check the path")
    (tmp_path / "link.png").symlink_to(tmp_path / "annex" / "key")
    refuses(read, tmp_path / "link.png", "a link to a file that does not exist", "git annex get")
    (tmp_path / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refuses(read, tmp_path / "lfs.png", "pointer of Git LFS", "git lfs pull")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
def test_truncated_files_are_named(tmp_path, rgb, suffix):
    path = save(tmp_path / f"a{suffix}", np.tile(rgb, (4, 4, 1)))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    refuses(read_image, path, "export it again")


def test_flipped_bytes_in_a_png_are_noticed(tmp_path, rgb):
    path = save(tmp_path / "a.png", rgb)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    refuses(read_image, path, "damaged")


def test_decompression_bomb_is_refused(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )
    refuses(read_image, path, "too large")
    refuses(image_size, path, "too large")


def test_resized_images_are_antialiased_and_masks_stay_binary(rgb, gray):
    stripes = np.zeros((60, 60, 3), np.uint8)
    stripes[::3] = 255
    # Without antialiasing a reduction by 3 reads the middle one of every three rows, which is black.
    assert np.abs(resize_image(stripes, (20, 20))[2:-2].astype(int) - 85).max() < 20
    assert resize_image(rgb, (33, 50)).shape == (33, 50, 3)
    assert resize_image(rgb, TALL) is rgb
    mask = resize_mask(gray > 100, (31, 57))
    assert mask.shape == (31, 57)
    assert mask.dtype == bool
    doubled = resize_mask(gray > 100, (80, 48))
    np.testing.assert_array_equal(doubled, np.kron(gray > 100, np.ones((2, 2), bool)))
    np.testing.assert_array_equal(resize_mask(doubled.repeat(3, 0), TALL), gray > 100)
    single = np.zeros((9, 9), bool)
    single[4, 4] = True  # the middle of its 3 x 3 neighbors, so the nearest pixel keeps it and a mean would not
    np.testing.assert_array_equal(resize_mask(single, (3, 3)), single[1::3, 1::3])


def test_foreground_of_an_object_is_found_with_its_hole_filled():
    rng = np.random.default_rng(RNG_SEED)
    y, x = np.mgrid[:120, :160]
    disc = np.hypot(y - 60, x - 80) < 40
    ring = disc & (np.hypot(y - 60, x - 80) > 12)
    image = np.where(ring[:, :, None], np.array([120, 60, 40]), np.array([210, 215, 205]))
    image = np.clip(image + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)
    found = foreground_mask(image)
    assert found.shape == (120, 160)
    assert (found & disc).sum() / (found | disc).sum() > 0.95


def test_foreground_of_an_object_that_leaves_the_frame():
    rng = np.random.default_rng(RNG_SEED)
    image = np.full((100, 100, 3), 30)
    image[:, 35:65] = 180  # a vertical strip, as a zipper
    image = np.clip(image + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)
    found = foreground_mask(image)
    assert found[:, 38:62].all()
    assert not found[:, :30].any()
    assert not found[:, 70:].any()


@pytest.mark.parametrize("deviation", [0, 3, 12, 60])
def test_textures_are_all_foreground(deviation):
    rng = np.random.default_rng(RNG_SEED)
    image = np.clip(rng.normal(128, deviation, (96, 96, 3)), 0, 255).astype(np.uint8)
    assert foreground_mask(image).all()


@pytest.mark.parametrize("period", [20, 32])
def test_mortar_between_bricks_is_no_object(period):
    rng = np.random.default_rng(RNG_SEED)
    y, x = np.mgrid[:160, :160]
    mortar = (y % period < 4) | ((x + period * (y // period % 2)) % (2 * period) < 4)
    image = np.clip(np.where(mortar, 170, 90)[:, :, None] + rng.normal(0, 4, (160, 160, 3)), 0, 255).astype(np.uint8)
    assert foreground_mask(image).all()


def test_a_speck_is_too_small_to_be_the_foreground():
    image = np.full((100, 100, 3), 200, np.uint8)
    image[50:54, 50:54] = 0
    assert foreground_mask(image).all()


def test_otsu_threshold_separates_two_modes():
    rng = np.random.default_rng(RNG_SEED)
    values = np.concatenate([rng.normal(20, 3, 5000), rng.normal(90, 5, 2000)])
    threshold = otsu_threshold(values)
    assert 35 < threshold < 75
    # Brute force over all cuts between the values: none does better by more than the width of a bin.
    cuts = np.linspace(values.min(), values.max(), 400)[1:-1]
    within = [
        values[values <= c].var() * (values <= c).mean() + values[values > c].var() * (values > c).mean() for c in cuts
    ]
    best = values[values <= threshold].var() * (values <= threshold).mean()
    best += values[values > threshold].var() * (values > threshold).mean()
    assert best <= min(within) * (1 + 1e-3)
