"""More anomalies from a few: the paper's two strategies against their scarcity (BGAD, section "anomaly generation").

*Repeated utilization* uses every known anomaly several times per epoch. *RandAugment CutPaste* cuts an anomalous region
out, changes it by a few random transforms and pastes it into the foreground of a normal image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Generator, Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ..errors import ConfigError, DataError
from .decoded import DecodedImages
from .foreground import foreground_mask
from .loading import LoadedSample, parse_size
from .sample import Sample

_CONTEXT = 8  # pixels of surroundings kept around a region: blur and interpolation read beyond the mask
_ATTEMPTS = 10
_EIGHT_NEIGHBORS = np.ones((3, 3), dtype=int)


@dataclass(frozen=True)
class AnomalySynthesis:
    """Uses of each known anomaly per epoch. The official code has ten of them, five of which are synthesized."""

    repeat: int = 5  # times as it is
    cut_paste: int = 5  # times cut out, transformed and pasted into a normal image
    transforms: int = 3  # random transforms per pasted region
    in_foreground: bool = True  # paste onto the object only, not onto its background

    def __post_init__(self) -> None:
        if self.repeat < 0 or self.cut_paste < 0 or self.repeat + self.cut_paste == 0:
            raise ConfigError(
                f"repeat is {self.repeat} and cut_paste {self.cut_paste}; give at least 0 each and 1 together"
            )
        if not 0 <= self.transforms <= len(_TRANSFORMS):
            raise ConfigError(
                f"transforms is {self.transforms}; give 0 to {len(_TRANSFORMS)}, the number of transforms"
            )


class AugmentedAnomalies:
    """The anomalous images of an epoch, real and synthesized, each a function of (seed, epoch, index) alone.

    Item `index` uses the known anomaly `index // (repeat + cut_paste)`; of each anomaly's items the first `repeat` are
    the image as it is (so its features can be stored), the others are synthesized again in every epoch.
    """

    def __init__(
        self,
        known: Sequence[Sample],
        normals: Sequence[Sample],
        recipe: AnomalySynthesis,
        size: int | Sequence[int],
        seed: int = 0,
        decoded: DecodedImages | None = None,
    ) -> None:
        """Plan the images; none is read yet.

        Args:
            known: the known anomalies, with masks.
            normals: the training normals to paste onto.
            recipe: how often each anomaly is used.
            size: (height, width) of the images, or one number for both.
            seed: of all random choices.
            decoded: cache of decoded images; None makes a new one.

        Raises:
            DataError: images are to be synthesized but there are no normals.
        """
        if known and recipe.cut_paste and not normals:
            raise DataError("anomalies cannot be pasted because there are no normal images; set cut_paste to 0")
        if seed < 0:
            raise ConfigError(f"seed is {seed}; give a number of at least 0")
        self.known: tuple[Sample, ...] = tuple(known)
        self.normals: tuple[Sample, ...] = tuple(normals)
        self.recipe = recipe
        self.size: tuple[int, int] = parse_size(size)
        self.seed = seed
        self._per_anomaly = recipe.repeat + recipe.cut_paste
        self._decoded = decoded or DecodedImages(self.size)
        self._foregrounds: dict[Sample, Tensor] = {}

    def __len__(self) -> int:
        return len(self.known) * self._per_anomaly

    def is_synthetic(self, index: int) -> bool:
        """Return True if item `index` is synthesized; otherwise it is `source(index)` as it is."""
        return self._checked(index) % self._per_anomaly >= self.recipe.repeat

    def source(self, index: int) -> Sample:
        """Return the known anomaly that item `index` is or is made from."""
        return self.known[self._checked(index) // self._per_anomaly]

    def get(self, epoch: int, index: int) -> LoadedSample:
        """Return item `index` of `epoch`: uint8 [3, h, w] and bool [h, w]. Raises `DataError` as `load_sample` does."""
        anomalous = self._decoded(self.source(index))
        if not self.is_synthetic(index):
            return LoadedSample(anomalous.image.clone(), anomalous.mask.clone())
        if not anomalous.mask.any():
            height, width = self.size
            raise DataError(
                f"the anomaly of {self.source(index).image} vanishes when its mask is resized to {width} x {height}; "
                "choose a larger image size or leave this image out"
            )
        entropy = np.random.SeedSequence([self.seed, epoch, index])
        generator = Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        normal = self.normals[_integer(len(self.normals), generator)]
        image, mask = rand_augment_cut_paste(
            self._decoded(normal).image,
            anomalous.image,
            anomalous.mask,
            self._foreground(normal),
            generator,
            self.recipe.transforms,
        )
        return LoadedSample(image, mask)

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} augmented anomalies")
        return index

    def _foreground(self, normal: Sample) -> Tensor | None:
        """Return the object of a normal image as bool [h, w]; None if anomalies may be pasted anywhere."""
        if not self.recipe.in_foreground:
            return None
        if normal not in self._foregrounds:
            image = self._decoded(normal).image.permute(1, 2, 0).numpy()
            self._foregrounds[normal] = torch.from_numpy(foreground_mask(image))
        return self._foregrounds[normal]


def rand_augment_cut_paste(
    normal: Tensor,  # uint8 [3, h, w]
    anomalous: Tensor,  # uint8 [3, h, w]
    mask: Tensor,  # bool [h, w]
    foreground: Tensor | None,  # bool [h, w]
    generator: Generator,
    transforms: int = 3,
) -> tuple[Tensor, Tensor]:
    """Paste one anomalous region, transformed, into a normal image (RandAugment CutPaste).

    One 8-connected region of `mask` is drawn, then `transforms` different transforms of it (quarter turn, flip,
    transposition, affine map, brightness and contrast, blur, noise, sharpness, hue and saturation, elastic), then a
    position where the region lies inside the image and the center of its bounding box inside `foreground`. A region
    that vanished or no longer fits is drawn again; after ten attempts the region is pasted untransformed, and anywhere
    in the image if it does not fit into the foreground.

    All randomness comes from `generator` (on the CPU): its seed determines the result bit for bit.

    Returns:
        A new image uint8 [3, h, w] and its mask bool [h, w], which has at least one pixel. The inputs stay as they are.

    Raises:
        DataError: `mask` is empty, or the sizes differ.
    """
    if normal.shape != anomalous.shape or mask.shape != normal.shape[1:]:
        raise DataError(
            f"the normal image {tuple(normal.shape)}, the anomalous image {tuple(anomalous.shape)} and its mask "
            f"{tuple(mask.shape)} have different sizes; resize them first"
        )
    if not mask.any():
        raise DataError("the mask of an anomalous image marks no pixel; draw the anomaly or leave the image out")
    allowed = torch.ones_like(mask) if foreground is None else foreground
    for _ in range(_ATTEMPTS):
        crop = _cut_region(anomalous, mask, generator)
        for choice in torch.randperm(len(_TRANSFORMS), generator=generator)[:transforms].tolist():
            crop = _TRANSFORMS[choice](crop, generator)
        pasted = _paste(normal, crop, allowed, generator)
        if pasted is not None:
            return pasted
    plain = _cut_region(anomalous, mask, generator)
    pasted = _paste(normal, plain, allowed, generator) or _paste(normal, plain, torch.ones_like(mask), generator)
    if pasted is None:  # impossible: an untransformed region came from an image of this size
        raise AssertionError("an untransformed region does not fit its own image size")
    return pasted


class _Crop(NamedTuple):
    """A region with its surroundings; transforms change both, and the pixels of the mask are pasted."""

    image: Tensor  # uint8 [3, h, w]
    mask: Tensor  # bool [h, w]


def _cut_region(image: Tensor, mask: Tensor, generator: Generator) -> _Crop:
    labels, count = ndimage.label(mask.numpy(), _EIGHT_NEIGHBORS)
    chosen = _integer(count, generator) + 1
    rows, columns = ndimage.find_objects(labels)[chosen - 1]
    # Beyond the image's edge its last row or column is repeated.
    ys = torch.arange(rows.start - _CONTEXT, rows.stop + _CONTEXT).clamp(0, mask.shape[0] - 1)
    xs = torch.arange(columns.start - _CONTEXT, columns.stop + _CONTEXT).clamp(0, mask.shape[1] - 1)
    region = torch.from_numpy(labels[rows, columns] == chosen)
    return _Crop(image[:, ys][:, :, xs], torch.nn.functional.pad(region, [_CONTEXT] * 4))


def _paste(normal: Tensor, crop: _Crop, allowed: Tensor, generator: Generator) -> tuple[Tensor, Tensor] | None:
    """Paste the crop's region at a random allowed position; return None if it has no pixel or fits nowhere."""
    occupied = crop.mask.nonzero()
    if len(occupied) == 0:
        return None
    top, left = occupied.amin(0).tolist()
    bottom, right = (occupied.amax(0) + 1).tolist()
    image, mask = crop.image[:, top:bottom, left:right], crop.mask[top:bottom, left:right]
    height, width = mask.shape
    rows, columns = allowed.shape[0] - height + 1, allowed.shape[1] - width + 1
    if rows < 1 or columns < 1:
        return None
    # Indexed by the region's upper left corner: whether its center is allowed.
    positions = allowed[height // 2 : height // 2 + rows, width // 2 : width // 2 + columns].nonzero()
    if len(positions) == 0:
        return None
    y, x = positions[_integer(len(positions), generator)].tolist()
    result, result_mask = normal.clone(), torch.zeros_like(allowed)
    window = result[:, y : y + height, x : x + width]
    window.copy_(torch.where(mask, image, window))
    result_mask[y : y + height, x : x + width] = mask
    return result, result_mask


# The transforms. torchvision's own random transforms draw from the global generator; here every parameter is drawn
# from the one given, so that a seed reproduces the image and nothing else is disturbed.


def _quarter_turn(crop: _Crop, generator: Generator) -> _Crop:
    turns = 1 + _integer(3, generator)
    return _Crop(torch.rot90(crop.image, turns, (1, 2)), torch.rot90(crop.mask, turns, (0, 1)))


def _flip(crop: _Crop, generator: Generator) -> _Crop:
    if _integer(2, generator):
        return _Crop(crop.image.flip(2), crop.mask.flip(1))
    return _Crop(crop.image.flip(1), crop.mask.flip(0))


def _transpose(crop: _Crop, generator: Generator) -> _Crop:
    return _Crop(crop.image.transpose(1, 2), crop.mask.transpose(0, 1))


def _affine(crop: _Crop, generator: Generator) -> _Crop:
    angle = _uniform(-180, 180, generator)
    scale = _uniform(0.7, 1.3, generator)
    shear = [_uniform(-15, 15, generator), _uniform(-15, 15, generator)]
    height, width = crop.mask.shape
    # Space for the turned, enlarged and sheared rectangle: shearing by 15 degrees stretches a diagonal by at most 1.3.
    padding = math.ceil((1.3 * 1.3 * math.hypot(height, width) - min(height, width)) / 2)
    image = tv.pad(crop.image, [padding] * 4, padding_mode="edge")
    mask = torch.nn.functional.pad(crop.mask, [padding] * 4)
    image = tv.affine(image, angle, [0, 0], scale, shear, InterpolationMode.BILINEAR)
    mask = tv.affine(mask[None].to(torch.uint8), angle, [0, 0], scale, shear, InterpolationMode.NEAREST)[0].bool()
    return _tightened(_Crop(image, mask))


def _brightness_contrast(crop: _Crop, generator: Generator) -> _Crop:
    image = tv.adjust_brightness(crop.image, _uniform(0.7, 1.3, generator))
    return _Crop(tv.adjust_contrast(image, _uniform(0.7, 1.3, generator)), crop.mask)


def _blur(crop: _Crop, generator: Generator) -> _Crop:
    sigma = _uniform(0.3, 1.2, generator)
    return _Crop(tv.gaussian_blur(crop.image, [5, 5], [sigma, sigma]), crop.mask)


def _noise(crop: _Crop, generator: Generator) -> _Crop:
    sigma = _uniform(2, 12, generator)
    noise = torch.randn(crop.image.shape, generator=generator) * sigma
    return _Crop((crop.image + noise).round().clamp(0, 255).to(torch.uint8), crop.mask)


def _sharpness(crop: _Crop, generator: Generator) -> _Crop:
    return _Crop(tv.adjust_sharpness(crop.image, _uniform(0.2, 2.5, generator)), crop.mask)


def _hue_saturation(crop: _Crop, generator: Generator) -> _Crop:
    image = tv.adjust_hue(crop.image, _uniform(-0.1, 0.1, generator))
    return _Crop(tv.adjust_saturation(image, _uniform(0.6, 1.4, generator)), crop.mask)


def _elastic(crop: _Crop, generator: Generator) -> _Crop:
    height, width = crop.mask.shape
    noise = torch.rand((2, height, width), generator=generator) * 2 - 1
    # Smoothing by sigma 4 leaves a standard deviation of 0.04: the shifts become about 0.6 to 1.6 pixels.
    shift = tv.gaussian_blur(noise, [17, 17], [4.0, 4.0]) * _uniform(15, 40, generator)
    # A displacement is given in half image sides, x before y.
    displacement = torch.stack([shift[0] * 2 / width, shift[1] * 2 / height], dim=-1)[None]
    image = tv.elastic(crop.image, displacement, InterpolationMode.BILINEAR)
    mask = tv.elastic(crop.mask[None].to(torch.uint8), displacement, InterpolationMode.NEAREST)[0].bool()
    return _Crop(image, mask)


_TRANSFORMS: tuple[Callable[[_Crop, Generator], _Crop], ...] = (
    _quarter_turn,
    _flip,
    _transpose,
    _affine,
    _brightness_contrast,
    _blur,
    _noise,
    _sharpness,
    _hue_saturation,
    _elastic,
)


def _tightened(crop: _Crop) -> _Crop:
    """Return the crop cut down to its region and the usual surroundings; unchanged if the region has vanished."""
    occupied = crop.mask.nonzero()
    if len(occupied) == 0:
        return crop
    top, left = (occupied.amin(0) - _CONTEXT).clamp(min=0).tolist()
    bottom, right = (occupied.amax(0) + 1 + _CONTEXT).tolist()
    return _Crop(crop.image[:, top:bottom, left:right], crop.mask[top:bottom, left:right])


def _integer(end: int, generator: Generator) -> int:
    return int(torch.randint(end, (), generator=generator))


def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
