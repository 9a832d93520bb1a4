"""The log-likelihood of a latent as the registered operators `fastbgad::log_likelihood` and `.._backward`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registration import register
from .portable import portable_log_likelihood, portable_log_likelihood_backward


def _launch(
    z: Tensor,  # [N, C] float32, float16 or bfloat16
    log_det: Tensor,  # [N] float32, float16 or bfloat16
) -> Tensor:
    """Return lp [N] float32."""
    from ...kernels.log_likelihood import log_likelihood_forward  # triton need not be installed

    with torch.cuda.device_of(z):
        return log_likelihood_forward(_side_by_side(z), log_det)


def _portable(z: Tensor, log_det: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return portable_log_likelihood(z.float(), log_det.float())


def _fake(z: Tensor, log_det: Tensor) -> Tensor:
    return z.new_empty(z.shape[0], dtype=torch.float32)


def _launch_backward(
    z: Tensor,  # [N, C] float32, float16 or bfloat16
    d_lp: Tensor,  # [N] float32
    log_det_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return dz [N, C] in the type of z, contiguous, and d_log_det [N] in `log_det_dtype`."""
    from ...kernels.log_likelihood import log_likelihood_backward  # triton need not be installed

    with torch.cuda.device_of(z):
        return log_likelihood_backward(_side_by_side(z), d_lp, log_det_dtype)


def _portable_backward(z: Tensor, d_lp: Tensor, log_det_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    d_z, d_log_det = portable_log_likelihood_backward(z.float(), d_lp)
    return d_z.to(z.dtype).contiguous(), d_log_det.to(log_det_dtype)


def _fake_backward(z: Tensor, d_lp: Tensor, log_det_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), d_lp.new_empty(d_lp.shape, dtype=log_det_dtype)


def _side_by_side(z: Tensor) -> Tensor:
    """Return z with the channels of a row next to each other, as the kernels read them."""
    return z if z.shape[1] == 1 or z.stride(1) == 1 else z.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    z, log_det = inputs
    ctx.save_for_backward(z)
    ctx.log_det_dtype = log_det.dtype


def _backward(ctx: Any, d_lp: Tensor) -> tuple[Tensor, Tensor]:
    (z,) = ctx.saved_tensors
    return log_likelihood_backward_op(z, d_lp, ctx.log_det_dtype)


log_likelihood_op: Any = register(
    "log_likelihood", _launch, portable=_portable, fake=_fake, setup_context=_setup_context, backward=_backward
)
log_likelihood_backward_op: Any = register(
    "log_likelihood_backward", _launch_backward, portable=_portable_backward, fake=_fake_backward
)
