"""Tiny datasets for tests: noise textures with bright rectangles as anomalies, the same pixels for the same seed."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def save(path: Path, pixels: np.ndarray) -> Path:
    """Writes an array as an image file, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_png(path: Path, pixels: np.ndarray, color_type: int, chunks: bytes = b"") -> Path:
    """Write a PNG file of 16 bits, which pillow cannot, with the color type of the PNG format."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, color_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels [H, W, C] of a file with an EXIF orientation that is seen as `upright`."""
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]


def normal_image(rng: np.random.Generator, size: int = 48) -> np.ndarray:
    """A gray noise texture uint8 [size, size, 3]."""
    return rng.integers(90, 130, (size, size, 3), dtype=np.uint8)


def anomalous_image(rng: np.random.Generator, size: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """The texture with one bright rectangle, and its mask uint8 [size, size] of 0 and 255."""
    image, mask = normal_image(rng, size), np.zeros((size, size), np.uint8)
    height, width = rng.integers(size // 6, size // 3, 2)
    top, left = rng.integers(0, size - height), rng.integers(0, size - width)
    mask[top : top + height, left : left + width] = 255
    image[mask > 0] = rng.integers(200, 250, 3)
    return image, mask


def make_mvtec(
    root: Path,
    category: str = "widget",
    normals: int = 4,
    per_type: int = 2,
    size: int = 48,
    seed: int = 0,
    types: Sequence[str] = ("crack", "dent"),
    test_normals: int = 2,
) -> Path:
    """Writes one category in the MVTec AD layout and returns its folder."""
    rng = np.random.default_rng(seed)
    folder = Path(root) / category
    for index in range(normals):
        save(folder / "train" / "good" / f"{index:03d}.png", normal_image(rng, size))
    for index in range(test_normals):
        save(folder / "test" / "good" / f"{index:03d}.png", normal_image(rng, size))
    for defect in types:
        for index in range(per_type):
            image, mask = anomalous_image(rng, size)
            save(folder / "test" / defect / f"{index:03d}.png", image)
            save(folder / "ground_truth" / defect / f"{index:03d}_mask.png", mask)
    return folder


def make_btad(
    root: Path, category: str = "01", normals: int = 4, anomalies: int = 3, size: int = 48, seed: int = 0
) -> Path:
    """Writes one category in the BTAD layout (bmp images, png masks) and returns its folder."""
    rng = np.random.default_rng(seed)
    folder = Path(root) / category
    for index in range(normals):
        save(folder / "train" / "ok" / f"{index:04d}.bmp", normal_image(rng, size))
        save(folder / "test" / "ok" / f"{index:04d}.bmp", normal_image(rng, size))
    for index in range(anomalies):
        image, mask = anomalous_image(rng, size)
        save(folder / "test" / "ko" / f"{index:04d}.bmp", image)
        save(folder / "ground_truth" / "ko" / f"{index:04d}.png", mask)
    return folder


def make_folder_dataset(root: Path, normals: int = 10, anomalies: int = 3, size: int = 48, seed: int = 0) -> Path:
    """Writes a plain folder with normal/, anomalous/ and masks/ and returns it."""
    rng = np.random.default_rng(seed)
    folder = Path(root)
    for index in range(normals):
        save(folder / "normal" / f"part{index:02d}.png", normal_image(rng, size))
    for index in range(anomalies):
        image, mask = anomalous_image(rng, size)
        save(folder / "anomalous" / f"bad{index:02d}.png", image)
        save(folder / "masks" / f"bad{index:02d}.png", mask)
    return folder
