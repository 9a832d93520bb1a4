"""Standardization of features to mean 0 and variance 1 on the training normals, at every level.

    channel   y = (x - mu) / sqrt(diag S)
    whiten    y = (S + r I)^(-1/2) (x - mu)

with mean mu and covariance S of the level's patches. A new flow is nearly a rotation: on whitened features its
log-likelihood starts out as that of the Gaussian fitted to the normals, and training improves on that. Features of
timm models are far from it: their channels are correlated, with standard deviations up to 7, and a short training ends
before the flow has learned that. `fastbgad.reference.standardization` is the float64 reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import FeatureError
from ..reference.standardization import FLOOR, RIDGE

Standardize = Literal["whiten", "channel", "none"]
"""Standardization of a backbone's features before a flow sees them."""


class RunningMoments:
    """Mean and variance, or covariance, of the channels of several levels, in one pass, in float64.

    Partial sums are merged by the update of Chan, Golub and LeVeque (1983), which does not cancel.

    Args:
        channels: number of channels of each level.
        device: of the sums.
        covariance: sum products of all pairs of channels, not squares alone.
    """

    def __init__(
        self, channels: Sequence[int], device: torch.device | str = "cpu", *, covariance: bool = False
    ) -> None:
        self.count: list[int] = [0] * len(channels)
        self._covariance = covariance
        self._mean = [torch.zeros(c, dtype=torch.float64, device=device) for c in channels]
        shapes = [(c, c) if covariance else (c,) for c in channels]
        self._products = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]

    def update(
        self,
        features: Sequence[Tensor],  # per level [B, C_l, h_l, w_l]
    ) -> None:
        """Add a batch of feature maps."""
        for level, maps in enumerate(features):
            rows = maps.detach().double().movedim(1, 0).flatten(1)  # [C, N]
            added, total = rows.shape[1], self.count[level] + rows.shape[1]
            added_mean = rows.mean(1)
            shift = added_mean - self._mean[level]
            rows = rows - added_mean[:, None]
            products = rows @ rows.T if self._covariance else rows.square().sum(1)
            between = torch.outer(shift, shift) if self._covariance else shift.square()
            self._products[level] += products + between * (self.count[level] * added / total)
            self._mean[level] += shift * (added / total)
            self.count[level] = total

    def result(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return per level the mean float64 [C_l] and the population variance [C_l] or covariance [C_l, C_l].

        Raises:
            FeatureError: there was no batch.
        """
        if not all(self.count):
            raise FeatureError("no images to learn the feature statistics from: fit() got no batch of normal images")
        return self._mean, [products / count for products, count in zip(self._products, self.count, strict=True)]


class Standardization(nn.Module):
    """Per level the statistics of a backbone's features, and their application.

    They are buffers, so they are part of the model's checkpoints, exported graphs and fingerprints. Level l has
    `mean_l` [C_l] and `scale_l`: what each channel is divided by [C_l], or the whitening matrix [C_l, C_l].

    Args:
        channels: number of channels of each level.
        kind: divide each channel by its deviation, or whiten.
    """

    rows_seen: Tensor

    def __init__(self, channels: Sequence[int], kind: Standardize = "channel") -> None:
        super().__init__()
        self.channels: tuple[int, ...] = tuple(channels)
        self.kind: Standardize = kind
        for level, count in enumerate(self.channels):
            self.register_buffer(f"mean_{level}", torch.zeros(count))
            self.register_buffer(f"scale_{level}", torch.eye(count) if kind == "whiten" else torch.ones(count))
        self.register_buffer("rows_seen", torch.zeros(len(self.channels), dtype=torch.int64))
        # Not read from the buffer: reading from a GPU at each forward would stall it.
        self.fitted: bool = False
        self.register_load_state_dict_post_hook(_note_statistics)

    def statistics(self, level: int) -> tuple[Tensor, Tensor]:
        """Return mean and scale of a level."""
        return self.get_buffer(f"mean_{level}"), self.get_buffer(f"scale_{level}")

    @torch.no_grad()
    def fit(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Learn the statistics from batches of the features [B, C_l, h_l, w_l] of normal images, in one pass.

        A channel whose standard deviation is below `FLOOR` times the root mean square of its level's is divided by
        that; whitening adds `RIDGE` times the mean variance to every variance. An earlier call's result is replaced.

        Raises:
            FeatureError: no batch, features that are not finite, or a level in which nothing varies.
        """
        moments = RunningMoments(self.channels, self.rows_seen.device, covariance=self.kind == "whiten")
        for features in batches:
            moments.update(features)
        learned = []
        for level, (mean, spread) in enumerate(zip(*moments.result(), strict=True)):
            if not bool(torch.isfinite(mean).all() and torch.isfinite(spread).all()):
                raise FeatureError(
                    f"features of level {level} contain NaN or Inf; check the backbone's weights and precision "
                    "(float16 overflows in some backbones: use float32 or bfloat16)"
                )
            variance = (spread.diagonal() if spread.ndim == 2 else spread).mean()
            # Rounding leaves a little variance where there is none.
            if variance.sqrt() <= 1e-6 * mean.abs().max().clamp_min(1e-6):
                raise FeatureError(
                    f"the features of level {level} do not vary among the training images, so they cannot be "
                    "standardized; check that the right images were read, or leave the features as they are "
                    "(--standardize none)"
                )
            if spread.ndim == 2:
                values, vectors = torch.linalg.eigh(spread)
                scale = (vectors * (values.clamp_min(0) + RIDGE * variance).rsqrt()) @ vectors.T
            else:
                scale = spread.sqrt().clamp_min(FLOOR * float(variance.sqrt()))
            learned.append((mean, scale))
        for level, (mean, scale) in enumerate(learned):
            for buffer, value in zip(self.statistics(level), (mean, scale), strict=True):
                buffer.copy_(value)
        self.rows_seen.copy_(torch.tensor(moments.count))
        self.fitted = True

    def level(self, level: int, features: Tensor) -> Tensor:
        """Return the standardized features [B, C, h, w] of one level: computed in float32, in the type they came in.

        Raises:
            FeatureError: no statistics have been learned or loaded.
        """
        if not self.fitted:
            raise FeatureError(
                "the backbone has no feature statistics yet: call fit() with batches of normal training images, as "
                'training does, load a state dict saved after that, or build it with standardize="none"'
            )
        mean, scale = self.statistics(level)
        wide = torch.promote_types(features.dtype, torch.float32)
        if self.kind == "whiten":
            # Not a convolution, which a GPU would compute in TF32. With channels last, nothing is moved.
            rows = (features.permute(0, 2, 3, 1).to(wide) - mean) @ scale.T.to(wide)
            return rows.to(features.dtype).permute(0, 3, 1, 2)
        return ((features.to(wide) - mean[:, None, None]) / scale[:, None, None]).to(features.dtype)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the standardized features of all levels."""
        return [self.level(level, maps) for level, maps in enumerate(features)]

    def extra_repr(self) -> str:
        return f"channels={self.channels}, kind={self.kind!r}, fitted={self.fitted}"


def _note_statistics(module: nn.Module, _: object) -> None:
    assert isinstance(module, Standardization)
    module.fitted = bool((module.rows_seen > 0).all())
