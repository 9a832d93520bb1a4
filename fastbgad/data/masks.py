"""One mask: read from a file or a folder, made of two values, resized.

People save masks in many forms. A pixel is anomalous

- in a file of 0 and one other value: where it is not 0;
- in a file with soft edges (JPEG, smooth resizing): where it is above half of the full range;
- in a file with an alpha channel whose colors do not tell: where it is opaque.

Anything else (several classes, a photograph, colors and alpha that disagree) is refused: a mask that is misread makes
every measured number wrong. A threshold that the caller gives takes the place of the first two rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..errors import ConfigError, DataError
from ..wording import listed
from .files import ImageSearch
from .image_file import as_rgb, opened
from .wide_pixels import has_separate_planes, read_wide_pixels

DEFAULT_THRESHOLD = 0.5
"""Share of the full range above which a pixel of a mask with soft edges is anomalous."""

MaskForm: TypeAlias = Literal["two values", "soft edges", "alpha", "threshold"]

# A soft edge is thin: more pixels than this share of an image between a quarter and three quarters are no edge.
_MOST_GRAY = 0.1
# Of the pixels that are neither black nor of the mask's color, so many lie inside a flat area if they mark a class.
_FLAT_SHARE = 0.3
_FEW_VALUES = 16
_NEAR_TOP = 8 / 255
_OTHER_HUE = 0.3
_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_SHOWN = 6


class MaskReading(NamedTuple):
    """A mask, and how its file was understood."""

    mask: NDArray[np.bool_]  # [H, W]
    form: MaskForm
    values: tuple[str, ...]
    """Some of the values in the file, where they are more than two."""


def read_mask(path: str | Path, threshold: float | None = None) -> NDArray[np.bool_]:
    """Read a mask: a file, or a folder whose files each hold a part of it.

    A mask without any anomalous pixel is returned as it is; whether that makes sense is for the caller to say.

    Args:
        path: of the file or folder.
        threshold: share of the full range, 0 <= threshold < 1; pixels above it are anomalous. With 0, all that are not
            black are. None: by the rules above.

    Returns:
        bool [H, W].

    Raises:
        DataError: a file cannot be read or is no mask; parts of different sizes; a folder without images.
        ConfigError: the threshold is not in [0, 1).
    """
    return read_mask_closely(path, threshold).mask


def read_mask_closely(path: str | Path, threshold: float | None = None) -> MaskReading:
    """Return what `read_mask` returns, and how the file was understood: of several files, the first unusual one."""
    check_threshold(threshold)
    path = Path(path)
    if not path.is_dir():
        return _read_file(path, threshold)
    parts = [_read_file(Path(file), threshold) for file in ImageSearch().below(str(path))]
    if not parts:
        raise DataError(f"the folder {path} of a mask holds no image; add its parts, or check the path")
    shapes = {part.mask.shape for part in parts}
    if len(shapes) > 1:
        sizes = ", ".join(f"{width} x {height}" for height, width in sorted(shapes))
        raise DataError(f"the parts of the mask in {path} differ in size ({sizes}); draw all at the image's size")
    union = np.logical_or.reduce([part.mask for part in parts])
    unusual = next((part for part in parts if part.form != "two values"), parts[0])
    return unusual._replace(mask=union)


def check_threshold(threshold: float | None) -> None:
    """Raise `ConfigError` for a threshold that cannot work."""
    if threshold is not None and not 0 <= threshold < 1:
        raise ConfigError(f"mask_threshold is {threshold}; give a share of the full range, 0 <= threshold < 1")


def resize_mask(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Resize a mask bool [H, W] to `size` (height, width) by the nearest pixel, so that no gray values appear.

    A region thinner than the reduction factor can vanish.
    """
    if mask.shape == tuple(size):
        return mask
    grid = torch.from_numpy(mask.astype(np.uint8))[None]
    resized = tv.resize(grid, list(size), interpolation=InterpolationMode.NEAREST_EXACT)
    return resized[0].numpy().astype(bool)


class _Levels(NamedTuple):
    """Brightness of a mask's pixels in [0, 1], and one number for each color."""

    share: NDArray[np.float32]  # [H, W]
    code: NDArray[Any]  # [H, W], 0 is black
    colored: bool


def _read_file(path: Path, threshold: float | None) -> MaskReading:
    with opened(path) as image:
        lossy = image.format in ("JPEG", "MPO", "WEBP")
        has_channel = image.mode in _WITH_ALPHA
        # Of masks 8 bits are enough, and pillow keeps the alpha channel.
        wide = None if has_channel and not has_separate_planes(image) else read_wide_pixels(path, image)
        if has_channel and wide is not None:
            raise DataError(
                f"the mask {path} is a TIFF of separate planes with an alpha channel; save it as a gray PNG"
            )
        ImageOps.exif_transpose(image, in_place=True)
        painted = has_channel or image.mode == "P"
        alpha = _alpha(image) if wide is None else None
        levels = _levels_of(path, _values(image) if wide is None else wide.values)
    if alpha is not None:
        visible = alpha > 255 * (DEFAULT_THRESHOLD if threshold is None else threshold)
        if not visible.all():
            return _from_alpha(path, levels, visible, painted)
    return _from_levels(path, levels, threshold, lossy)


def _alpha(image: Image.Image) -> NDArray[np.uint8] | None:
    """Return the alpha channel uint8 [H, W] of an image, or of a color that means transparent; None without one."""
    if image.mode in _WITH_ALPHA or ("transparency" in image.info and image.mode != "F"):
        return np.array(image.convert("RGBA"))[..., 3]
    return None


def _values(image: Image.Image) -> NDArray[Any]:
    return np.array(image if image.mode in ("1", "L", "F") else as_rgb(image))


def _levels_of(path: Path, values: NDArray[Any]) -> _Levels:
    """Return the levels of pixels [H, W] or [H, W, 3]."""
    if values.size and not (values.min() >= 0 and np.isfinite(values.max())):
        raise DataError(
            f"the values of the mask {path} run from {values.min()} to {values.max()}; save it with 0 for normal and "
            "255 for anomalous pixels"
        )
    if values.ndim == 3 and (values[..., 0] == values[..., 1]).all() and (values[..., 0] == values[..., 2]).all():
        values = values[..., 0]
    full = _full_range(values)
    if values.ndim == 2:
        return _Levels((values / full).astype(np.float32), values, False)
    red, green, blue = np.moveaxis((values * (255 / full)).astype(np.uint32), 2, 0)
    return _Levels((values.max(axis=2) / full).astype(np.float32), red << 16 | green << 8 | blue, True)


def _full_range(values: NDArray[Any]) -> float:
    """Return the full range of values: that of their type, or of 8 bits where they lie in a wider one."""
    top = float(values.max(initial=0))
    if values.dtype == np.bool_ or (values.dtype.kind == "f" and top <= 1):
        return 1.0
    return 255.0 if top <= 255 else max(top, 65535.0)


def _from_alpha(path: Path, levels: _Levels, visible: NDArray[np.bool_], painted: bool) -> MaskReading:
    """Return the mask of a file that is not opaque everywhere.

    Where no visible pixel is black, or all are, colors say nothing about which pixel is anomalous: it was painted on,
    or cut out to, transparent ground. Where some are black, it is not clear whether colors or alpha mark the anomaly;
    neither is it where a file that was not painted so (without alpha channel) declares its bright color transparent.
    """
    black = levels.share <= DEFAULT_THRESHOLD
    seen = black[visible]
    if seen.size == 0:
        clear = (levels.code == levels.code.flat[0]).all()
    elif seen.all():
        clear = painted or black.all()
    else:
        clear = not seen.any() or _is_picture(levels, visible)
    if not clear:
        raise DataError(
            f"the colors and the transparent pixels of the mask {path} say different things, so it is not clear which "
            "mark the anomaly; save it as a gray PNG without transparency: 0 normal, 255 anomalous"
        )
    return MaskReading(visible, "alpha", ())


def _is_picture(levels: _Levels, visible: NDArray[np.bool_]) -> bool:
    """Return True if the visible part is cut out of a photograph: far more colors than a drawing has."""
    return len(np.unique(levels.code[visible])) > 4 * _FEW_VALUES


def _from_levels(path: Path, levels: _Levels, threshold: float | None, lossy: bool) -> MaskReading:
    if threshold is not None:
        mask = levels.share > threshold if threshold > 0 else levels.code != 0
        return MaskReading(mask, "threshold", ())
    nonzero: NDArray[np.bool_] = levels.code != 0
    if not nonzero.any() or (levels.code[nonzero] == levels.code[nonzero][0]).all():
        return MaskReading(nonzero, "two values", ())
    distinct = _distinct(levels.code)
    values = tuple(f"#{value:06x}" if levels.colored else f"{value:g}" for value in distinct[: _SHOWN + 1].tolist())
    shown = listed(values, _SHOWN, total=len(distinct))
    mask = levels.share > DEFAULT_THRESHOLD
    reason = _no_soft_edges(levels, mask, len(distinct), lossy)
    if reason:
        raise DataError(
            f"the mask {path} holds {len(distinct)} different values ({shown}), and {reason}; "
            "give --mask-threshold 0 if every value but 0 is anomalous, another share of the full range to cut there, "
            "or save it with 0 and 255 alone"
        )
    return MaskReading(mask, "soft edges", values[:_SHOWN])


def _no_soft_edges(levels: _Levels, mask: NDArray[np.bool_], distinct: int, lossy: bool) -> str:
    """Return why a file of more than two values is no mask with soft edges, "" if it is one."""
    share = levels.share
    if mask.all() or not mask.any():
        return f"{'all' if mask.all() else 'none'} of them are above half of the full range"
    if distinct == 2:  # neither is black
        return ""
    top = float(share.max())
    gray = (share > 0.25) & (share < 0.75)
    if gray.mean() > _MOST_GRAY:
        return f"{gray.mean():.0%} of the image is gray: this is no mask of two values"
    few = distinct <= _FEW_VALUES and not lossy
    between = (share > 0) & (share < top - _NEAR_TOP) if few else gray
    if between.any() and _flat(levels.code, between).mean() > _FLAT_SHARE:
        return "some mark areas of their own, as classes do"
    if levels.colored:
        codes = levels.code[mask] if few else levels.code[mask][_flat(levels.code, mask)]
        if _several_colors(codes):
            return "some are different colors, as for classes"
    return ""


def _flat(code: NDArray[Any], chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return for each chosen pixel, bool [number of those], True if its eight neighbors have the same value."""
    padded = np.pad(code, 1, mode="edge")
    rows, columns = np.nonzero(chosen)
    flat = np.ones(len(rows), dtype=bool)
    for y in range(3):
        for x in range(3):
            flat &= padded[rows + y, columns + x] == code[chosen]
    return flat


def _distinct(code: NDArray[Any]) -> NDArray[Any]:
    """Return the different values of an array, sorted."""
    # Counting is faster than sorting.
    return np.flatnonzero(np.bincount(code.ravel())) if code.dtype == np.uint8 else np.unique(code)


def _several_colors(codes: NDArray[Any]) -> bool:
    """Return True if colors differ by more than one does from itself at a soft edge, or after JPEG."""
    distinct = np.unique(codes).astype(np.int64)
    channels = np.stack([distinct >> 16 & 255, distinct >> 8 & 255, distinct & 255])
    # A soft edge darkens all channels alike: relative to the brightest, the color stays.
    hues = channels / np.maximum(channels.max(axis=0), 1)
    return distinct.size > 0 and bool((np.ptp(hues, axis=1) > _OTHER_HUE).any())
