"""The log-likelihood of a latent as the registered operations `fastbgad::log_likelihood` and `.._backward`.

torch.compile and torch.export see each as one node.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import interpreting


@torch.library.custom_op("fastbgad::log_likelihood", mutates_args=(), device_types="cuda")
def log_likelihood_op(
    z: Tensor,  # [N, C] float32, float16 or bfloat16
    log_det: Tensor,  # [N] float32, float16 or bfloat16
) -> Tensor:
    """lp [N] float32."""
    return _launch(z, log_det)


@log_likelihood_op.register_kernel("cpu")
def _(z: Tensor, log_det: Tensor) -> Tensor:
    """A graph traced for a GPU also runs here: by the interpreter if it is on, else by the portable path."""
    if interpreting():
        return _launch(z, log_det)
    from .dispatcher import portable_log_likelihood  # the door imports this file

    with torch.autocast("cpu", enabled=False):
        return portable_log_likelihood(z.float(), log_det.float())


@log_likelihood_op.register_fake
def _(z: Tensor, log_det: Tensor) -> Tensor:
    return z.new_empty(z.shape[0], dtype=torch.float32)


@torch.library.custom_op("fastbgad::log_likelihood_backward", mutates_args=(), device_types="cuda")
def log_likelihood_backward_op(
    z: Tensor,  # [N, C] float32, float16 or bfloat16
    d_lp: Tensor,  # [N] float32
    log_det_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """dz [N, C] in the type of z, contiguous, and d_log_det [N] in `log_det_dtype`."""
    return _launch_backward(z, d_lp, log_det_dtype)


@log_likelihood_backward_op.register_kernel("cpu")
def _(z: Tensor, d_lp: Tensor, log_det_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if interpreting():
        return _launch_backward(z, d_lp, log_det_dtype)
    from .dispatcher import portable_log_likelihood_backward  # the door imports this file

    d_z, d_log_det = portable_log_likelihood_backward(z.float(), d_lp)
    return d_z.to(z.dtype).contiguous(), d_log_det.to(log_det_dtype)


@log_likelihood_backward_op.register_fake
def _(z: Tensor, d_lp: Tensor, log_det_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), d_lp.new_empty(d_lp.shape, dtype=log_det_dtype)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    z, log_det = inputs
    ctx.save_for_backward(z)
    ctx.log_det_dtype = log_det.dtype


def _backward(ctx: Any, d_lp: Tensor) -> tuple[Tensor, Tensor]:
    (z,) = ctx.saved_tensors
    return log_likelihood_backward_op(z, d_lp, ctx.log_det_dtype)


log_likelihood_op.register_autograd(_backward, setup_context=_keep)


def _launch(z: Tensor, log_det: Tensor) -> Tensor:
    from ...kernels.log_likelihood import log_likelihood_forward  # triton need not be installed

    with torch.cuda.device_of(z):
        return log_likelihood_forward(_side_by_side(z), log_det)


def _launch_backward(z: Tensor, d_lp: Tensor, log_det_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from ...kernels.log_likelihood import log_likelihood_backward  # triton need not be installed

    with torch.cuda.device_of(z):
        return log_likelihood_backward(_side_by_side(z), d_lp, log_det_dtype)


def _side_by_side(z: Tensor) -> Tensor:
    """z with the channels of a row next to each other, which is what the kernels read."""
    return z if z.shape[1] == 1 or z.stride(1) == 1 else z.contiguous()
