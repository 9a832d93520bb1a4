"""The float64 reference of standardized features.

With mean mu and covariance S over all patches of the training normals, each level by itself:

    channel   y = (x - mu) / sqrt(diag S)
    whiten    y = (S + r I)^(-1/2) (x - mu),    r = RIDGE * trace(S) / C

The inverse root is the symmetric one (ZCA). A channel that hardly varies is divided by a small part of what the
channels of its level vary by, in place of nearly zero; the ridge does the same for directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOOR = 0.05
"""Least standard deviation, in units of the root mean square of the standard deviations of the level's channels."""
RIDGE = 0.01
"""What whitening adds to every variance, in units of the mean variance of the level's channels."""


def channel_statistics(
    batches: Sequence[Tensor],  # each [B, C, h, w]
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, float64 [C] each, in two passes over all patches of all batches."""
    mean, covariance = _moments(batches)
    std = covariance.diagonal().sqrt()
    floor = FLOOR * (std.square().sum() / len(std)).sqrt()
    return mean, torch.where(std > floor, std, floor)


def whitening_statistics(
    batches: Sequence[Tensor],  # each [B, C, h, w]
) -> tuple[Tensor, Tensor]:
    """Return the mean [C] and the whitening matrix [C, C], float64, in two passes over all patches of all batches."""
    mean, covariance = _moments(batches)
    ridge = RIDGE * covariance.trace() / len(mean)
    values, vectors = torch.linalg.eigh(covariance + ridge * torch.eye(len(mean), dtype=torch.float64))
    return mean, vectors @ torch.diag(values**-0.5) @ vectors.T


def standardize(
    features: Tensor,  # [B, C, h, w]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C], what channels are divided by, or [C, C], the whitening matrix
) -> Tensor:
    """Return the standardized features, float64 [B, C, h, w]."""
    centered = features.double() - mean.double()[:, None, None]
    if scale.ndim == 1:
        return centered / scale.double()[:, None, None]
    return torch.einsum("dc,bchw->bdhw", scale.double(), centered)


def _moments(batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    rows = torch.cat([batch.detach().double().permute(0, 2, 3, 1).flatten(0, 2) for batch in batches])  # [N, C]
    mean = rows.sum(0) / len(rows)
    return mean, (rows - mean).T @ (rows - mean) / len(rows)
