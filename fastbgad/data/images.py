"""One image: read from a file, measured, resized.

Every failure is a `DataError` that names the file and says what to do about it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageOps, TiffImagePlugin
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..errors import DataError
from .image_file import as_rgb, opened, orientation_of
from .masks import read_mask as read_mask
from .masks import resize_mask as resize_mask
from .wide_pixels import check_bit_depth, check_depth_known, is_wide, read_wide_pixels, to_bytes

_WIDTH, _HEIGHT = 256, 257  # tags of a TIFF file


def read_image(
    path: str | Path, bit_depth: int | None = None, *, refuse_unknown_depth: bool = False
) -> NDArray[np.uint8]:
    """Read an image file as RGB.

    Grayscale is repeated over the three channels, a palette is looked up, and an alpha channel is dropped (the colors
    stored below it are kept, nothing is composited). Pixels of 16 bits are scaled to 0..255 from the depth that is
    given. Floating-point gray must lie in [0, 1]. The EXIF orientation is applied; of several frames the first is read.

    Args:
        path: of the file.
        bit_depth: significant bits of files of 16 (10, 12 or 14 for many cameras); None if they span 0..65535. Files of
            8 bits, and those that name their range, do not depend on it.
        refuse_unknown_depth: refuse an image of 16 bits that uses fewer if no `bit_depth` is given: whether it is dark,
            or of a camera of fewer bits, one image does not tell.

    Returns:
        uint8 [H, W, 3].

    Raises:
        DataError: the file is missing, empty, corrupt, truncated, not an image, too large to be honest (a decompression
            bomb), or holds values that cannot be mapped to 0..255, such as values beyond `bit_depth`.
        ConfigError: `bit_depth` is not between 1 and 16.
    """
    path = Path(path)
    check_bit_depth(bit_depth)
    with opened(path) as image:
        wide = read_wide_pixels(path, image)
        if wide is not None:
            if refuse_unknown_depth and bit_depth is None:
                check_depth_known(path, wide)
            return _colored(to_bytes(path, wide, bit_depth))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F":
            return _colored(_floats_to_bytes(path, np.array(image)))
        return np.array(as_rgb(image))


def largest_wide_value(path: str | Path) -> int | None:
    """Return the largest value of an image of 16 bits that may use fewer; None for any other image.

    Raises:
        DataError: as `read_image`.
    """
    path = Path(path)
    with opened(path) as image:
        wide = read_wide_pixels(path, image)
    return None if wide is None or wide.scaled or wide.bits < 16 else int(wide.values.max(initial=0))


def stored_bits(path: str | Path) -> int:
    """Return how many bits each value of an image file takes: 8, 16, or 32 for floating point; from its header.

    Raises:
        DataError: as `read_image`.
    """
    path = Path(path)
    with opened(path) as image:
        return 32 if image.mode == "F" else 16 if is_wide(path, image) else 8


def image_size(path: str | Path) -> tuple[int, int]:
    """Return (height, width) of an image as `read_image` would return it, read from the header.

    Only a PNG that is not square is decoded: its EXIF orientation may follow the pixels.
    """
    path = Path(path)
    with opened(path) as image:
        width, height = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            # Some versions of pillow have exchanged the two already.
            width, height = image.tag_v2.get(_WIDTH, width), image.tag_v2.get(_HEIGHT, height)
        if width != height and orientation_of(image) >= 5:
            width, height = height, width
        return height, width


def resize_image(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an image uint8 [H, W, 3] to `size` (height, width): bilinear with antialiasing, as torchvision does."""
    if image.shape[:2] == tuple(size):
        return image
    channels_first = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    resized = tv.resize(channels_first, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)
    return np.ascontiguousarray(resized.permute(1, 2, 0).numpy())


def _colored(gray: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(gray[:, :, None], 3, axis=2) if gray.ndim == 2 else gray


def _floats_to_bytes(path: Path, gray: NDArray[Any]) -> NDArray[np.uint8]:
    # NaN fails both comparisons, hence the form of the test.
    if not (gray.min() >= 0 and gray.max() <= 1):
        raise DataError(
            f"the values of the image {path} run from {gray.min()} to {gray.max()}, outside 0..1; "
            "scale them and save the image as an 8-bit or 16-bit PNG"
        )
    return np.rint(gray * 255).astype(np.uint8)
