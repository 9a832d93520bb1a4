"""The boundary as the registered operator `fastbgad::boundary`.

A boundary is a constant of the loss, so there is no gradient: `fastbgad.ops.boundary` detaches its input first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registration import register
from .portable import portable_boundary


def _launch(
    lp: Tensor,  # [N] float32
    anomalous: Tensor,  # [N] bool
    beta: float,
    tau: float,
    normalizer: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return b_n and b_a (float32 scalars) and n_normal (int64 scalar)."""
    from ...kernels.boundary import boundary_forward  # triton need not be installed

    with torch.cuda.device_of(lp):
        return boundary_forward(lp.contiguous(), anomalous.contiguous(), beta, tau, normalizer)


def _fake(lp: Tensor, anomalous: Tensor, beta: float, tau: float, normalizer: float) -> tuple[Tensor, Tensor, Tensor]:
    return lp.new_empty(()), lp.new_empty(()), lp.new_empty((), dtype=torch.int64)


boundary_op: Any = register("boundary", _launch, portable=portable_boundary, fake=_fake)
