"""From the log-likelihoods of the levels to the anomaly map (official BGAD and CFLOW-AD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upsample_bilinear(
    values: Tensor,  # [B, h, w]
    size: tuple[int, int],
) -> Tensor:
    """Upsample to [B, H, W], bilinearly with aligned corners: output pixel i reads at i (h - 1) / (H - 1)."""
    rows_low, rows_high, rows_weight = _sources(values.shape[1], size[0], values.dtype)
    columns_low, columns_high, columns_weight = _sources(values.shape[2], size[1], values.dtype)
    rows = values[:, rows_low] * (1 - rows_weight)[:, None] + values[:, rows_high] * rows_weight[:, None]
    return rows[:, :, columns_low] * (1 - columns_weight) + rows[:, :, columns_high] * columns_weight


def _sources(length: int, target: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    position = torch.arange(target, dtype=dtype) * ((length - 1) / (target - 1) if target > 1 else 0.0)
    low = position.floor().long().clamp(max=length - 1)
    return low, (low + 1).clamp(max=length - 1), position - low


def score_map(
    levels: Sequence[Tensor],  # each [B, h_l, w_l]: lp
    size: tuple[int, int],
    level_max: Tensor,  # [L]
    offset: Tensor | float,
) -> Tensor:
    """Return the anomaly map [B, H, W]: high where the patches are unlikely.

    score = offset - sum over levels of upsample(exp(lp_l - level_max_l))
    """
    likelihoods = [upsample_bilinear(torch.exp(lp - level_max[i]), size) for i, lp in enumerate(levels)]
    return offset - torch.stack(likelihoods).sum(dim=0)
