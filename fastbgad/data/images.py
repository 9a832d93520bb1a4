"""One image or one mask: read from a file, measured, resized.

Every failure is a `DataError` that names the file and says what to do about it.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..errors import DataError
from .files import IMAGE_SUFFIXES as IMAGE_SUFFIXES

_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 exchange height and width
_SIXTEEN_BIT_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """Read an image file as RGB.

    Grayscale is repeated over the three channels, a palette is looked up, and an alpha channel is dropped (the colors
    stored below it are kept, nothing is composited). Gray images of 16 bits, and of 32-bit integers, are taken to span
    0..65535 and are scaled to 0..255. Floating-point gray must lie in [0, 1]. Of a 16-bit RGB file pillow keeps the
    upper 8 bits. The EXIF orientation is applied; of several frames the first is read.

    Returns:
        uint8 [H, W, 3].

    Raises:
        DataError: the file is missing, empty, corrupt, truncated, not an image, too large to be honest (a decompression
            bomb), or holds values that cannot be mapped to 0..255.
    """
    path = Path(path)
    with _opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode in _SIXTEEN_BIT_MODES or image.mode == "F":
            return np.repeat(_gray_to_bytes(path, np.array(image))[:, :, None], 3, axis=2)
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def read_mask(path: str | Path) -> NDArray[np.bool_]:
    """Read a mask file of any mode: 0 (black) is normal, the one other value is anomalous.

    A mask without any anomalous pixel is returned as it is; whether that makes sense is for the caller to say.

    Returns:
        bool [H, W].

    Raises:
        DataError: the file cannot be read, or holds more than one value beside 0 (gray edges, several classes).
    """
    path = Path(path)
    with _opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        colored = image.mode not in {"1", "L", "F"} | _SIXTEEN_BIT_MODES
        if colored:
            red, green, blue = np.moveaxis(np.array(image.convert("RGB"), dtype=np.uint32), 2, 0)
            colored = not (np.array_equal(red, green) and np.array_equal(red, blue))
            values = red << 16 | green << 8 | blue if colored else red
        else:
            values = np.array(image)
    mask: NDArray[np.bool_] = values != 0
    if mask.any() and not np.array_equal(values[mask], np.broadcast_to(values.max(), int(mask.sum()))):
        distinct = np.unique(values)
        names = [f"#{value:06x}" if colored else f"{value:g}" for value in distinct[:6]]
        shown = ", ".join(names) + (", ..." if len(distinct) > 6 else "")
        raise DataError(
            f"the mask {path} holds {len(distinct)} different values ({shown}) where 0 and one other are allowed; "
            "threshold it and save it as PNG (JPEG and smooth resizing create gray edges)"
        )
    return mask


def image_size(path: str | Path) -> tuple[int, int]:
    """Return (height, width) of an image as `read_image` would return it, read from the header.

    Only a PNG that is not square is decoded: its EXIF orientation may follow the pixels.
    """
    path = Path(path)
    with _opened(path) as image:
        width, height = image.size
        if width != height and image.getexif().get(_ORIENTATION, 1) >= 5:
            width, height = height, width
        return height, width


def resize_image(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an image uint8 [H, W, 3] to `size` (height, width): bilinear with antialiasing, as torchvision does."""
    if image.shape[:2] == tuple(size):
        return image
    channels_first = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    resized = tv.resize(channels_first, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)
    return np.ascontiguousarray(resized.permute(1, 2, 0).numpy())


def resize_mask(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Resize a mask bool [H, W] to `size` (height, width) by the nearest pixel, so that no gray values appear.

    A region thinner than the reduction factor can vanish.
    """
    if mask.shape == tuple(size):
        return mask
    grid = torch.from_numpy(mask.astype(np.uint8))[None]
    resized = tv.resize(grid, list(size), interpolation=InterpolationMode.NEAREST_EXACT)
    return resized[0].numpy().astype(bool)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file and turn whatever pillow raises, on opening or inside the block, into a `DataError`."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise DataError(f"the image {path} does not exist; check the path") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"the image {path} is too large: {error}; crop or tile it into smaller images") from error
    except UnidentifiedImageError as error:
        if path.stat().st_size == 0:
            raise DataError(f"the image {path} is empty (0 bytes); copy it again or remove it") from error
        raise DataError(f"{path} is not an image that can be read; export it again as PNG or remove it") from error
    except (IsADirectoryError, PermissionError) as error:
        raise DataError(f"cannot open the image {path}: {error.strerror}; check the path and its rights") from error
    # pillow's decoders raise all of these on damaged files
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error) as error:
        raise DataError(f"the image {path} is damaged ({error}); copy or export it again, or remove it") from error


def _gray_to_bytes(path: Path, gray: NDArray[Any]) -> NDArray[np.uint8]:
    # NaN fails both comparisons, hence the form of the test.
    limit = 1.0 if gray.dtype.kind == "f" else 65535
    if not (gray.min() >= 0 and gray.max() <= limit):
        raise DataError(
            f"the values of the image {path} run from {gray.min()} to {gray.max()}, outside 0..{limit:g}; "
            "scale them and save the image as an 8-bit or 16-bit PNG"
        )
    return np.rint(gray * (255 / limit)).astype(np.uint8)
