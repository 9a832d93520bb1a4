"""A backbone that needs no download: Gabor energies, lines, color and contrast, standardized on normal images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BackboneError, FeatureError
from .base import Backbone, check_smallest, unit_range
from .standardization import RunningMoments

_LEVELS = (1, 2, 3)
_ORIENTATIONS = 6
_SECOND_ORIENTATIONS = 4
_LINE_ORIENTATIONS = 16
_CHANNELS = 2 * _ORIENTATIONS + _SECOND_ORIENTATIONS + 3 + 3 + 3 + 2 + 1 + 2 + 2
_SMALLEST = 64  # pixels; reflection at the coarsest scale needs a few patches

_LUMA = (0.299, 0.587, 0.114)  # Rec. 601
_ENERGY_FLOOR = 0.03  # added under the logarithm: energies of camera noise, which carry no texture
_SECOND_FLOOR = 0.1
_TINY = 1e-12  # keeps the root of an energy away from zero
_STD_FLOOR = 1e-3  # of a feature that never varies among the normals, such as color in gray images
_LINEAR_RANGE = 4.0  # standard deviations


class GaborBackbone(Backbone):
    r"""Oriented energies at three scales, with second-order energies, lines, color and local contrast.

    The image is mapped to sqrt(Y), Y the luma, and two opponent channels sqrt(R) - sqrt(G) and
    (sqrt(R) + sqrt(G)) / 2 - sqrt(B); the root evens out shot noise. G_k is the image halved k times. With the
    quadrature pair of `gabor_bank` (Daugman 1985), the amplitude at orientation t is the local texture energy (Malik
    and Perona 1990):

        A_k(t) = sqrt((G_k * even_t)^2 + (G_k * odd_t)^2)

    A patch of level l (stride 2^(l+1)) has 32 channels; "mean" is the mean over the patch:

        12  log(mean A_{l-1}(t) + c), log(mean A_l(t) + c), t = 0, 30, ..., 150 degrees
         4  second order: the same energy of the map log(mean_t A_{l-1}(t) + c), 4 orientations: texture of texture
         3  mean of the three channels: absolute brightness and color
         3  log of their standard deviation within the patch: contrast
         3  their mean less that of the 5 x 5 patches around: brightness and color against the neighborhood
         2  maximum - mean and mean - minimum of sqrt(Y): specks that averages hide
         1  log of the maximum of A_{l-1} over patch and orientations
         2  the strongest bright and the strongest dark line (`line_bank`) through the patch: scratches and threads
         2  the strongest bright and the strongest dark contour: line responses averaged along their own orientation,
            less the mean over orientations; long smooth lines outlast the short ones of a texture (contour
            integration, Field, Hayes and Hess 1993)

    Each is standardized by mean and deviation over all patches of the training normals, then compressed by
    f(z) = 4 asinh(z / 4): the identity for common values, a logarithm for extreme ones, which a flow in half
    precision could not take otherwise. A feature that does not vary there is divided by 0.001.

    Any size from 64 pixels works (edges are continued; an incomplete last patch averages the pixels that it has). All
    filters and statistics are buffers. On gray normals the color channels are constant, and color is an anomaly.
    """

    first_order: Tensor
    second_order: Tensor
    lines: Tensor
    contours: Tensor
    mean: Tensor
    std: Tensor
    cells_seen: Tensor

    def __init__(self, levels: Sequence[int] = _LEVELS) -> None:
        """Compute the filters; `fit` must follow.

        Args:
            levels: a strictly increasing choice of 1, 2, 3, with strides 4, 8, 16.

        Raises:
            BackboneError: other levels.
        """
        super().__init__()
        self.levels: tuple[int, ...] = tuple(int(level) for level in levels)
        if not self.levels or list(self.levels) != sorted(set(self.levels) & set(_LEVELS)):
            raise BackboneError(
                f"the gabor backbone has no levels {list(self.levels)}; name some of 1 (stride 4), 2 (stride 8) and "
                "3 (stride 16), in increasing order"
            )
        self.channels: tuple[int, ...] = (_CHANNELS,) * len(self.levels)
        self.strides: tuple[int, ...] = tuple(2 ** (level + 1) for level in self.levels)
        self.register_buffer("first_order", gabor_bank(_ORIENTATIONS, wavelength=4, sigma=1.8, aspect=0.8, size=7))
        self.register_buffer(
            "second_order", gabor_bank(_SECOND_ORIENTATIONS, wavelength=4, sigma=1.8, aspect=1, size=7)
        )
        self.register_buffer("lines", line_bank(_LINE_ORIENTATIONS, wavelength=5, sigma=1.2, length=6, size=21))
        self.register_buffer("contours", contour_bank(_LINE_ORIENTATIONS, sigma=0.6, length=4, size=15))
        self.register_buffer("mean", torch.zeros(len(self.levels), _CHANNELS))
        self.register_buffer("std", torch.ones(len(self.levels), _CHANNELS))
        self.register_buffer("cells_seen", torch.zeros(len(self.levels), dtype=torch.int64))
        # Not read from the buffer: reading from a GPU at each forward would stall it.
        self._fitted = False
        self.register_load_state_dict_post_hook(_note_statistics)
        self._freeze()

    @property
    def needs_fit(self) -> bool:
        """True until `fit` ran or statistics were loaded."""
        return not self._fitted

    def extract(self, images: Tensor) -> list[Tensor]:
        """Return features before standardization; level l has ceil(H / stride) x ceil(W / stride) patches.

        Raises:
            FeatureError: images that cannot be used (see `unit_range`).
        """
        return self._raw(unit_range(images, _SMALLEST))

    def check_image_size(self, height: int, width: int) -> None:
        """See `Backbone.check_image_size`."""
        check_smallest(height, width, _SMALLEST)

    def standardize_level(self, level: int, features: Tensor) -> Tensor:
        """Return the features of one level, standardized and compressed.

        Raises:
            FeatureError: `fit` has not run.
        """
        if self.needs_fit:
            raise FeatureError(
                "the gabor backbone has no feature statistics yet: call fit() with batches of normal training images, "
                "or load a state dict saved after that"
            )
        centered = features - _column(self.mean[level])
        return _LINEAR_RANGE * torch.asinh(centered / (_LINEAR_RANGE * _column(self.std[level])))

    @torch.no_grad()
    def fit_features(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Learn mean and deviation of each feature in one pass, in float64; forget what an earlier call learned.

        Args:
            batches: per level [B, 32, h_l, w_l], from `extract`, of un-augmented normal images; sizes may differ.

        Raises:
            FeatureError: no batch, or images without any texture.
        """
        moments = RunningMoments(self.channels, self.mean.device)
        for features in batches:
            moments.update(features)
        means, variances = moments.result()
        std = torch.stack(variances).sqrt()
        if std.max() < _STD_FLOOR:
            raise FeatureError(
                "the training images are all of one color without any texture: no feature varies among them; "
                "check that the right images were read"
            )
        self.mean.copy_(torch.stack(means))
        self.std.copy_(std.clamp_min(_STD_FLOOR))
        self.cells_seen.copy_(torch.tensor(moments.count))
        self._fitted = True

    def without_statistics(self) -> GaborBackbone:
        """Return a filter bank of the same levels that has seen no image."""
        return GaborBackbone(self.levels).to(self.mean.device)

    def config(self) -> dict[str, Any]:
        """See `Backbone.config`."""
        return {"name": "gabor", "levels": list(self.levels)}

    def _raw(
        self,
        images: Tensor,  # [B, 3, H, W] float32 in [0, 1]
    ) -> list[Tensor]:  # per level [B, 32, H_l, W_l], before standardization
        pyramid = [_opponent(images)]
        for _ in range(self.levels[-1]):
            pyramid.append(_mean_pool(pyramid[-1], 2))
        energies = {
            scale: _amplitude(pyramid[scale][:, :1], self.first_order)
            for scale in sorted({level - offset for level in self.levels for offset in (0, 1)})
        }
        lines, contours = self._lines(pyramid[0][:, :1])
        return [
            torch.cat(
                [
                    *self._textures(energies[level - 1], energies[level]),
                    *_intensities(pyramid[level - 1]),
                    _max_pool(lines, 2**level),
                    _max_pool(contours, 2 ** (level - 1)),
                ],
                1,
            )
            for level in self.levels
        ]

    def _textures(
        self,
        fine: Tensor,  # [B, 6, 4 H_l, 4 W_l]
        coarse: Tensor,  # [B, 6, 2 H_l, 2 W_l]
    ) -> list[Tensor]:
        overall = _log(_mean_pool(fine.mean(1, keepdim=True), 2))
        second = _mean_pool(_amplitude(overall, self.second_order), 2)
        strongest = _max_pool(fine.amax(1, keepdim=True), 4)
        return [
            _log(_mean_pool(fine, 4)),
            _log(_mean_pool(coarse, 2)),
            torch.log(second + _SECOND_FLOOR),
            _log(strongest),
        ]

    def _lines(
        self,
        luma: Tensor,  # [B, 1, H, W]
    ) -> tuple[Tensor, Tensor]:  # [B, 2, H / 2, W / 2] and [B, 2, H / 4, W / 4], bright and dark
        # Every second pixel is enough: along a line the response varies slowly. At the image's edge a reflection would
        # bend every line into a corner and double one that runs along the edge: lines are continued straight, and no
        # contour is assumed outside the image.
        extended = F.pad(luma, (self.lines.shape[-1] // 2,) * 4, mode="replicate")
        response = F.conv2d(extended, self.lines, stride=2)
        lines = torch.cat([response.amax(1, keepdim=True), -response.amin(1, keepdim=True)], 1)
        contours = []
        for signed in (response, -response):
            margin = self.contours.shape[-1] // 2
            along = F.conv2d(_max_pool(signed, 2), self.contours, padding=margin, groups=len(self.contours))
            contours.append(along.amax(1, keepdim=True) - along.mean(1, keepdim=True))
        return lines, torch.cat(contours, 1)


def gabor_bank(orientations: int, wavelength: float, sigma: float, aspect: float, size: int) -> Tensor:
    """Return quadrature pairs of Gabor filters (Daugman 1985), all even ones before all odd ones.

        u = x cos t + y sin t,  v = -x sin t + y cos t,  w = exp(-(u^2 + aspect^2 v^2) / (2 sigma^2))
        even = w cos(2 pi u / wavelength) - d w,  odd = w sin(2 pi u / wavelength),  t = pi i / orientations

    d removes the mean of the even filter, so that neither responds to brightness; both have unit L2 norm.

    Returns:
        [2 orientations, 1, size, size] float32.
    """
    even, odd = [], []
    for u, v in _rotated_grids(orientations, size):
        window = torch.exp(-(u**2 + (aspect * v) ** 2) / (2 * sigma**2))
        even.append(_without_mean(window * torch.cos(2 * math.pi * u / wavelength), window))
        odd.append(window * torch.sin(2 * math.pi * u / wavelength))
    return torch.stack([kernel / kernel.norm() for kernel in [*even, *odd]])[:, None].float()


def line_bank(orientations: int, wavelength: float, sigma: float, length: float, size: int) -> Tensor:
    """Return long even filters: positive on a bright line, negative on a dark one, zero on edges and flat areas.

    With u, v and d as in `gabor_bank`:

        exp(-u^2 / (2 sigma^2) - v^2 / (2 length^2)) cos(2 pi u / wavelength), less d times the window, of unit L1 norm

    Returns:
        [orientations, 1, size, size] float32.
    """
    kernels = []
    for u, v in _rotated_grids(orientations, size):
        window = torch.exp(-(u**2) / (2 * sigma**2) - v**2 / (2 * length**2))
        kernel = _without_mean(window * torch.cos(2 * math.pi * u / wavelength), window)
        kernels.append(kernel / kernel.abs().sum())
    return torch.stack(kernels)[:, None].float()


def contour_bank(orientations: int, sigma: float, length: float, size: int) -> Tensor:
    """Return the weights of a mean along the lines of `line_bank`, one filter per orientation.

    Proportional to exp(-u^2 / (2 sigma^2) - v^2 / (2 length^2)), with u and v as in `gabor_bank`.

    Returns:
        [orientations, 1, size, size] float32, each of sum 1.
    """
    windows = [
        torch.exp(-(u**2) / (2 * sigma**2) - v**2 / (2 * length**2)) for u, v in _rotated_grids(orientations, size)
    ]
    return torch.stack([window / window.sum() for window in windows])[:, None].float()


def _rotated_grids(orientations: int, size: int) -> Iterable[tuple[Tensor, Tensor]]:
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    for index in range(orientations):
        angle = math.pi * index / orientations
        yield x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


def _without_mean(kernel: Tensor, window: Tensor) -> Tensor:
    return kernel - window * (kernel.sum() / window.sum())


def _opponent(images: Tensor) -> Tensor:
    images = images.clamp(0, 1)
    red, green, blue = images.sqrt().split(1, 1)
    luma = sum(weight * channel for weight, channel in zip(_LUMA, images.split(1, 1), strict=True))
    return torch.cat([torch.as_tensor(luma).sqrt(), red - green, (red + green) / 2 - blue], 1)


def _amplitude(
    image: Tensor,  # [B, 1, H, W]
    bank: Tensor,  # [2 T, 1, S, S]
) -> Tensor:  # [B, T, H, W]
    even, odd = F.conv2d(_reflect(image, bank.shape[-1] // 2), bank).chunk(2, 1)
    return (even.square() + odd.square() + _TINY).sqrt()


def _intensities(image: Tensor) -> list[Tensor]:
    mean = _mean_pool(image, 4)
    deviation = (_mean_pool(image.square(), 4) - mean.square()).clamp_min(0).sqrt()
    around = F.avg_pool2d(_reflect(mean, 2), 5, stride=1)
    luma, middle = image[:, :1], mean[:, :1]
    above = _max_pool(luma, 4) - middle
    below = middle + _max_pool(-luma, 4)
    return [mean, _log(deviation), mean - around, above, below]


def _mean_pool(image: Tensor, size: int) -> Tensor:
    return F.avg_pool2d(image, size, ceil_mode=True)


def _max_pool(image: Tensor, size: int) -> Tensor:
    return F.max_pool2d(image, size, ceil_mode=True)


def _reflect(image: Tensor, width: int) -> Tensor:
    return F.pad(image, (width,) * 4, mode="reflect")


def _log(energy: Tensor) -> Tensor:
    return torch.log(energy + _ENERGY_FLOOR)


def _column(values: Tensor) -> Tensor:
    return values[:, None, None]


def _note_statistics(module: nn.Module, _: object) -> None:
    assert isinstance(module, GaborBackbone)
    module._fitted = bool((module.cells_seen > 0).all())
