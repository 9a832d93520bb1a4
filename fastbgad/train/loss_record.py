"""Losses of a training pass: sums over chunks, which stay on the device until they are shown."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import SppLoss

# Columns of the sums, per level: the terms of SppLoss and its counts of violating rows, the boundaries, then how many
# chunks went into the former and how many into the boundaries (a chunk without a normal row has none).
_LOSSES = ("total", "ml", "normal", "anomalous", "normal_violations", "anomalous_violations")
_BOUNDARIES = ("b_n", "b_a")
COLUMNS = len(_LOSSES) + len(_BOUNDARIES) + 2


def loss_row(loss: SppLoss) -> Tensor:
    """Return the row that one chunk adds to the sums of its level, [COLUMNS], on the device."""
    edges = torch.stack([getattr(loss, name) for name in _BOUNDARIES])
    has_boundary = ~torch.isnan(edges[:1])
    losses = torch.stack([getattr(loss, name).detach().to(edges.dtype) for name in _LOSSES])
    one = torch.ones_like(losses[:1])
    return torch.cat([losses, torch.where(has_boundary, edges, 0), one, has_boundary])


def mean_losses(sums: Tensor) -> dict[str, float]:
    """Return the means of sums [levels, COLUMNS]; waits for the device.

    Losses and violating rows (normal ones below b_n, anomalous ones above b_a) per chunk, boundaries per level.
    """
    rows = sums.tolist()
    chunks = max(sum(row[-2] for row in rows), 1)
    names = ("loss", "loss_ml", "loss_n", "loss_a", "violating_n", "violating_a")
    record = {name: sum(row[column] for row in rows) / chunks for column, name in enumerate(names)}
    for level, row in enumerate(rows):
        for column, name in enumerate(_BOUNDARIES, start=len(_LOSSES)):
            record[f"{name}_{level}"] = row[column] / max(row[-1], 1)
    return record
