"""The float64 reference of standardized features.

    y[b, c, h, w] = (x[b, c, h, w] - mean[c]) / std[c]

with mean and (population) standard deviation over all patches of the training normals, each level by itself. A channel
that hardly varies is divided by a small part of what the channels of its level vary by, in place of nearly zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOOR = 0.05
"""Least standard deviation, in units of the root mean square of the standard deviations of the level's channels."""


def channel_statistics(
    batches: Sequence[Tensor],  # each [B, C, h, w]
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, float64 [C] each, in two passes over all patches of all batches."""
    rows = torch.cat([batch.detach().double().permute(0, 2, 3, 1).flatten(0, 2) for batch in batches])  # [N, C]
    mean = rows.sum(0) / len(rows)
    std = ((rows - mean).square().sum(0) / len(rows)).sqrt()
    floor = FLOOR * (std.square().sum() / len(std)).sqrt()
    return mean, torch.where(std > floor, std, floor)


def standardize(
    features: Tensor,  # [B, C, h, w]
    mean: Tensor,  # [C]
    std: Tensor,  # [C]
) -> Tensor:
    """Return the standardized features, float64 [B, C, h, w]."""
    return (features.double() - mean.double()[:, None, None]) / std.double()[:, None, None]
