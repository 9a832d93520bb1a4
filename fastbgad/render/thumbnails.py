"""Small pictures for pages: photographs, maps and masks shrunk alike, and photographs as data addresses."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError

_LONGEST = 256  # side of a picture in a page, pixels
_JPEG_QUALITY = 82


def thumbnail(image: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """Return a photograph uint8 [H, W, 3] with its longest side at most 256 pixels.

    Raises:
        DataError: the image has another type or shape.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(f"report: the picture of {name} must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    small = Image.fromarray(image)
    small.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    return np.asarray(small)


def shrink_map(anomaly_map: NDArray[Any], photo: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return a map [H, W] in the size of the thumbnail `photo`."""
    plane = Image.fromarray(np.ascontiguousarray(anomaly_map, dtype=np.float32))
    return np.asarray(plane.resize((photo.shape[1], photo.shape[0]), Image.Resampling.BILINEAR))


def shrink_mask(mask: NDArray[Any], photo: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return a mask [H, W] in the size of the thumbnail `photo`."""
    plane = Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0)))
    # A pixel with any part of the mask counts: a defect one pixel wide must not vanish.
    return np.asarray(plane.resize((photo.shape[1], photo.shape[0]), Image.Resampling.BOX)) > 0


def jpeg_address(image: NDArray[np.uint8]) -> str:
    """Return a picture uint8 [H, W, 3] as a data address, in full chroma, without which thin colored outlines blur."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
