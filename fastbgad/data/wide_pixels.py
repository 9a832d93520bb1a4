"""Pixels of more than 8 bits: decoded with all their bits, and brought to 8 by the depth that the camera used.

pillow keeps only the upper 8 bits of 16-bit color, and mistakes the order of planes and a scale on which white is 0.
torchvision decodes such PNG files, tifffile such TIFF files. A camera of 10, 12 or 14 bits writes files of 16 whose
upper bits are 0: the file does not say so, the values of a whole dataset do (`significant_bits`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..errors import ConfigError, DataError
from .image_file import orientation_of, turned_upright

DEPTHS = (8, 10, 12, 14, 16)
"""Significant bits that are told apart in files of 16."""

SIXTEEN_BIT_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})

_PNG_HEADER = 26  # bytes up to the bit depth and the color type
_BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR = 258, 262, 277, 284  # tags of a TIFF file
_WHITE_IS_ZERO, _RGB, _SEPARATE = 0, 2, 2
# A 16-bit image whose upper bytes stay below is one of a camera of fewer bits.
_FEW_LEVELS = 64


class WidePixels(NamedTuple):
    """Pixels of a file of more than 8 bits."""

    values: NDArray[np.uint16]  # [H, W] or [H, W, 3], upright
    bits: int
    """What the values span, as the file says; fewer may be significant where it is 16 and not `scaled`."""
    scaled: bool
    """True if the decoder has brought the values to all bits."""


def read_wide_pixels(path: Path, image: Any) -> WidePixels | None:
    """Return the pixels of an image opened from `path` with all their bits; None for one of 8 bits, or of floats.

    Raises:
        DataError: values outside 0..65535, or a TIFF file that cannot be decoded without loss.
    """
    if image.format == "PNG" and image.mode != "I;16" and _is_wide_png(path):
        return WidePixels(_from_png(path, orientation_of(image)), 16, scaled=False)
    if image.format == "PPM" and (wide := _from_ppm(path, image)) is not None:
        return wide
    if image.format == "TIFF" and (wide := _from_tiff(path, image)) is not None:
        return wide
    if image.mode not in SIXTEEN_BIT_MODES:
        return None
    # pillow scales these two by the range that the file names, unless that is all of 16 bits.
    scaled = image.format == "JPEG2000" or (image.format == "PPM" and image.tile[0][0] != "raw")
    ImageOps.exif_transpose(image, in_place=True)
    return WidePixels(_checked(path, np.array(image)), 16, scaled)


def is_wide(path: Path, image: Any) -> bool:
    """Return True if an image opened from `path` has more than 8 bits, without decoding it."""
    if image.mode in SIXTEEN_BIT_MODES or (image.format == "PNG" and _is_wide_png(path)):
        return True
    if image.format == "PPM":
        options = image.tile[0][3]
        return image.mode == "RGB" and isinstance(options, tuple) and int(options[1]) > 255
    return image.format == "TIFF" and max(image.tag_v2.get(_BITS, (1,))) == 16


def has_separate_planes(image: Any) -> bool:
    """Return True for a TIFF file of more than 8 bits with a plane per channel, which pillow misreads."""
    tags = getattr(image, "tag_v2", {})
    return max(tags.get(_BITS, (1,))) > 8 and tags.get(_PLANAR) == _SEPARATE


def to_bytes(path: Path, wide: WidePixels, bit_depth: int | None) -> NDArray[np.uint8]:
    """Return pixels scaled to 0..255 by the depth that was given, or else the file's.

    Raises:
        DataError: a value beyond the depth.
    """
    depth = wide.bits if bit_depth is None or wide.scaled else min(bit_depth, wide.bits)
    limit = (1 << depth) - 1
    largest = int(wide.values.max(initial=0))
    if largest > limit:
        raise DataError(
            f"the image {path} holds the value {largest}, but images of {depth} bits end at {limit}; give the depth "
            f"of the camera (--bit-depth {significant_bits([largest])}), or export the image again"
        )
    return np.rint(wide.values * (255 / limit)).astype(np.uint8)


def check_depth_known(path: Path, wide: WidePixels) -> None:
    """Raise `DataError` for an image that does not use all bits of its file, which may be dark or of fewer bits."""
    depth = significant_bits([int(wide.values.max(initial=0))])
    if not wide.scaled and wide.bits == 16 and depth < 16:
        raise DataError(
            f"the image {path} is stored in 16 bits and uses {depth}, and the model was trained on none of 16, so that "
            f"its depth is not known: give --bit-depth {depth} for a camera of {depth} bits, or 16 for a dark image"
        )


def significant_bits(largest: Iterable[int]) -> int:
    """Return the depth, one of `DEPTHS`, that the largest values of several images need."""
    top = max(largest, default=0)
    return next(depth for depth in DEPTHS if top < 1 << depth)


def check_bit_depth(bit_depth: int | None) -> None:
    """Raise `ConfigError` for a depth that no file of 16 bits can have."""
    if bit_depth is not None and not 1 <= bit_depth <= 16:
        raise ConfigError(f"bit_depth is {bit_depth}; give the bits of the camera, 1 to 16, such as 12")


def _checked(path: Path, values: NDArray[Any]) -> NDArray[np.uint16]:
    if values.size and not (values.min() >= 0 and values.max() <= 65535):
        raise DataError(
            f"the values of the image {path} run from {values.min()} to {values.max()}, outside 0..65535; "
            "scale them and save the image as an 8-bit or 16-bit PNG"
        )
    return values.astype(np.uint16)


def _is_wide_png(path: Path) -> bool:
    with path.open("rb") as file:
        header = file.read(_PNG_HEADER)
    return len(header) == _PNG_HEADER and header[24] == 16


def _from_png(path: Path, orientation: int) -> NDArray[np.uint16]:
    from torchvision.io import ImageReadMode, decode_png, read_file

    try:
        planes = decode_png(read_file(str(path)), ImageReadMode.UNCHANGED).numpy()
    except RuntimeError as error:
        raise DataError(f"the image {path} is damaged ({error}); copy or export it again, or remove it") from error
    # Gray, gray and alpha, color, color and alpha.
    pixels = planes[0] if len(planes) < 3 else planes[:3].transpose(1, 2, 0)
    return turned_upright(pixels.astype(np.uint16, copy=False), orientation)


def _from_ppm(path: Path, image: Any) -> WidePixels | None:
    """Return the pixels of a binary color file of 16 bits, None for any other."""
    decoder, _, offset, options = image.tile[0]
    if image.mode != "RGB" or decoder != "ppm" or options[1] <= 255:
        return None
    width, height = image.size
    values = np.fromfile(path, ">u2", 3 * width * height, offset=offset).reshape(height, width, 3).astype(np.uint16)
    if (largest := options[1]) == 65535:
        return WidePixels(values, 16, scaled=False)
    return WidePixels(np.rint(np.minimum(values, largest) * (65535 / largest)).astype(np.uint16), 16, scaled=True)


def _from_tiff(path: Path, image: Any) -> WidePixels | None:
    """Return the pixels of a TIFF file that pillow would not read right, None for any other."""
    tags = image.tag_v2
    bits, samples = max(tags.get(_BITS, (1,))), tags.get(_SAMPLES, 1)
    separate, photometric = tags.get(_PLANAR) == _SEPARATE, tags.get(_PHOTOMETRIC)
    if bits <= 8:
        return None
    if samples == 1 and image.mode in SIXTEEN_BIT_MODES:
        if bits == 16 and photometric != _WHITE_IS_ZERO:
            return None
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        values = _checked(path, np.array(image))
        # pillow inverts such a scale for 8 bits only.
        bits = min(bits, 16)  # integers of 32 bits are taken to span 0..65535, too
        return WidePixels(((1 << bits) - 1) - values if photometric == _WHITE_IS_ZERO else values, bits, False)
    if samples < 3 or bits != 16:
        return None
    if photometric == _RGB:
        return WidePixels(_color_tiff(path, image, separate), 16, scaled=False)
    if separate:
        raise DataError(
            f"the image {path} is a 16-bit TIFF with separate planes that are not red, green and blue; export it again "
            "as a 16-bit RGB PNG"
        )
    return None


def _color_tiff(path: Path, image: Image.Image, separate: bool) -> NDArray[np.uint16]:
    import tifffile

    orientation = orientation_of(image)
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            pixels, axes = page.asarray(), page.axes
    except Exception as error:  # tifffile raises whatever its decoders do
        if separate or not _lacks_codec(error):
            raise DataError(f"cannot decode the TIFF image {path} ({error}); export it again as PNG") from error
        # Compressed in a way that takes another package: pillow reads its upper bytes.
        pixels = np.array(image.convert("RGB")).astype(np.uint16) * 257
        if pixels.max(initial=0) < _FEW_LEVELS * 257:
            raise DataError(
                f"the image {path} is a compressed TIFF of 16 bits that uses few of them; to read it: "
                "pip install imagecodecs, or export it again without compression"
            ) from error
        return pixels  # pillow has turned it already
    if axes.startswith("S"):
        pixels = np.moveaxis(pixels, 0, -1)
    return turned_upright(pixels[..., :3].astype(np.uint16), orientation)


def _lacks_codec(error: BaseException) -> bool:
    return "imagecodecs" in str(error)
