"""Image files opened by pillow, with every way of failing turned into one clear error."""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..errors import DataError
from .files import is_broken_link

ORIENTATION = 0x0112
"""The EXIF tag; 5 to 8 exchange height and width."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file; turn whatever pillow raises, on opening or inside the block, into a `DataError`."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise DataError(_missing(path)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"the image {path} is too large: {error}; crop or tile it into smaller images") from error
    except UnidentifiedImageError as error:
        raise DataError(_unidentified(path)) from error
    except (IsADirectoryError, PermissionError) as error:
        raise DataError(f"cannot open the image {path}: {error.strerror}; check the path and its rights") from error
    # pillow's decoders raise all of these on damaged files
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error) as error:
        raise DataError(f"the image {path} is damaged ({error}); copy or export it again, or remove it") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image as RGB; an alpha channel is dropped."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # pillow warns of the direct way
    return image if image.mode == "RGB" else image.convert("RGB")


def turned_upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Return pixels [H, W, ...] as the EXIF orientation wants them seen; 1 and unknown values leave them."""
    if orientation >= 5:  # the file's rows are the picture's columns
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image, 1 where there is none."""
    value = image.getexif().get(ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _missing(path: Path) -> str:
    if is_broken_link(path):
        return (
            f"the image {path} is a link to a file that does not exist; fetch the content (git annex get, dvc pull), "
            "or mend or remove the link"
        )
    return f"the image {path} does not exist; check the path"


def _unidentified(path: Path) -> str:
    with path.open("rb") as file:
        begin = file.read(len(_LFS_POINTER))
    if not begin:
        return f"the image {path} is empty (0 bytes); copy it again or remove it"
    if begin == _LFS_POINTER:
        return f"the image {path} is a pointer of Git LFS in place of the content; fetch it: git lfs pull"
    return f"{path} is not an image that can be read; export it again as PNG or remove it"
