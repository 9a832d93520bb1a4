"""MVTec AD and BTAD in miniature: the real categories, defect types, file names and formats; tiny drawn images."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastbgad.experiments.plan.protocol_file import dataset_facts

GREY = ("grid", "screw", "zipper")
"""Categories that MVTec AD stores as gray images."""

BTAD_SUFFIXES = {"01": (".bmp", ".png"), "02": (".png", ".png"), "03": (".bmp", ".bmp")}
"""Of BTAD's images and masks, by product."""

MASK_FORMATS = ("L", "1", "RGB", "L of 0 and 1", "P")
"""How BTAD's masks are stored here, in turn."""

_AT_LEAST = 4  # anomalous images of a category, so that two can be known and two tested
_SQUARE_BUT = "03"  # BTAD's product whose images are wider than high


class Miniature(NamedTuple):
    """The folders of both data sets."""

    mvtec: Path
    btad: Path


def make_miniature(
    root: Path, size: int = 64, normals: int = 4, test_normals: int = 3, per_type: int = 2, seed: int = 0
) -> Miniature:
    """Writes both data sets, the same pixels for the same arguments, and returns their folders.

    With the default numbers every protocol of the paper can be run with up to two known anomalies.

    Args:
        root: where the folders mvtec and btad are put.
        size: of the images in pixels; the gabor backbone needs 64.
        normals: training images of a category.
        test_normals: normal test images of a category.
        per_type: anomalous images of each type; categories with few types have more of each.
        seed: of the drawing.
    """
    made = Miniature(Path(root) / "mvtec", Path(root) / "btad")
    make_miniature_mvtec(made.mvtec, size, normals, test_normals, per_type, seed)
    make_miniature_btad(made.btad, size, normals, test_normals, max(per_type, _AT_LEAST), seed)
    return made


def make_miniature_mvtec(root: Path, size: int, normals: int, test_normals: int, per_type: int, seed: int) -> None:
    """Writes the 15 categories of MVTec AD with their 73 types."""
    for number, (category, types) in enumerate(dataset_facts("mvtec").images.items()):
        painter, folder = _Painter(size, size, [seed, number]), root / category
        mode = "L" if category in GREY else "RGB"
        for part, count in (("train", normals), ("test", test_normals)):
            for index in range(count):
                _save(folder / part / "good" / f"{index:03d}.png", painter.normal(), mode)
        for defect in types:
            for index in range(max(per_type, -(-_AT_LEAST // len(types)))):
                image, mask = painter.anomalous()
                _save(folder / "test" / defect / f"{index:03d}.png", image, mode)
                _save(folder / "ground_truth" / defect / f"{index:03d}_mask.png", mask * 255, "L")


def make_miniature_btad(root: Path, size: int, normals: int, test_normals: int, anomalies: int, seed: int) -> None:
    """Writes the three products of BTAD: suffixes differ between products, and between images and masks of one."""
    for number, (category, (suffix, mask_suffix)) in enumerate(BTAD_SUFFIXES.items()):
        width = size + size // 4 if category == _SQUARE_BUT else size
        painter, folder = _Painter(size, width, [seed, 1000 + number]), root / category
        for part, count in (("train", normals), ("test", test_normals)):
            for index in range(count):
                _save(folder / part / "ok" / f"{index:04d}{suffix}", painter.normal(), "RGB")
        for index in range(anomalies):
            image, mask = painter.anomalous()
            _save(folder / "test" / "ko" / f"{index:04d}{suffix}", image, "RGB")
            save_mask(folder / "ground_truth" / "ko" / f"{index:04d}{mask_suffix}", mask, MASK_FORMATS[index % 5])


def save_mask(path: Path, mask: np.ndarray, kind: str) -> None:
    """Writes a mask of 0 and 1 [height, width] in one of `MASK_FORMATS`."""
    if kind == "P":
        # Index 0 is the anomaly: only the palette says which color it is.
        image = Image.fromarray((1 - mask).astype(np.uint8)).convert("P")
        image.putpalette([255, 255, 255, 0, 0, 0])
    else:
        gray = Image.fromarray((mask * (1 if kind == "L of 0 and 1" else 255)).astype(np.uint8))
        image = gray.convert(kind.split()[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


class _Painter:
    """Draws a category's images: faintly striped noise of its own color, and bright rectangles as defects."""

    def __init__(self, height: int, width: int, entropy: list[int]) -> None:
        self._rng = np.random.default_rng(entropy)
        color = self._rng.uniform(70, 130, 3)
        stripes = 12 * np.sin(np.arange(width) * 2 * np.pi / self._rng.integers(6, 14))
        self._base = np.broadcast_to(stripes[:, None] + color, (height, width, 3))

    def normal(self) -> np.ndarray:
        """uint8 [height, width, 3]."""
        return np.clip(self._base + self._rng.normal(0, 8, self._base.shape), 0, 255).astype(np.uint8)

    def anomalous(self) -> tuple[np.ndarray, np.ndarray]:
        """An image as `normal` gives, with a defect, and its mask of 0 and 1, uint8 [height, width]."""
        image = self.normal()
        mask = np.zeros(image.shape[:2], np.uint8)
        sides = self._rng.integers(min(mask.shape) // 5, min(mask.shape) // 3, 2)
        top, left = (self._rng.integers(0, limit - side) for limit, side in zip(mask.shape, sides, strict=True))
        mask[top : top + sides[0], left : left + sides[1]] = 1
        image[mask > 0] = self._rng.integers(200, 250, 3)
        return image, mask


def _save(path: Path, pixels: np.ndarray, mode: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
