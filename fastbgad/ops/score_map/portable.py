"""The anomaly map in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def portable_score_map(
    levels: Sequence[Tensor],  # each [B, h_l, w_l]
    size: tuple[int, int],
    level_max: Tensor,  # [L]
    offset: Tensor | float,
) -> Tensor:
    """Return the anomaly map [B, H, W]; no level's upsampled map outlives its addition."""
    total = None
    for lp, constant in zip(levels, level_max, strict=True):
        likelihood = torch.exp(lp - constant)[:, None]
        upsampled = interpolate(likelihood, size=size, mode="bilinear", align_corners=True)[:, 0]
        total = upsampled if total is None else total.add_(upsampled)
    assert total is not None
    return offset - total
