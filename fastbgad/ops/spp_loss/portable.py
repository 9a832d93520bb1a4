"""The losses of one chunk of rows in plain PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...reference import SppLoss
from ...reference.spp_loss import FOCAL_NORMALIZER, FOCAL_SMALLEST_U
from .options import SppLossOptions

# Entries of the matrix of all pairs that the contrastive loss holds at a time.
PAIRS_AT_ONCE = 2**22

# Gradients of total, ml, normal and anomalous; None counts as 0.
Upstream = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Statistics(NamedTuple):
    """Scalars of a forward that its backward needs: the boundary, and the rows under L_ml, L_n and L_a."""

    b_n: Tensor
    b_a: Tensor
    n_normal: Tensor
    normal_violations: Tensor
    anomalous_violations: Tensor


def portable_spp_loss(
    lp: Tensor,  # [N] float32 or float64
    anomalous: Tensor,  # [N] bool
    channels: int,
    b_n: Tensor,  # scalar, detached
    b_a: Tensor,  # scalar, detached
    options: SppLossOptions,
) -> tuple[SppLoss, Tensor]:
    """Return the loss under a given boundary, and the number of rows under L_ml."""
    normal = ~anomalous
    n_normal = normal.sum()
    u = lp / options.normalizer
    per_row = -logsigmoid(lp) if options.ml_form == "logsigmoid" else -lp * channels
    pull, push_rows = b_n - u, u - b_a  # L_n = |min(u - b_n, 0)|, L_a = |max(u - b_a, 0)|
    if options.focal:
        weights = focal_weights(lp.detach(), anomalous)
        # Zeros where a term has no row: an infinite weight there must not reach its gradient as 0 * inf.
        normal_weights, anomalous_weights = torch.where(normal, weights, 0.0), torch.where(anomalous, weights, 0.0)
        per_row, pull, push_rows = normal_weights * per_row, normal_weights * pull, anomalous_weights * push_rows
    ml = masked_sum(per_row, normal) / n_normal.clamp(min=1)
    # With a NaN boundary both comparisons are false.
    pulled, pushed = normal & (u <= b_n), anomalous & (u >= b_a)
    normal_violations, anomalous_violations = pulled.sum(), pushed.sum()
    loss_n, loss_a = masked_sum(pull, pulled), masked_sum(push_rows, pushed) if options.push else torch.zeros_like(ml)
    if options.reduction == "mean":
        loss_n = loss_n / normal_violations.clamp(min=1)
        loss_a = loss_a / anomalous_violations.clamp(min=1)
    total = ml + options.lam * (loss_n + loss_a)
    return SppLoss(total, ml, loss_n, loss_a, b_n, b_a, normal_violations, anomalous_violations), n_normal


def portable_spp_loss_backward(
    lp: Tensor,  # [N] float32 or float64
    anomalous: Tensor,  # [N] bool
    channels: int,
    statistics: Statistics,
    upstream: Upstream,
    options: SppLossOptions,
) -> Tensor:
    """Return d_lp [N], for the registered operator, which cannot use autograd; see the kernel's equation."""
    b_n, b_a, n_normal, normal_violations, anomalous_violations = statistics
    g_total, g_ml, g_normal, g_anomalous = (lp.new_zeros(()) if g is None else g for g in upstream)
    weights = focal_weights(lp, anomalous) if options.focal else 1.0
    slope = -torch.sigmoid(-lp) if options.ml_form == "logsigmoid" else torch.full_like(lp, -channels)
    g_n, g_a = (
        (options.lam * g_total + g_normal) / options.normalizer,
        (options.lam * g_total + g_anomalous) / options.normalizer,
    )
    if options.reduction == "mean":
        g_n, g_a = g_n / normal_violations.clamp(min=1), g_a / anomalous_violations.clamp(min=1)
    u = lp / options.normalizer
    d_lp = torch.where(anomalous, 0.0, (g_total + g_ml) / n_normal.clamp(min=1) * slope * weights)
    d_lp = d_lp - torch.where(~anomalous & (u <= b_n), g_n * weights, 0.0)
    return d_lp + torch.where(anomalous & (u >= b_a), g_a * weights, 0.0) if options.push else d_lp


def portable_contrastive_loss(
    u: Tensor,  # [N]
    anomalous: Tensor,  # [N] bool
    margin: float,
    *,
    by_blocks: bool,  # of the matrix of all pairs; without it only the rows of anomalies are built, at once
) -> tuple[Tensor, Tensor]:
    """Return the pull and push terms of the contrastive loss; only `by_blocks` copies nothing to the host."""
    normal = ~anomalous
    n_normal, n_anomalous = normal.sum(), anomalous.sum()
    mean = masked_sum(u, normal) / n_normal.clamp(min=1)
    pull = masked_sum((u - mean) ** 2, normal) / n_normal.clamp(min=1)
    pairs = (n_normal * n_anomalous).clamp(min=1)
    if by_blocks:
        return pull, HingeOfPairs.apply(u, anomalous, margin) / pairs
    distance = (u[anomalous][:, None] - u[None, :]).abs()
    hinge = torch.where(normal, torch.clamp(margin - distance, min=0), 0.0)
    return pull, (hinge**2).sum() / 2 / pairs


class HingeOfPairs(torch.autograd.Function):
    """Sum over pairs of a normal and an anomaly of max(margin - |u_i - u_j|, 0)^2 / 2, and its gradient with it.

    Every row meets every row, so a row's gradient is a sum along its own row of the matrix, and each pair counts twice.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, anomalous: Tensor, margin: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=u.device)
        slope = torch.empty_like(u)
        block = max(PAIRS_AT_ONCE // max(len(u), 1), 1)
        for start in range(0, len(u), block):
            rows = slice(start, start + block)
            difference = u[rows, None] - u[None, :]  # [block, N]
            hinge = torch.clamp(margin - difference.abs(), min=0)
            hinge = torch.where(anomalous[rows, None] != anomalous[None, :], hinge, 0.0)
            total += hinge.square().sum(dtype=torch.float64)
            slope[rows] = -(hinge * difference.sign()).sum(dim=1)
        ctx.save_for_backward(slope)
        return (total / 4).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return upstream[0] * slope, None, None


def focal_weights(lp: Tensor, anomalous: Tensor) -> Tensor:
    """Return the weights of `fastbgad.reference.focal_weights` [N] without boolean indices."""
    u = lp / FOCAL_NORMALIZER
    probability = torch.exp(u)
    hard_normal = 11.7 * torch.sqrt((1 - probability).clamp(min=0)) * u.abs()
    hard_anomalous = 0.53 * (1 + probability) ** 2 / u.abs().clamp(min=FOCAL_SMALLEST_U)
    weights = torch.where(anomalous, torch.where(u > -1, hard_anomalous, 1.0), torch.where(u > -0.2, 1.0, hard_normal))
    return weights.to(lp.dtype)


def masked_sum(values: Tensor, rows: Tensor) -> Tensor:
    """Return the sum over the rows of a mask."""
    # where, not a product: a value outside the mask may be NaN or Inf.
    return torch.where(rows, values, 0.0).sum()
