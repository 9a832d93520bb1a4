"""The demo dataset: three photographs that scikit-image ships, with drawn defects, in the MVTec AD layout.

The photographs (brick, grass, gravel; 512 x 512 gray, CC0) are files of the scikit-image wheel; nothing is
downloaded. Training images are crops of the left half, test images crops of the right half, so no pixel is in both.
Crops are stored at their native resolution, mirrored at random, with the slight changes of exposure and white balance
that two shots by one camera show. The defects imitate what an inspector would look for and were drawn by eye, before
any detector saw them.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree

from ..errors import ConfigError, MissingDependencyError, OutputError
from ..system.files import make_folder, sha256, write_json

CATEGORIES = ("brick", "grass", "gravel")
MANIFEST = "demo.json"
_VERSION = 1  # of the drawing below; another version makes other images
_HALF_WIDTH = 256

Floats: TypeAlias = NDArray[np.float64]

_VISIBLE = 6  # gray levels by which a channel must change for the pixel to belong to the defect
_SMALLEST = 4  # pixels; smaller specks of the mask are dropped
_LIGHT = np.array([-0.6, -0.8])  # direction to the light in (y, x): from the upper left


@dataclass(frozen=True)
class _Parameters:
    seed: int
    train_normals: int
    test_normals: int
    per_defect: int
    size: int

    def __post_init__(self) -> None:
        if not 64 <= self.size <= _HALF_WIDTH:
            raise ConfigError(f"size is {self.size}; the demo's crops are 64 to {_HALF_WIDTH} pixels wide")
        if self.seed < 0 or min(self.train_normals, self.test_normals, self.per_defect) < 1:
            raise ConfigError("the demo dataset needs at least one image of each kind and a seed of at least 0")


def make_demo_dataset(
    root: str | Path,
    seed: int = 0,
    train_normals: int = 24,
    test_normals: int = 12,
    per_defect: int = 8,
    size: int = 192,
) -> list[str]:
    """Write the demo dataset, unless it is there already, and return the names of its categories.

    The folder appears whole or not at all. The same arguments give the same pixels.

    Args:
        root: the folder to make. It must not exist, be empty, or hold an unchanged demo dataset (one with other
            arguments is replaced).
        seed: of all crops and defects.
        train_normals: images in train/good per category.
        test_normals: images in test/good per category.
        per_defect: images of each of the four defects per category.
        size: side of the square images in pixels, 64 to 256.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
        MissingDependencyError: scikit-image is not installed.
        ConfigError: a number cannot work.
    """
    root = Path(root)
    parameters = _Parameters(seed, train_normals, test_normals, per_defect, size)
    description = {"dataset": "fastbgad demo", "version": _VERSION, **asdict(parameters)}
    occupied = root.exists() and (not root.is_dir() or any(root.iterdir()))
    if occupied:
        manifest = _verified_manifest(root)
        if {key: value for key, value in manifest.items() if key != "files"} == description:
            return list(CATEGORIES)
    photographs = _photographs()
    make_folder(root.parent)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as folder:
            scratch = Path(folder)
            new = scratch / "new"
            for index, category in enumerate(CATEGORIES):
                _write_category(new / category, photographs[category], parameters, index)
            write_json(new / MANIFEST, {**description, "files": _digests(new)})
            if occupied:
                os.replace(root, scratch / "old")
            os.replace(new, root)
    except OSError as error:
        raise OutputError(f"cannot write {root}: {error.strerror}; free some space or choose another folder") from error
    return list(CATEGORIES)


def _photographs() -> dict[str, NDArray[np.uint8]]:
    try:
        from skimage import data
    except ImportError as error:
        raise MissingDependencyError("scikit-image", "report", "the demo dataset") from error
    return {name: getattr(data, name)() for name in CATEGORIES}


def _verified_manifest(root: Path) -> dict[str, Any]:
    """Return the manifest of an unchanged demo dataset; anything else in the folder is an error, never overwritten."""
    remedy = "choose another folder, or delete this one"
    try:
        manifest: dict[str, Any] = json.loads((root / MANIFEST).read_text())
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{root} exists and is not a demo dataset of fastbgad; {remedy}") from error
    digests = _digests(root)
    changed = sorted(name for name in digests.keys() | files.keys() if digests.get(name) != files.get(name))
    if changed:
        raise OutputError(f"{root} is a demo dataset but {changed[0]} was added, changed or removed; {remedy}")
    return manifest


def _digests(root: Path) -> dict[str, str]:
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path != root / MANIFEST)
    return {path.relative_to(root).as_posix(): sha256(path) for path in paths}


def _write_category(folder: Path, photograph: NDArray[np.uint8], parameters: _Parameters, category: int) -> None:
    left, right = photograph[:, :_HALF_WIDTH], photograph[:, _HALF_WIDTH:]
    for index, rng in _generators(parameters, category, 0, parameters.train_normals):
        _write(folder / "train" / "good" / f"{index:03d}.png", _photograph_crop(left, parameters.size, rng))
    for index, rng in _generators(parameters, category, 1, parameters.test_normals):
        _write(folder / "test" / "good" / f"{index:03d}.png", _photograph_crop(right, parameters.size, rng))
    for kind, defect in enumerate(DEFECTS):
        for index, rng in _generators(parameters, category, 2 + kind, parameters.per_defect):
            image, mask = _draw_defect(defect, _photograph_crop(right, parameters.size, rng), rng)
            _write(folder / "test" / defect / f"{index:03d}.png", image)
            _write(folder / "ground_truth" / defect / f"{index:03d}_mask.png", mask.astype(np.uint8) * 255)


def _generators(
    parameters: _Parameters, category: int, part: int, count: int
) -> Iterator[tuple[int, np.random.Generator]]:
    # One generator per image: asking for more images leaves the others as they are.
    for index in range(count):
        yield index, np.random.default_rng([parameters.seed, category, part, index])


def _photograph_crop(half: NDArray[np.uint8], size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return a random crop uint8 [size, size, 3]; exposure (6 %), offset and white balance (1 %) vary slightly."""
    top, left = (int(rng.integers(side - size + 1)) for side in half.shape)
    crop = half[top : top + size, left : left + size].astype(np.float64)
    # All three were photographed from above; mirrored left to right they look no less natural.
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    gain = rng.uniform(0.94, 1.06) * rng.uniform(0.99, 1.01, size=3)
    return np.clip(np.rint(crop[:, :, None] * gain + rng.uniform(-4, 4)), 0, 255).astype(np.uint8)


def _write(path: Path, image: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def _draw_defect(
    name: str, image: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Draw one defect into a copy of `image` uint8 [H, W, 3]; return it with its mask bool [H, W]."""
    altered = np.clip(np.rint(_DRAW[name](image.astype(np.float64), rng)), 0, 255).astype(np.uint8)
    return altered, _altered_pixels(image, altered)


def _altered_pixels(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.bool_]:
    changed = np.abs(after.astype(int) - before).max(axis=2) > _VISIBLE
    # Where defect and background happen to have one color the mask would have gaps; padding keeps closing from
    # eating the mask along the image's edge.
    padded = np.pad(changed, 3)
    closed = ndimage.binary_closing(padded, ndimage.generate_binary_structure(2, 1), iterations=2)
    filled = ndimage.binary_fill_holes(closed)[3:-3, 3:-3]
    labels, _ = ndimage.label(filled, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    kept: NDArray[np.bool_] = sizes >= _SMALLEST
    return kept[labels]


def _scratch(image: Floats, rng: np.random.Generator) -> Floats:
    """Draw a thin, slightly curved, bright or dark line of 1 to 3 pixels that fades at both ends."""
    length = rng.uniform(0.3, 0.55) * min(image.shape[:2])
    points = _curve(image.shape, length, bend=0.12, controls=3, rng=rng)
    distance, along = _to_curve(image.shape, points)
    half_width = rng.uniform(0.5, 1.5) * (0.7 + 0.3 * np.sin(np.pi * along))
    fade = np.clip(np.minimum(along, 1 - along) / 0.15, 0, 1)
    opacity = np.clip(half_width + 0.5 - distance, 0, 1) * (0.35 + 0.65 * fade) * rng.uniform(0.75, 0.95)
    # On a rough texture only a stronger mark can be told from the texture itself.
    contrast = rng.uniform(35, 55) + 1.5 * image.std()
    tone = _local_tone(image, points) + rng.choice([-1, 1]) * contrast
    return _blend(image, np.clip(tone, 15, 240), opacity)


def _hole(image: Floats, rng: np.random.Generator) -> Floats:
    """Draw a dark, soft-edged pit: its wall is in shadow towards the light and lit on the far side."""
    radius = rng.uniform(0.028, 0.06) * min(image.shape[:2])
    center = _random_center(image.shape, radius * 2, rng)
    inside, direction = _blob(image.shape, center, radius, irregularity=0.16, rng=rng)
    opacity = np.clip(inside / 1.5 + 0.5, 0, 1)
    facing = direction @ _LIGHT
    depth = 0.30 - 0.16 * facing * np.exp(-np.maximum(inside, 0) / (0.5 * radius))
    grain = 1 + 0.10 * ndimage.gaussian_filter(rng.standard_normal(image.shape[:2]), 0.8)
    # The bottom keeps a little of the background's structure.
    floor = 0.7 * _local_tone(image, center[None]) + 0.3 * ndimage.gaussian_filter(image, (1.5, 1.5, 0))
    dug = _blend(image, floor * np.clip(depth * grain, 0.08, 0.7)[:, :, None], opacity)
    rim = np.exp(-(((inside + 1.2) / 1.1) ** 2)) * np.clip(-facing, 0, 1)
    return dug * (1 + 0.22 * rim[:, :, None])


def _stain(image: Floats, rng: np.random.Generator) -> Floats:
    """Draw a translucent tinted spot with a soft edge and a slightly darker rim, as a dried liquid leaves."""
    radius = rng.uniform(0.06, 0.13) * min(image.shape[:2])
    center = _random_center(image.shape, radius * 1.4, rng)
    inside, _ = _blob(image.shape, center, radius, irregularity=0.22, rng=rng)
    edge = rng.uniform(1.5, 3.5)
    cover = 0.5 * (1 + np.tanh(inside / edge))
    rim = np.exp(-(((inside - 1.5 * edge) / (1.5 * edge)) ** 2))
    cloud = ndimage.gaussian_filter(rng.standard_normal(image.shape[:2]), 0.35 * radius)
    cloud /= np.abs(cloud).max()
    strength = cover * (0.8 + 0.2 * cloud + 0.2 * rim)
    tints = np.array([[0.80, 0.66, 0.50], [0.62, 0.60, 0.58], [0.66, 0.72, 0.62], [0.82, 0.62, 0.56]])
    tint = tints[rng.integers(len(tints))] * rng.uniform(0.92, 1.06)
    return image * (1 - strength[:, :, None] * (1 - tint))


def _thread(image: Floats, rng: np.random.Generator) -> Floats:
    """Draw a thin, curved, colored fiber of two twisted strands that casts a shadow."""
    length = rng.uniform(0.3, 0.6) * min(image.shape[:2])
    points = _curve(image.shape, length, bend=0.45, controls=4, rng=rng)
    half_width = rng.uniform(0.8, 1.4)
    shadow_distance, _ = _to_curve(image.shape, points - _LIGHT * rng.uniform(1.5, 2.5))
    shadow = 0.38 * ndimage.gaussian_filter(np.clip(half_width + 0.5 - shadow_distance, 0, 1), 0.8)
    distance, along = _to_curve(image.shape, points)
    twist = 0.88 + 0.12 * np.sin(2 * np.pi * along * length / 3.5)
    rounding = 1 - 0.35 * np.clip(distance / (half_width + 0.5), 0, 1) ** 2
    colors = np.array([[150, 48, 46], [52, 74, 132], [214, 206, 190], [60, 96, 66], [170, 140, 66]], dtype=float)
    color = colors[rng.integers(len(colors))] * rng.uniform(0.9, 1.1)
    fiber = color * (twist * rounding)[:, :, None]
    return _blend(image * (1 - shadow[:, :, None]), fiber, 0.92 * np.clip(half_width + 0.5 - distance, 0, 1))


_DRAW: dict[str, Callable[[Floats, np.random.Generator], Floats]] = {
    "hole": _hole,
    "scratch": _scratch,
    "stain": _stain,
    "thread": _thread,
}
DEFECTS = tuple(_DRAW)


def _blend(image: Floats, color: Floats | float, opacity: Floats) -> Floats:
    return image + (color - image) * opacity[:, :, None]


def _random_center(shape: tuple[int, ...], margin: float, rng: np.random.Generator) -> Floats:
    margin += 4
    return np.array([rng.uniform(margin, side - margin) for side in shape[:2]])


def _curve(shape: tuple[int, ...], length: float, bend: float, controls: int, rng: np.random.Generator) -> Floats:
    """Return points [n, 2] (y, x) of a Bezier curve about `length` pixels long, inside the image."""
    angle = rng.uniform(0, np.pi)
    forward, sideways = np.array([np.sin(angle), np.cos(angle)]), np.array([np.cos(angle), -np.sin(angle)])
    steps = np.linspace(-0.5, 0.5, controls)[:, None] * length
    control = steps * forward + rng.uniform(-bend, bend, size=(controls, 1)) * length * sideways
    t = np.linspace(0, 1, max(16, int(4 * length)))[:, None]
    while len(control) > 1:  # de Casteljau, for all t at once
        control = [(1 - t) * a + t * b for a, b in itertools.pairwise(control)]
    points = control[0]
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 4.0
    corner = [
        rng.uniform(margin, max(margin + 1e-9, side - margin - s)) for side, s in zip(shape, high - low, strict=False)
    ]
    return points - low + np.array(corner)


def _to_curve(shape: tuple[int, ...], points: Floats) -> tuple[Floats, Floats]:
    """Return every pixel's distance to the curve and the nearest point's position along it, 0 to 1; both [H, W]."""
    pixels = np.moveaxis(np.mgrid[: shape[0], : shape[1]], 0, 2).reshape(-1, 2)
    distance, nearest = cKDTree(points).query(pixels)
    return distance.reshape(shape[:2]), nearest.reshape(shape[:2]) / (len(points) - 1)


def _blob(
    shape: tuple[int, ...], center: Floats, radius: float, irregularity: float, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Return an irregular round shape: how far each pixel lies inside its outline [H, W], and the unit vector from the
    center to the pixel [H, W, 2]."""
    offset = np.moveaxis(np.mgrid[: shape[0], : shape[1]], 0, 2) - center
    angle = np.arctan2(offset[..., 0], offset[..., 1])
    outline = np.ones(shape[:2])
    for k in range(2, 7):
        outline += irregularity / (k - 1) * rng.uniform(-1, 1) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    distance = np.hypot(offset[..., 0], offset[..., 1])
    return radius * outline - distance, offset / np.maximum(distance, 1e-9)[..., None]


def _local_tone(image: Floats, points: Floats) -> float:
    """Return the mean gray of the image around some points."""
    y, x = points.mean(axis=0).astype(int)
    return float(image[max(0, y - 12) : y + 13, max(0, x - 12) : x + 13].mean())
