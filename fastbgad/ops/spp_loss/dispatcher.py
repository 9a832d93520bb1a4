"""Dispatcher of the losses of one chunk of rows. Reference: `fastbgad.reference.spp_loss`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ... import reference
from ...errors import ConfigError
from ...reference import SppLoss
from ..boundary.dispatcher import boundary
from ..dispatch import Impl, check_mask, compute_dtype, resolve_impl
from .options import MlForm, Reduction, SppLossOptions
from .portable import portable_contrastive_loss, portable_spp_loss
from .registered import spp_loss_op

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    """Return L = L_ml + lambda (L_n + L_a): maximum likelihood plus boundary-guided semi-push-pull.

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
    options = SppLossOptions(beta, tau, lam, normalizer, ml_form, reduction, focal, push)
    options.check()
    lp = lp.to(compute_dtype(lp))
    edge = None
    if kind == "torch" or group is not None:
        edge = boundary(lp, anomalous, beta=beta, tau=tau, normalizer=normalizer, impl=kind, group=group)
    if kind == "reference":
        return reference.spp_loss(lp, anomalous, channels, **options._asdict())
    if kind == "triton":
        b_n, b_a = (None, None) if edge is None else (edge.b_n, edge.b_a)
        total, ml, normal, term, b_n, b_a, _, pulled, pushed = spp_loss_op(lp, anomalous, channels, *options, b_n, b_a)
        return SppLoss(total, ml, normal, term, b_n, b_a, pulled, pushed)
    assert edge is not None
    return portable_spp_loss(lp, anomalous, channels, edge.b_n, edge.b_a, options)[0]


def contrastive_loss(u: Tensor, anomalous: Tensor, margin: float, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Return the pull and push terms of BGAD-dagger's conventional contrastive loss, on u = lp / normalizer [N].

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
    # On a CPU nothing waits for a device, and anomalous rows are few.
    by_blocks = kind == "triton" or u.device.type != "cpu"
    return portable_contrastive_loss(u, anomalous, margin, by_blocks=by_blocks)
