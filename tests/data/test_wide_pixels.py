"""Files of more than 8 bits: every form is read with all its bits."""

from __future__ import annotations

import struct
import sys
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from fastbgad.data.images import image_size, largest_wide_value, read_image
from fastbgad.data.wide_pixels import significant_bits
from fastbgad.errors import ConfigError, DataError
from tests.make_data import save, stored_as, write_png

TALL = (40, 24)


@pytest.fixture
def color() -> np.ndarray:
    """uint16 [40, 24, 3], different in every channel, up to the largest value."""
    pixels = np.random.default_rng(1).integers(0, 65536, (*TALL, 3), dtype=np.uint16)
    pixels[0, 0] = 65535, 0, 65535
    return pixels


def eight_bits(values: np.ndarray, limit: int = 65535) -> np.ndarray:
    return np.rint(values.astype(np.float64) * 255 / limit).astype(np.uint8)


COLOR_FILES = {
    "rgb.png": lambda path, rgb: write_png(path, rgb, 2),
    "rgba.png": lambda path, rgb: write_png(path, np.dstack([rgb, rgb[..., :1]]), 6),
    "contiguous.tif": lambda path, rgb: tifffile.imwrite(path, rgb, photometric="rgb"),
    "planar.tif": lambda path, rgb: tifffile.imwrite(
        path, np.moveaxis(rgb, 2, 0), photometric="rgb", planarconfig="separate"
    ),
    "big-endian.tif": lambda path, rgb: tifffile.imwrite(path, rgb.astype(">u2"), photometric="rgb", byteorder=">"),
    "deflate.tif": lambda path, rgb: tifffile.imwrite(path, rgb, photometric="rgb", compression="zlib"),
    "alpha.tif": lambda path, rgb: tifffile.imwrite(
        path, np.dstack([rgb, rgb[..., :1]]), photometric="rgb", extrasamples=["unassalpha"]
    ),
    "big.tif": lambda path, rgb: tifffile.imwrite(path, rgb, photometric="rgb", bigtiff=True),
    "pages.tif": lambda path, rgb: tifffile.imwrite(path, np.stack([rgb, rgb // 2]), photometric="rgb"),
    "color.ppm": lambda path, rgb: path.write_bytes(b"P6\n# made here\n24 40\n65535\n" + rgb.astype(">u2").tobytes()),
}
GRAY_FILES = {
    "gray.png": lambda path, gray: save(path, gray),
    "gray-alpha.png": lambda path, gray: write_png(path, np.dstack([gray, gray // 3]), 4),
    "gray.tif": lambda path, gray: tifffile.imwrite(path, gray),
    "white-is-zero.tif": lambda path, gray: tifffile.imwrite(path, 65535 - gray, photometric="miniswhite"),
    "stack.tif": lambda path, gray: tifffile.imwrite(path, np.stack([gray, gray // 2]), imagej=True),
    "gray.pgm": lambda path, gray: path.write_bytes(b"P5 24 40 65535\n" + gray.astype(">u2").tobytes()),
}


@pytest.mark.parametrize("name", COLOR_FILES)
def test_color(tmp_path, color, name):
    COLOR_FILES[name](tmp_path / name, color)
    np.testing.assert_array_equal(read_image(tmp_path / name), eight_bits(color))
    assert image_size(tmp_path / name) == TALL
    assert largest_wide_value(tmp_path / name) == 65535
    few = color >> 4
    COLOR_FILES[name](tmp_path / name, few)
    np.testing.assert_array_equal(read_image(tmp_path / name, 12), eight_bits(few, 4095))


@pytest.mark.parametrize("name", GRAY_FILES)
def test_gray(tmp_path, color, name):
    gray = np.ascontiguousarray(color[..., 0])
    GRAY_FILES[name](tmp_path / name, gray)
    np.testing.assert_array_equal(read_image(tmp_path / name), np.repeat(eight_bits(gray)[..., None], 3, axis=2))
    if name != "white-is-zero.tif":
        few = gray >> 6
        GRAY_FILES[name](tmp_path / name, few)
        np.testing.assert_array_equal(read_image(tmp_path / name, 10)[..., 1], eight_bits(few, 1023))
        assert largest_wide_value(tmp_path / name) == few.max()


def test_values_beyond_the_depth_are_refused(tmp_path, color):
    path = write_png(tmp_path / "a.png", color >> 2, 2)
    with pytest.raises(DataError, match=r"a.png holds the value 16383, but .* 12 bits end at 4095.*--bit-depth 14"):
        read_image(path, 12)
    for depth in (0, 17, -3):
        with pytest.raises(ConfigError, match="1 to 16"):
            read_image(path, depth)


def test_files_that_name_their_range_need_no_depth(tmp_path, color):
    """12 bits, of which the file tells."""
    gray = color[..., 0] >> 4
    (tmp_path / "a.pgm").write_bytes(b"P5 24 40 4095\n" + gray.astype(">u2").tobytes())
    (tmp_path / "b.ppm").write_bytes(b"P6 24 40 4095\n" + (color >> 4).astype(">u2").tobytes())
    for depth in (None, 10, 12):
        assert np.abs(read_image(tmp_path / "a.pgm", depth)[..., 0] - gray * (255 / 4095)).max() <= 0.51
        assert np.abs(read_image(tmp_path / "b.ppm", depth) - (color >> 4) * (255 / 4095)).max() <= 0.51
    assert largest_wide_value(tmp_path / "a.pgm") is None
    assert largest_wide_value(save(tmp_path / "c.png", color[..., 0].astype(np.uint8))) is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_wide_color(tmp_path, orientation):
    upright = np.zeros((32, 16, 3), np.uint16)
    upright[:16, :8] = 65535
    stored = stored_as(upright, orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(content)) + b"eXIf" + content + struct.pack(">I", zlib.crc32(b"eXIf" + content))
    path = write_png(tmp_path / "a.png", stored, 2, chunk)
    np.testing.assert_array_equal(read_image(path), eight_bits(upright))
    tiff = tmp_path / "a.tif"
    tifffile.imwrite(tiff, stored, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    np.testing.assert_array_equal(read_image(tiff), eight_bits(upright))
    assert image_size(tiff) == image_size(path) == (32, 16)


def test_damaged_files_are_named(tmp_path, color):
    path = write_png(tmp_path / "a.png", color, 2)
    path.write_bytes(path.read_bytes()[:200])
    tiff = tmp_path / "a.tif"
    COLOR_FILES["planar.tif"](tiff, color)
    tiff.write_bytes(tiff.read_bytes()[:-2000])
    for broken in (path, tiff):
        with pytest.raises(DataError, match=str(broken)):
            read_image(broken)


def test_compression_that_needs_another_package(tmp_path, color, monkeypatch):
    """pillow's upper bytes are enough for 16 bits, and would be garbage for 12."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, color, photometric="rgb", compression="zlib")

    def lacks_codec(self):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", lacks_codec)
    assert np.abs(read_image(path).astype(int) - eight_bits(color)).max() <= 1
    tifffile.imwrite(path, color >> 4, photometric="rgb", compression="zlib")
    with pytest.raises(DataError, match="pip install imagecodecs"):
        read_image(path)


def test_significant_bits():
    assert [significant_bits([3, top]) for top in (255, 256, 1023, 1024, 4095, 4096, 16383, 16384, 65535)] == [
        8, 10, 10, 12, 12, 14, 14, 16, 16,
    ]  # fmt: skip
    assert significant_bits([]) == 8


def test_pillow_is_not_trusted_with_planes(tmp_path, color):
    """The reason for tifffile: if pillow learns to read these, wide_pixels gets shorter."""
    path = tmp_path / "a.tif"
    COLOR_FILES["planar.tif"](path, color)
    with Image.open(path) as image:
        assert np.abs(np.array(image).astype(int) - eight_bits(color)).max() > 100
    assert "tifffile" in sys.modules
