"""The explicit boundary in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def portable_boundary(
    lp: Tensor,  # [N] float32 or float64, detached
    anomalous: Tensor,  # [N] bool
    beta: float,
    tau: float,
    normalizer: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return b_n, b_a and n_normal by a sort of all rows."""
    n_normal = (~anomalous).sum()
    if len(lp) == 0:
        nothing = lp.new_full((), float("nan"))
        return nothing, nothing.clone(), n_normal
    # Anomalous rows move behind all normal ones, among the NaN, so the normal order statistic keeps its position.
    behind = torch.where(anomalous, torch.nan, lp)
    position = (n_normal.double() * beta).long()
    value = torch.sort(behind).values.gather(0, position.reshape(1))[0]
    b_n = torch.where(n_normal > 0, value / normalizer, torch.nan)
    return b_n, b_n - tau, n_normal
