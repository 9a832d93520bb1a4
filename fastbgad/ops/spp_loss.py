"""The door to the losses of one chunk of rows. Oracle: `fastbgad.reference.spp_loss`."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import reference
from ..errors import ConfigError
from ..reference import SppLoss
from ..reference.spp_loss import FOCAL_NORMALIZER, FOCAL_SMALLEST_U
from .boundary import boundary
from .dispatch import Impl, check_mask, compute_dtype, resolve_impl

MlForm = Literal["logsigmoid", "nll"]
Reduction = Literal["mean", "sum"]


def spp_loss(
    lp: Tensor,  # [N]
    anomalous: Tensor,  # [N] bool
    channels: int,
    *,
    beta: float = 0.01,
    tau: float = 0.1,
    lam: float = 1.0,
    normalizer: float = 10.0,
    ml_form: MlForm = "logsigmoid",
    reduction: Reduction = "mean",
    focal: bool = False,
    push: bool = True,
    impl: Impl = "auto",
) -> SppLoss:
    """L = L_ml + lambda (L_n + L_a): maximum likelihood plus boundary-guided semi-push-pull.

    No row is selected by a boolean index and nothing is copied to the host, so a GPU never waits. A term without a
    row (no normals, no violators) is 0 with zero gradient.

    Args:
        lp: [N] log-likelihood per dimension.
        anomalous: [N] bool.
        channels: C, for the exact negative log-likelihood.
        beta, tau, normalizer: see `fastbgad.ops.boundary`.
        lam: lambda, the weight of the semi-push-pull terms.
        ml_form: "logsigmoid", -log sigmoid(lp) (official code), or "nll", -lp * C (the slides' equation).
        reduction: "mean" over the violating rows of each term (official code) or "sum" (the slides' equation).
        focal: weight the rows by how hard they are (official code).
        push: False leaves out the anomalous half (BGAD w/o).
        impl: "auto", "torch" or "reference".

    Returns:
        `SppLoss(total, ml, normal, anomalous, b_n, b_a)`, scalars.

    Raises:
        ConfigError: an option out of its range. FeatureError: lp and mask do not fit.

    Source: Yao et al., CVPR 2023.
    """
    kind = resolve_impl(impl)
    check_mask(lp, anomalous)
    if ml_form not in get_args(MlForm):
        raise ConfigError(f"ml_form is {ml_form!r}; choose one of {', '.join(get_args(MlForm))}")
    if reduction not in get_args(Reduction):
        raise ConfigError(f"reduction is {reduction!r}; choose one of {', '.join(get_args(Reduction))}")
    lp = lp.to(compute_dtype(lp))
    edge = boundary(lp, anomalous, beta=beta, tau=tau, normalizer=normalizer, impl=impl)
    if kind == "reference":
        return reference.spp_loss(
            lp, anomalous, channels, beta=beta, tau=tau, lam=lam, normalizer=normalizer, ml_form=ml_form,
            reduction=reduction, focal=focal, push=push,
        )  # fmt: skip
    normal = ~anomalous
    u = lp / normalizer
    per_row = -logsigmoid(lp) if ml_form == "logsigmoid" else -lp * channels
    pull, push_rows = edge.b_n - u, u - edge.b_a  # L_n = |min(u - b_n, 0)|, L_a = |max(u - b_a, 0)|
    if focal:
        weights = _focal_weights(lp.detach(), anomalous)
        # Zeros where a term has no row: an infinite weight there must not reach its gradient as 0 * inf.
        normal_weights, anomalous_weights = torch.where(normal, weights, 0.0), torch.where(anomalous, weights, 0.0)
        per_row, pull, push_rows = normal_weights * per_row, normal_weights * pull, anomalous_weights * push_rows
    ml = _masked_sum(per_row, normal) / edge.n_normal.clamp(min=1)
    # With a NaN boundary both comparisons are false.
    loss_n = _reduce(pull, normal & (u <= edge.b_n), reduction)
    loss_a = _reduce(push_rows, anomalous & (u >= edge.b_a), reduction) if push else torch.zeros_like(loss_n)
    return SppLoss(ml + lam * (loss_n + loss_a), ml, loss_n, loss_a, edge.b_n, edge.b_a)


def contrastive_loss(u: Tensor, anomalous: Tensor, margin: float, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """The pull and push terms of BGAD-dagger's conventional contrastive loss, on u = lp / normalizer [N].

    See `fastbgad.reference.contrastive_loss` for the equation. The pull term needs no pairs: half the mean squared
    difference over all ordered pairs is the variance.
    """
    kind = resolve_impl(impl)
    check_mask(u, anomalous)
    if margin < 0:
        raise ConfigError(f"the contrastive margin is {margin}; it cannot be negative")
    if kind == "reference":
        return reference.contrastive_loss(u, anomalous, margin)
    normal = ~anomalous
    n_normal, n_anomalous = normal.sum(), anomalous.sum()
    mean = _masked_sum(u, normal) / n_normal.clamp(min=1)
    pull = _masked_sum((u - mean) ** 2, normal) / n_normal.clamp(min=1)
    # Anomalous rows are few: only their rows of the distance matrix are built.
    distance = (u[anomalous][:, None] - u[None, :]).abs()
    hinge = torch.where(normal, torch.clamp(margin - distance, min=0), 0.0)
    push = (hinge**2).sum() / 2 / (n_normal * n_anomalous).clamp(min=1)
    return pull, push


def _focal_weights(lp: Tensor, anomalous: Tensor) -> Tensor:
    u = lp / FOCAL_NORMALIZER
    probability = torch.exp(u)
    hard_normal = 11.7 * torch.sqrt((1 - probability).clamp(min=0)) * u.abs()
    hard_anomalous = 0.53 * (1 + probability) ** 2 / u.abs().clamp(min=FOCAL_SMALLEST_U)
    weights = torch.where(anomalous, torch.where(u > -1, hard_anomalous, 1.0), torch.where(u > -0.2, 1.0, hard_normal))
    return weights.to(lp.dtype)


def _masked_sum(values: Tensor, rows: Tensor) -> Tensor:
    # where, not a product: a value outside the mask may be NaN or Inf.
    return torch.where(rows, values, 0.0).sum()


def _reduce(values: Tensor, rows: Tensor, reduction: Reduction) -> Tensor:
    total = _masked_sum(values, rows)
    return total if reduction == "sum" else total / rows.sum().clamp(min=1)
