"""The boundary as the registered operation `fastbgad::boundary`, which torch.compile and torch.export see as one.

A boundary is a constant of the loss, so there is no gradient: `fastbgad.ops.boundary` detaches its input first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import interpreting


@torch.library.custom_op("fastbgad::boundary", mutates_args=(), device_types="cuda")
def boundary_op(
    lp: Tensor,  # [N] float32
    anomalous: Tensor,  # [N] bool
    beta: float,
    tau: float,
    normalizer: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """b_n and b_a (float32 scalars) and n_normal (int64 scalar)."""
    from ...kernels.boundary import boundary_forward  # triton need not be installed

    with torch.cuda.device_of(lp):
        return boundary_forward(lp.contiguous(), anomalous.contiguous(), beta, tau, normalizer)


@boundary_op.register_kernel("cpu")
def _(lp: Tensor, anomalous: Tensor, beta: float, tau: float, normalizer: float) -> tuple[Tensor, Tensor, Tensor]:
    """A graph traced for a GPU also runs here: by the interpreter if it is on, else by the portable path."""
    if interpreting():
        from ...kernels.boundary import boundary_forward

        return boundary_forward(lp.contiguous(), anomalous.contiguous(), beta, tau, normalizer)
    from .dispatcher import portable_boundary  # the door imports this file

    return portable_boundary(lp, anomalous, beta, tau, normalizer)


@boundary_op.register_fake
def _(lp: Tensor, anomalous: Tensor, beta: float, tau: float, normalizer: float) -> tuple[Tensor, Tensor, Tensor]:
    return lp.new_empty(()), lp.new_empty(()), lp.new_empty((), dtype=torch.int64)
