"""Image files made of noise that cost as much to decode as photographs do, for timing without a dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import ConfigError, OutputError
from ..system.files import make_folder

# Each octave halves the size of its structures and their contrast, as the spectra of photographs fall.
_OCTAVES = 6
_TINT_OCTAVES = 2
_TINT = 0.15
_COARSEST = 3  # structures a side in the first octave
_CONTRAST = 38.0  # gray levels of the first octave
# Pillow's own level takes four times as long to write and saves an eighth of the size; reading takes the same.
_COMPRESSION = 3
# Gray levels of the sensor's noise. It decides how well a PNG compresses: to half its size, like MVTec AD's textures.
_SENSOR_NOISE = 2.0


def write_noise_images(folder: str | Path, count: int, side: int, seed: int = 0) -> list[Path]:
    """Write photograph-like PNG files: smooth structures of all sizes in slightly differing colors, and fine noise.

    The same arguments give the same pixels.

    Args:
        folder: where they go; it is created.
        count: number of files.
        side: height and width in pixels.
        seed: of all pixels.

    Returns:
        The files, in order.

    Raises:
        ConfigError: a number below 1, or a negative seed.
        OutputError: the folder cannot be written, or the disk is full.
    """
    if count < 1 or side < 1 or seed < 0:
        raise ConfigError(f"count is {count}, side {side} and seed {seed}; give at least 1, 1 and 0")
    folder = make_folder(folder)
    paths = [folder / f"{index:03d}.png" for index in range(count)]
    for index, path in enumerate(paths):
        try:
            image = Image.fromarray(_noise_image(side, np.random.default_rng([seed, index])))
            image.save(path, compress_level=_COMPRESSION)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}; free some space") from error
    return paths


def _noise_image(side: int, rng: np.random.Generator) -> np.ndarray:
    """Return an image uint8 [side, side, 3]."""
    image = np.empty((side, side, 3), np.uint8)
    brightness = _octaves(side, _OCTAVES, rng)
    for channel in range(3):
        tint = _TINT * _octaves(side, _TINT_OCTAVES, rng)
        noise = _SENSOR_NOISE * rng.standard_normal((side, side), dtype=np.float32)
        image[:, :, channel] = np.clip(128 + brightness + tint + noise, 0, 255)
    return image


def _octaves(side: int, octaves: int, rng: np.random.Generator) -> np.ndarray:
    """Return float32 [side, side], centered at 0: random grids of growing fineness, enlarged smoothly and summed."""
    total = np.zeros((side, side), np.float32)
    for octave in range(octaves):
        cells = min(_COARSEST << octave, side)
        grid = rng.standard_normal((cells, cells), dtype=np.float32)
        smooth = Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC)
        total += _CONTRAST / 2**octave * np.asarray(smooth)
    return total
