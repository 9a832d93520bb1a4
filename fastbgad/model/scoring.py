"""From log-likelihoods to scores and decisions: calibration constants, anomaly maps, sides of the boundary.

    anomaly_map = offset - sum over levels of w_l * upsample(exp(lp_l - m_l))

with m_l the largest lp of a training normal. The official code subtracts each level's maximum over the *whole test
set*, so an image's score changes with the images tested beside it. Here the constants come from the training normals
and belong to the model; the official calibration is the named alternative `official_anomaly_maps`.

The weights are proportional to the levels' channels (`level_weights`), where the official code has equal ones: lp is a
mean over channels, and the levels with more of them tell more. The weights are not stored separately:
w * exp(lp - m) = exp(lp - (m - log w)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import LevelWeights
from ..ops import Impl, boundary, score_map

DECISIONS = ("normal", "margin", "anomalous")
"""Names of the sides 0, 1 and 2 of the boundary."""


class Calibration(NamedTuple):
    """The constants that turn log-likelihoods into scores and decisions, all from training normals."""

    level_max: Tensor  # [L], the largest lp of a training normal at each level, less the logarithm of its weight
    offset: Tensor  # scalar, the largest weighted sum of likelihoods of a training normal's map
    boundaries: Tensor  # [L, 2], b_n and b_a in units of lp / normalizer


def level_weights(kind: LevelWeights, channels: Sequence[int]) -> list[float]:
    """Return the weight of each level in the anomaly map; their mean is 1."""
    if kind == "equal":
        return [1.0] * len(channels)
    return [len(channels) * count / sum(channels) for count in channels]


def calibrate(
    levels: Sequence[Tensor],  # each [n, h_l, w_l], lp of all training normals
    size: tuple[int, int],
    *,
    beta: float,
    tau: float,
    normalizer: float,
    weights: Sequence[float] | None = None,
) -> Calibration:
    """Return the constants of a trained model, from its training normals' log-likelihoods.

    Args:
        levels: of all training normals.
        size: (height, width) of the anomaly map.
        beta, tau, normalizer: of the boundary, see `fastbgad.ops.boundary`.
        weights: of the levels in the anomaly map, positive; all 1 if None.
    """
    logs = [math.log(weight) for weight in weights or [1.0] * len(levels)]
    level_max = torch.stack([lp.max() - log for lp, log in zip(levels, logs, strict=True)])
    edges = []
    for lp in levels:
        rows = lp.reshape(-1)
        edge = boundary(rows, torch.zeros_like(rows, dtype=torch.bool), beta=beta, tau=tau, normalizer=normalizer)
        edges.append(torch.stack([edge.b_n, edge.b_a]))
    # With offset 0 the map is the negative summed likelihood.
    lowest = [
        score_map([lp[i : i + 1] for lp in levels], size, level_max, 0.0).anomaly_map.min()
        for i in range(len(levels[0]))
    ]
    return Calibration(level_max, -torch.stack(lowest).min(), torch.stack(edges))


def map_thresholds(calibration: Calibration, normalizer: float) -> Tensor:
    """Return the scores [2] of a pixel that lies on b_n, and on b_a, at every level at once.

        threshold(b) = offset - sum over levels of w_l * exp(normalizer * b_l - m_l)

    They carry the explicit boundary from the levels to the anomaly map.
    """
    lp = normalizer * calibration.boundaries  # [L, 2]
    return calibration.offset - torch.exp(lp - calibration.level_max[:, None]).sum(dim=0)


def sides(values: Tensor, normal_edge: Tensor | float, anomalous_edge: Tensor | float) -> Tensor:
    """Return the side of the boundary of scores, uint8: 0 normal, 1 in the margin, 2 beyond the anomalous boundary.

    `values` and edges are scores: higher is more anomalous.
    """
    return (values > normal_edge).to(torch.uint8) + (values > anomalous_edge).to(torch.uint8)


def patch_sides(levels: Sequence[Tensor], boundaries: Tensor, normalizer: float) -> tuple[Tensor, ...]:
    """Return the side of every patch of every level, uint8 [B, h_l, w_l], by its own level's b_n and b_a."""
    return tuple(
        sides(-lp / normalizer, -b_n, -b_a) for lp, (b_n, b_a) in zip(levels, boundaries.unbind(0), strict=True)
    )


def official_anomaly_maps(
    levels: Sequence[Tensor],  # each [n, h_l, w_l], lp of the whole test set
    size: tuple[int, int],
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Return the anomaly maps [n, H, W] of a whole test set with the official calibration.

    Each level's maximum and the maximum of the sum are taken over the set given, so scores of different sets do not
    compare. Source: the official BGAD.
    """
    level_max = torch.stack([lp.max() for lp in levels])
    maps = score_map(levels, size, level_max, 0.0, impl=impl).anomaly_map
    return maps - maps.min()
