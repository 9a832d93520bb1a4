"""The base of frozen feature extractors: levels, checked images, a configuration and a fingerprint."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import FeatureError
from ..system.checkpoint import checksum
from .standardization import Standardization

# Resizing with a sharp kernel overshoots [0, 1] a little, which is harmless; images in 0..255, or already divided by
# a standard deviation, go far beyond and would give wrong features without any other sign.
_OVERSHOOT = 0.5


class Backbone(nn.Module):
    """A frozen feature extractor: no parameter asks for a gradient and `train()` leaves it in evaluation mode.

    Features are extracted, then standardized by statistics of the training normals, if the backbone has any.

    Attributes:
        channels: number of channels of each level.
        strides: image pixels per patch of each level, along a side.
        standardization: statistics of the features; None leaves them as they are.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    standardization: Standardization | None

    def __init__(self) -> None:
        super().__init__()
        self.standardization = None

    def forward(self, images: Tensor) -> list[Tensor]:
        """Extract the features of a batch of images and standardize them.

        Args:
            images: [B, 3, H, W] RGB, uint8 in 0..255 or floating point in [0, 1]; each backbone normalizes them itself.

        Returns:
            One floating point tensor [B, C_l, H_l, W_l] per level.

        Raises:
            FeatureError: the images have another shape, dtype or range, or are smaller than a patch; or `fit` must be
                called first.
        """
        return [self.standardize_level(level, maps) for level, maps in enumerate(self.extract(images))]

    def extract(self, images: Tensor) -> list[Tensor]:
        """Return the features as they are before standardization; see `forward`."""
        raise NotImplementedError

    def check_image_size(self, height: int, width: int) -> None:
        """Raise `FeatureError` for images of a size that the backbone cannot take, before there are any."""

    def standardize_level(self, level: int, features: Tensor) -> Tensor:
        """Return the standardized features [B, C, h, w] of one level, from those that `extract` gives."""
        return features if self.standardization is None else self.standardization.level(level, features)

    @property
    def needs_fit(self) -> bool:
        """True if `fit` must see training images before the first forward."""
        return self.standardization is not None and not self.standardization.fitted

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor]) -> None:
        """Learn the feature statistics from batches of un-augmented normal images, if the backbone keeps any.

        Args:
            batches: [B, 3, H, W] tensors as for `forward`.

        Raises:
            FeatureError: images or features that no statistics can be learned from.
        """
        self.fit_features(self.extract(images) for images in batches)

    def fit_features(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Learn the feature statistics as `fit` does, from features that `extract` gave."""
        if self.standardization is not None:
            self.standardization.fit(batches)

    def without_statistics(self) -> Self:
        """Return a backbone with the same network, which is shared, and no feature statistics: for other images."""
        other = copy.copy(self)
        if self.standardization is not None:
            fresh = Standardization(self.channels, self.standardization.kind)
            fresh = fresh.to(self.standardization.rows_seen.device)
            other._modules = {**self._modules, "standardization": fresh}
        return other

    def config(self) -> dict[str, Any]:
        """Return the arguments of `create_backbone` that build this backbone again, weights aside, for JSON."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return the SHA-256 over the configuration and every tensor, as 64 hexadecimal digits.

        Two backbones with the same fingerprint compute the same features, so caches and checkpoints are bound to it.
        """
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        return checksum(on_cpu, json.dumps(self.config(), sort_keys=True))

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode whatever `mode` is: a frozen network must not update its batch statistics."""
        return super().train(False)

    def _freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()


def check_smallest(height: int, width: int, smallest: int) -> None:
    """Raise `FeatureError` for images with a side of less than `smallest` pixels."""
    if min(height, width) < smallest:
        raise FeatureError(
            f"images of {height} x {width} pixels are too small for this backbone: "
            f"each side needs at least {smallest}; resize them"
        )


def unit_range(
    images: Tensor,  # [B, 3, H, W] uint8 or floating point
    smallest: int,
) -> Tensor:
    """Check images and convert them to float32 in [0, 1].

    Args:
        images: RGB, uint8 in 0..255 or floating point in [0, 1].
        smallest: least height and width, in pixels.

    Raises:
        FeatureError: naming what is wrong with the shape, the dtype or the values.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise FeatureError(f"images have the shape {list(images.shape)}; expected [batch, 3, height, width] in RGB")
    if images.shape[0] == 0:
        raise FeatureError("the batch holds no image")
    check_smallest(images.shape[2], images.shape[3], smallest)
    if images.dtype == torch.uint8:
        return images.to(torch.float32) / 255
    if not images.is_floating_point():
        raise FeatureError(f"images are {images.dtype}; expected uint8 in 0..255 or floating point in [0, 1]")
    images = images.to(torch.float32)
    # A traced graph cannot branch on values; whoever compiles the whole backbone checks the images outside.
    if not torch.compiler.is_compiling():
        low, high = (bound.item() for bound in torch.aminmax(images))
        # NaN fails every comparison.
        if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):
            raise FeatureError(
                f"floating point images span {low:.4g} to {high:.4g}; expected [0, 1] without NaN or Inf "
                "(divide 8-bit values by 255, and leave the normalization to the backbone)"
            )
    return images
