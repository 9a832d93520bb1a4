"""The losses: maximum likelihood, boundary-guided semi-push-pull with focal weights, and a contrastive baseline.

Source: Yao et al., CVPR 2023, and the official code where the two differ (each difference is a named option).
u stands for lp / normalizer throughout. Rows are selected with boolean indices, as in the equations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .boundary import boundary

# The focal weights always look at lp / 10, whatever the normalizer of the semi-push-pull loss is.
FOCAL_NORMALIZER = 10.0
# The weight of an anomalous row is unbounded at u = 0; |u| is held above this, so that one such row cannot turn the
# loss infinite. The official code has no such bound.
FOCAL_SMALLEST_U = 1e-6


class SppLoss(NamedTuple):
    """Terms of the loss of one chunk of rows: scalars."""

    total: Tensor  # L_ml + lambda (L_n + L_a)
    ml: Tensor  # L_ml over the normal rows
    normal: Tensor  # L_n, semi-pull
    anomalous: Tensor  # L_a, semi-push
    b_n: Tensor  # boundary of the normals, detached
    b_a: Tensor  # b_n - tau
    normal_violations: Tensor  # int64, number of normal rows with u <= b_n
    anomalous_violations: Tensor  # int64, number of anomalous rows with u >= b_a, also if L_a is not in the total


def ml_loss(lp: Tensor, channels: int, form: str) -> Tensor:
    """Return L_ml of each row [N]: -log sigmoid(lp) (official code) or -lp * C, the exact likelihood (slides)."""
    if form == "logsigmoid":
        return -logsigmoid(lp)
    if form == "nll":
        return -lp * channels
    raise ValueError(f"unknown form of L_ml {form!r}")


def focal_weights(lp: Tensor, anomalous: Tensor) -> Tensor:
    """Return the official code's focal weights [N], detached: hard rows count more.

    normal rows:     w = 1                            if u > -0.2, else 11.7 (1 - e^u)^0.5 |u|
    anomalous rows:  w = 0.53 (1 + e^u)^2 / |u|       if u > -1,   else 1
    """
    u = lp.detach() / FOCAL_NORMALIZER
    weights = torch.ones_like(u)
    hard_normal = ~anomalous & (u <= -0.2)
    weights[hard_normal] = 11.7 * torch.sqrt(1 - torch.exp(u[hard_normal])) * torch.abs(u[hard_normal])
    hard_anomalous = anomalous & (u > -1)
    weights[hard_anomalous] = (
        0.53 * (1 + torch.exp(u[hard_anomalous])) ** 2 / torch.abs(u[hard_anomalous]).clamp(min=FOCAL_SMALLEST_U)
    )
    return weights


def semi_push_pull(
    u: Tensor,  # [N]
    anomalous: Tensor,  # [N] bool
    b_n: Tensor,
    b_a: Tensor,
    weights: Tensor,  # [N]
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Return L_n and L_a.

        L_n = sum over normals of |min(u - b_n, 0)|,        L_a = sum over anomalies of |max(u - b_a, 0)|

    `reduction` "sum" is the slides' equation; "mean" divides each term by its number of violating rows, as the
    official code does. Without a violator a term is 0 and so is its gradient.
    """
    violating_normal = ~anomalous & (u <= b_n)
    violating_anomalous = anomalous & (u >= b_a)
    pull = (weights * (b_n - u))[violating_normal].sum()
    push = (weights * (u - b_a))[violating_anomalous].sum()
    if reduction == "sum":
        return pull, push
    if reduction == "mean":
        return pull / max(int(violating_normal.sum()), 1), push / max(int(violating_anomalous.sum()), 1)
    raise ValueError(f"unknown reduction {reduction!r}")


def spp_loss(
    lp: Tensor,  # [N]
    anomalous: Tensor,  # [N] bool
    channels: int,
    *,
    beta: float = 0.01,
    tau: float = 0.1,
    lam: float = 1.0,
    normalizer: float = 10.0,
    ml_form: str = "logsigmoid",
    reduction: str = "mean",
    focal: bool = False,
    push: bool = True,
) -> SppLoss:
    """Return L = L_ml + lambda (L_n + L_a) of a chunk of rows, and its boundary. `push=False` leaves out L_a."""
    weights = focal_weights(lp, anomalous) if focal else torch.ones_like(lp)
    b_n, b_a = boundary(lp, anomalous, beta, tau, normalizer)
    normal_rows = ~anomalous
    ml = (weights * ml_loss(lp, channels, ml_form))[normal_rows].sum() / max(int(normal_rows.sum()), 1)
    u = lp / normalizer
    loss_n, loss_a = semi_push_pull(u, anomalous, b_n, b_a, weights, reduction)
    if not push:
        loss_a = torch.zeros_like(loss_a)
    violations = (normal_rows & (u <= b_n)).sum(), (anomalous & (u >= b_a)).sum()
    return SppLoss(ml + lam * (loss_n + loss_a), ml, loss_n, loss_a, b_n, b_a, *violations)


def contrastive_loss(u: Tensor, anomalous: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Return pull and push terms of the conventional contrastive loss that BGAD-dagger has in place of BG-SPP.

    The slides name it without an equation; this is Hadsell, Chopra and LeCun (CVPR 2006) on the distances
    d_ij = |u_i - u_j|, each term a mean over its pairs (0 where there is no pair):

        pull = mean over pairs of normals of d_ij^2 / 2
        push = mean over pairs of a normal and an anomaly of max(margin - d_ij, 0)^2 / 2
    """
    normal, abnormal = u[~anomalous], u[anomalous]
    zero = u.sum() * 0
    pull = ((normal[:, None] - normal[None, :]) ** 2 / 2).mean() if len(normal) else zero
    distance = (normal[:, None] - abnormal[None, :]).abs()
    push = (torch.clamp(margin - distance, min=0) ** 2 / 2).mean() if distance.numel() else zero
    return pull, push
