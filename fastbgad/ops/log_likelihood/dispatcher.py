"""The door to the log-likelihood of a latent. Oracle: `fastbgad.reference.log_likelihood`.

For callers with a flow of their own, who hold z and log|det J|: `flow_forward` returns its log-likelihoods itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...errors import FeatureError
from ..dispatch import Impl, compute_dtype, resolve_impl
from .registered import log_likelihood_op

LOG_2PI = math.log(2 * math.pi)


def log_likelihood(
    z: Tensor,  # [N, C]
    log_det: Tensor,  # [N]
    *,
    impl: Impl = "auto",
) -> Tensor:
    """lp [N], the log-likelihood of each row in nats per dimension: what `spp_loss` and `score_map` take.

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
        return _LogLikelihood.apply(z, log_det)


def portable_log_likelihood(z: Tensor, log_det: Tensor) -> Tensor:
    """lp [N] in plain PyTorch, without a temporary of the size of z. Autocast must be off: it would round z."""
    return log_likelihood_of_norm(torch.linalg.vecdot(z, z), log_det, z.shape[1])


def log_likelihood_of_norm(squared_norm: Tensor, log_det: Tensor, channels: int) -> Tensor:
    """lp [N] from |z|^2 [N]."""
    return (log_det - 0.5 * squared_norm) / channels - 0.5 * LOG_2PI


def portable_log_likelihood_backward(z: Tensor, d_lp: Tensor) -> tuple[Tensor, Tensor]:
    """dz [N, C] and d_log_det [N]; see `fastbgad.kernels.log_likelihood` for the equation."""
    share = d_lp / z.shape[1]
    return z * -share[:, None], share


class _LogLikelihood(torch.autograd.Function):
    """One product backward, where autograd would take the dot product apart into three."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, log_det: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return portable_log_likelihood(z, log_det)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        (z,) = ctx.saved_tensors
        return portable_log_likelihood_backward(z, upstream[0])


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
