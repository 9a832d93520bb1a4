"""CFLOW-AD: anomalib's Cflow with fastbgad's flows, trained on whole images of features and scored as its authors do.

What differs from anomalib's own Cflow:

- its flows are computed by fastbgad (`fastbgad.accelerate`), and in training take 256 patches at a time, as in the
  authors' code, where anomalib takes 64; like theirs, an epoch leaves an incomplete last batch of images out;
- likelihoods are scaled by the largest of the whole test set, as in the authors' code. anomalib takes the largest of
  each batch, so that the scores of two batches would not compare.

Source: Gudovskiy et al., *CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization via Conditional
Normalizing Flows*, WACV 2022.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...compat.freia import accelerate
from ...model.scoring import official_anomaly_maps

_PATCHES = 256  # per step of the optimizer


class LevelRecorder(nn.Module):
    """Replacement for the Cflow's map generator that stores log-likelihoods, batch by batch."""

    def __init__(self) -> None:
        super().__init__()
        self._levels: list[list[Tensor]] = []  # per batch, per level

    def forward(
        self, distribution: list[Tensor], height: list[int], width: list[int], image_size: tuple[int, int]
    ) -> Tensor:
        """Store lp [B * h * w] of every level; return zeros [B, H, W], since the maps need all batches."""
        levels = [
            lp.detach().view(-1, h, w).float().cpu() for lp, h, w in zip(distribution, height, width, strict=True)
        ]
        self._levels.append(levels)
        return torch.zeros(len(levels[0]), *image_size, device=distribution[0].device)

    def maps(self, size: tuple[int, int]) -> Tensor:
        """Return the maps [n, H, W] of all images so far: exp(lp - max) of the levels, upsampled, summed, inverted."""
        return official_anomaly_maps([torch.cat(parts) for parts in zip(*self._levels, strict=True)], size)


def prepare(model: Any, size: tuple[int, int], batch_size: int) -> LevelRecorder:
    """Accelerate a Lightning `Cflow` in place, and make it record log-likelihoods in place of maps.

    Args:
        model: anomalib's Cflow, untrained.
        size: height and width of the images.
        batch_size: images in a training batch.
    """
    accelerate(model)
    recorder = LevelRecorder()
    model.model.anomaly_map_generator = recorder
    # anomalib refuses a level with fewer patches in a batch than a step takes
    stride = max(model.model.encoder.reductions)
    coarsest = batch_size * math.ceil(size[0] / stride) * math.ceil(size[1] / stride)
    model.model.fiber_batch_size = min(_PATCHES, coarsest)
    return recorder
