"""Features on one scale: every channel of every level with mean 0 and standard deviation 1 on the training normals.

    y = (x - mean_c) / std_c

A flow starts out as if its input had this scale. Features of timm models do not: their channels' standard deviations
reach 7 and differ from channel to channel, and a short training ends before the flow has learned that.
`fastbgad.reference.standardization` is the float64 reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import FeatureError
from ..reference.standardization import FLOOR

Standardize = Literal["channel", "none"]
"""What is done to a backbone's features before a flow sees them."""


class RunningMoments:
    """Mean and standard deviation of the channels of several levels, in one pass, in float64.

    Partial sums are merged by the update of Chan, Golub and LeVeque (1983), which does not cancel.

    Args:
        channels: number of channels of each level.
        device: where the sums are kept.
    """

    def __init__(self, channels: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.count = [0] * len(channels)
        self._mean = [torch.zeros(c, dtype=torch.float64, device=device) for c in channels]
        self._squares = [torch.zeros(c, dtype=torch.float64, device=device) for c in channels]

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
            deviations = (rows - added_mean[:, None]).square().sum(1)
            self._squares[level] += deviations + shift**2 * (self.count[level] * added / total)
            self._mean[level] += shift * (added / total)
            self.count[level] = total

    def result(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return per level the mean and the population standard deviation of each channel, float64 [C_l].

        Raises:
            FeatureError: there was no batch.
        """
        if not all(self.count):
            raise FeatureError("no images to learn the feature statistics from: fit() got no batch of normal images")
        stds = [(squares / count).sqrt() for squares, count in zip(self._squares, self.count, strict=True)]
        return self._mean, stds


class Standardization(nn.Module):
    """Per level and channel the mean and standard deviation of a backbone's features, and their application.

    The statistics are buffers, so they travel with the model: into checkpoints, exported graphs and fingerprints.

    Args:
        channels: number of channels of each level.
    """

    rows_seen: Tensor

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(channels)
        for level, count in enumerate(self.channels):
            self.register_buffer(f"mean_{level}", torch.zeros(count))
            self.register_buffer(f"std_{level}", torch.ones(count))
        self.register_buffer("rows_seen", torch.zeros(len(self.channels), dtype=torch.int64))
        # Kept apart from the buffer: asking a GPU at each forward would stall it.
        self.fitted = False
        self.register_load_state_dict_post_hook(_note_statistics)

    @torch.no_grad()
    def fit(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Learn the statistics from batches of the features [B, C_l, h_l, w_l] of normal images, in one pass.

        A channel whose standard deviation is below `FLOOR` times the root mean square of its level's is divided by
        that. What an earlier call learned is replaced.

        Raises:
            FeatureError: no batch, features that are not finite, or a level in which nothing varies.
        """
        moments = RunningMoments(self.channels, self.rows_seen.device)
        for features in batches:
            moments.update(features)
        for level, (mean, std) in enumerate(zip(*moments.result(), strict=True)):
            if not bool(torch.isfinite(mean).all() and torch.isfinite(std).all()):
                raise FeatureError(
                    f"features of level {level} contain NaN or Inf; check the backbone's weights and precision "
                    "(float16 overflows in some backbones: use float32 or bfloat16)"
                )
            spread = std.square().mean().sqrt()
            # Rounding leaves a little variance where there is none.
            if spread <= 1e-6 * mean.abs().max().clamp_min(1e-6):
                raise FeatureError(
                    f"the features of level {level} do not vary among the training images, so they cannot be "
                    "standardized; check that the right images were read, or leave the features as they are "
                    "(--standardize none)"
                )
            self.get_buffer(f"mean_{level}").copy_(mean)
            self.get_buffer(f"std_{level}").copy_(std.clamp_min(FLOOR * float(spread)))
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
        mean = self.get_buffer(f"mean_{level}")[:, None, None]
        std = self.get_buffer(f"std_{level}")[:, None, None]
        wide = torch.promote_types(features.dtype, torch.float32)
        return ((features.to(wide) - mean) / std).to(features.dtype)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the standardized features of all levels."""
        return [self.level(level, maps) for level, maps in enumerate(features)]

    def extra_repr(self) -> str:
        return f"channels={self.channels}, fitted={self.fitted}"


def _note_statistics(module: nn.Module, _: object) -> None:
    assert isinstance(module, Standardization)
    module.fitted = bool((module.rows_seen > 0).all())
