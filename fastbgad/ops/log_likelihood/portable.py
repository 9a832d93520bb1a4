"""The log-likelihood of a latent in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


def portable_log_likelihood(z: Tensor, log_det: Tensor) -> Tensor:
    """Return lp [N] without a temporary of the size of z. Autocast must be off: it would round z."""
    return log_likelihood_of_norm(torch.linalg.vecdot(z, z), log_det, z.shape[1])


def log_likelihood_of_norm(squared_norm: Tensor, log_det: Tensor, channels: int) -> Tensor:
    """Return lp [N] from |z|^2 [N]."""
    return (log_det - 0.5 * squared_norm) / channels - 0.5 * LOG_2PI


def portable_log_likelihood_backward(z: Tensor, d_lp: Tensor) -> tuple[Tensor, Tensor]:
    """Return dz [N, C] and d_log_det [N]; see `fastbgad.kernels.log_likelihood` for the equation."""
    share = d_lp / z.shape[1]
    return z * -share[:, None], share


class DifferentiableLogLikelihood(torch.autograd.Function):
    """One product backward, where autograd would take the dot product apart into three."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, log_det: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return portable_log_likelihood(z, log_det)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        (z,) = ctx.saved_tensors
        return portable_log_likelihood_backward(z, upstream[0])
