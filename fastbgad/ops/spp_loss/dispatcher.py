"""The door to the losses of one chunk of rows. Oracle: `fastbgad.reference.spp_loss`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ... import reference
from ...errors import ConfigError
from ...reference import SppLoss
from ...reference.spp_loss import FOCAL_NORMALIZER, FOCAL_SMALLEST_U
from ..boundary.dispatcher import boundary, check_boundary_options
from ..dispatch import Impl, check_mask, compute_dtype, resolve_impl
from .registered import spp_loss_op

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MlForm = Literal["logsigmoid", "nll"]
Reduction = Literal["mean", "sum"]

# Entries of the matrix of all pairs that the contrastive loss holds at a time.
PAIRS_AT_ONCE = 2**22


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
    group: ProcessGroup | None = None,
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
        impl: "auto", "triton", "torch" or "reference". The kernels compute in float32 and each of the first four
            results can be differentiated, as with "torch".
        group: take the boundary over the rows of these processes (see `fastbgad.ops.boundary`). Means and counts stay
            those of this process's rows, so averaging gradients over processes works as for any other loss.

    Returns:
        `SppLoss(total, ml, normal, anomalous, b_n, b_a, normal_violations, anomalous_violations)`, scalars.

    Raises:
        ConfigError: an option out of its range. FeatureError: lp and mask do not fit. BackendError: "triton" for
            tensors that the kernels cannot take here.

    Source: Yao et al., CVPR 2023.
    """
    kind = resolve_impl(impl, lp)
    check_mask(lp, anomalous)
    if ml_form not in get_args(MlForm):
        raise ConfigError(f"ml_form is {ml_form!r}; choose one of {', '.join(get_args(MlForm))}")
    if reduction not in get_args(Reduction):
        raise ConfigError(f"reduction is {reduction!r}; choose one of {', '.join(get_args(Reduction))}")
    check_boundary_options(beta, tau, normalizer)
    lp = lp.to(compute_dtype(lp))
    edge = None
    if kind == "torch" or group is not None:
        edge = boundary(lp, anomalous, beta=beta, tau=tau, normalizer=normalizer, impl=kind, group=group)
    if kind == "reference":
        return reference.spp_loss(
            lp, anomalous, channels, beta=beta, tau=tau, lam=lam, normalizer=normalizer, ml_form=ml_form,
            reduction=reduction, focal=focal, push=push,
        )  # fmt: skip
    if kind == "triton":
        b_n, b_a = (None, None) if edge is None else (edge.b_n, edge.b_a)
        total, ml, normal, term, b_n, b_a, _, pulled, pushed = spp_loss_op(
            lp, anomalous, channels, beta, tau, lam, normalizer, ml_form, reduction, focal, push, b_n, b_a
        )
        return SppLoss(total, ml, normal, term, b_n, b_a, pulled, pushed)
    assert edge is not None
    return portable_spp_loss(
        lp, anomalous, channels, edge.b_n, edge.b_a, lam, normalizer, ml_form, reduction, focal, push
    )[0]


def portable_spp_loss(
    lp: Tensor,  # [N] float32 or float64
    anomalous: Tensor,  # [N] bool
    channels: int,
    b_n: Tensor,  # scalar, detached
    b_a: Tensor,  # scalar, detached
    lam: float,
    normalizer: float,
    ml_form: str,
    reduction: str,
    focal: bool,
    push: bool,
) -> tuple[SppLoss, Tensor]:
    """The loss in plain PyTorch under a given boundary, and the number of rows under L_ml."""
    normal = ~anomalous
    n_normal = normal.sum()
    u = lp / normalizer
    per_row = -logsigmoid(lp) if ml_form == "logsigmoid" else -lp * channels
    pull, push_rows = b_n - u, u - b_a  # L_n = |min(u - b_n, 0)|, L_a = |max(u - b_a, 0)|
    if focal:
        weights = _focal_weights(lp.detach(), anomalous)
        # Zeros where a term has no row: an infinite weight there must not reach its gradient as 0 * inf.
        normal_weights, anomalous_weights = torch.where(normal, weights, 0.0), torch.where(anomalous, weights, 0.0)
        per_row, pull, push_rows = normal_weights * per_row, normal_weights * pull, anomalous_weights * push_rows
    ml = _masked_sum(per_row, normal) / n_normal.clamp(min=1)
    # With a NaN boundary both comparisons are false.
    pulled, pushed = normal & (u <= b_n), anomalous & (u >= b_a)
    normal_violations, anomalous_violations = pulled.sum(), pushed.sum()
    loss_n, loss_a = _masked_sum(pull, pulled), _masked_sum(push_rows, pushed) if push else torch.zeros_like(ml)
    if reduction == "mean":
        loss_n = loss_n / normal_violations.clamp(min=1)
        loss_a = loss_a / anomalous_violations.clamp(min=1)
    total = ml + lam * (loss_n + loss_a)
    return SppLoss(total, ml, loss_n, loss_a, b_n, b_a, normal_violations, anomalous_violations), n_normal


def portable_spp_loss_backward(
    lp: Tensor,  # [N] float32 or float64
    anomalous: Tensor,  # [N] bool
    channels: int,
    scalars: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],  # b_n, b_a, n_normal and the two counts of violating rows
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],  # of total, ml, normal, anomalous
    lam: float,
    normalizer: float,
    ml_form: str,
    reduction: str,
    focal: bool,
    push: bool,
) -> Tensor:
    """d_lp [N] in plain PyTorch, for the registered operation, which cannot ask autograd; see the kernel's equation."""
    b_n, b_a, n_normal, normal_violations, anomalous_violations = scalars
    g_total, g_ml, g_normal, g_anomalous = (lp.new_zeros(()) if g is None else g for g in upstream)
    weights = _focal_weights(lp, anomalous) if focal else 1.0
    slope = -torch.sigmoid(-lp) if ml_form == "logsigmoid" else torch.full_like(lp, -channels)
    g_n, g_a = (lam * g_total + g_normal) / normalizer, (lam * g_total + g_anomalous) / normalizer
    if reduction == "mean":
        g_n, g_a = g_n / normal_violations.clamp(min=1), g_a / anomalous_violations.clamp(min=1)
    u = lp / normalizer
    d_lp = torch.where(anomalous, 0.0, (g_total + g_ml) / n_normal.clamp(min=1) * slope * weights)
    d_lp = d_lp - torch.where(~anomalous & (u <= b_n), g_n * weights, 0.0)
    return d_lp + torch.where(anomalous & (u >= b_a), g_a * weights, 0.0) if push else d_lp


def contrastive_loss(u: Tensor, anomalous: Tensor, margin: float, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """The pull and push terms of BGAD-dagger's conventional contrastive loss, on u = lp / normalizer [N].

    See `fastbgad.reference.contrastive_loss` for the equation. The pull term needs no pairs: half the mean squared
    difference over all ordered pairs is the variance. The push term has no kernel of its own: on a GPU, and with
    impl="triton", it is plain PyTorch over blocks of the matrix of all pairs, which copies nothing to the host and
    needs N^2 operations in bounded memory; on a CPU only the rows of anomalies are built.
    """
    kind = resolve_impl(impl, u)
    check_mask(u, anomalous)
    if margin < 0:
        raise ConfigError(f"the contrastive margin is {margin}; it cannot be negative")
    if kind == "reference":
        return reference.contrastive_loss(u, anomalous, margin)
    normal = ~anomalous
    n_normal, n_anomalous = normal.sum(), anomalous.sum()
    mean = _masked_sum(u, normal) / n_normal.clamp(min=1)
    pull = _masked_sum((u - mean) ** 2, normal) / n_normal.clamp(min=1)
    pairs = (n_normal * n_anomalous).clamp(min=1)
    if kind == "triton" or u.device.type != "cpu":
        return pull, _HingeOfPairs.apply(u, anomalous, margin) / pairs
    # Anomalous rows are few: only their rows of the distance matrix are built.
    distance = (u[anomalous][:, None] - u[None, :]).abs()
    hinge = torch.where(normal, torch.clamp(margin - distance, min=0), 0.0)
    return pull, (hinge**2).sum() / 2 / pairs


class _HingeOfPairs(torch.autograd.Function):
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
