"""Write a category of textures with drawn defects, in the MVTec AD layout, with numpy and Pillow alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fastbgad.data.generated import write_noise_images

# Grey levels by which a defect is darker or brighter than the texture under it: some are hard to see.
FAINTEST, STRONGEST = 40.0, 110.0


def write_category(root: Path, normals: int, test_normals: int, defects: int, side: int, seed: int = 0) -> Path:
    """Write train/good, test/good, test/spot and ground_truth/spot; returns the category's folder.

    Every defect is a soft-edged ellipse; its mask holds the pixels that it changes by half of its strength or more.
    The same arguments give the same pixels.
    """
    rng = np.random.default_rng(seed)
    folder = root / "texture"
    for split, count in (("train", normals), ("test", test_normals)):
        write_noise_images(folder / split / "good", count, side, int(rng.integers(2**31)))
    masks = folder / "ground_truth" / "spot"
    masks.mkdir(parents=True, exist_ok=True)
    y, x = np.ogrid[:side, :side]
    for path in write_noise_images(folder / "test" / "spot", defects, side, int(rng.integers(2**31))):
        center = rng.uniform(0.15 * side, 0.85 * side, 2)
        radii = rng.uniform(0.03 * side, 0.1 * side, 2)
        distance = ((y - center[0]) / radii[0]) ** 2 + ((x - center[1]) / radii[1]) ** 2
        share = 1 / (1 + np.exp(8 * (np.sqrt(distance) - 1)))
        strength = rng.uniform(FAINTEST, STRONGEST) * rng.choice([-1, 1])
        image = np.asarray(Image.open(path), dtype=np.float64) + strength * share[:, :, None]
        Image.fromarray(image.round().clip(0, 255).astype(np.uint8)).save(path)
        Image.fromarray(np.where(share >= 0.5, 255, 0).astype(np.uint8)).save(masks / f"{path.stem}_mask.png")
    return folder
