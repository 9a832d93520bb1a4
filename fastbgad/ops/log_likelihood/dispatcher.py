"""Dispatcher of the log-likelihood of a latent. Reference: `fastbgad.reference.log_likelihood`.

For callers with a flow of their own, who hold z and log|det J|: `flow_forward` returns its log-likelihoods itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import reference
from ...errors import FeatureError
from ..dispatch import Impl, compute_dtype, resolve_impl
from .portable import DifferentiableLogLikelihood
from .registered import log_likelihood_op


def log_likelihood(
    z: Tensor,  # [N, C]
    log_det: Tensor,  # [N]
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Return lp [N], the log-likelihood of each row in nats per dimension, which `spp_loss` and `score_map` take.

        lp = (-C/2 ln(2 pi) - 1/2 |z|^2 + log_det) / C

    The kernel reads z once and writes N numbers, where the same expression in PyTorch launches a chain of kernels and
    keeps products of the size of z; the backward is one launch as well. Nothing waits for the device.

    Args:
        z: [N, C], the latent, any floating-point type. Rows may be any stride apart; channels that do not lie side by
            side are copied.
        log_det: [N], log|det J|, any floating-point type.
        impl: "auto", "triton", "torch" or "reference". Results of the kernels have a first derivative only.

    Returns:
        lp [N], float64 if an input is float64 and float32 otherwise; autocast does not change that. Gradients have the
        types of the inputs. A row with NaN or Inf has NaN (or Inf) results and touches no other row.

    Raises:
        FeatureError: shapes, types or devices that do not fit.
        BackendError, ConfigError: see `fastbgad.ops.dispatch`.

    Source: Yao et al., CVPR 2023; the official code's `get_logp` divided by C.
    """
    _check(z, log_det)
    widest = log_det if log_det.dtype == torch.float64 else z
    kind = resolve_impl(impl, widest)
    if kind == "triton":
        return log_likelihood_op(z, log_det)
    dtype = compute_dtype(widest)
    z, log_det = z.to(dtype), log_det.to(dtype)
    with torch.autocast(z.device.type, enabled=False):
        if kind == "reference":
            return reference.log_likelihood(z, log_det)
        return DifferentiableLogLikelihood.apply(z, log_det)


def _check(z: Tensor, log_det: Tensor) -> None:
    if z.dim() != 2 or z.shape[1] < 1 or log_det.shape != z.shape[:1]:
        raise FeatureError(
            f"the latent must be [N, C] with C of at least 1 and log_det [N], not {tuple(z.shape)} and "
            f"{tuple(log_det.shape)}"
        )
    if not (z.is_floating_point() and log_det.is_floating_point()):
        raise FeatureError(f"latent and log_det must be floating point, not {z.dtype} and {log_det.dtype}")
    if z.device != log_det.device:
        raise FeatureError(f"the latent is on {z.device} but log_det is on {log_det.device}")
