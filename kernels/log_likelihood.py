"""The log-likelihood of a latent per dimension, and its gradients: one pass over z in each direction.

    lp = (-C/2 ln(2 pi) - 1/2 |z|^2 + log_det) / C
    dz = -z d_lp / C,        d_log_det = d_lp / C

A program takes whole rows and walks over their channels, so programs exchange nothing and a NaN stays in its row.
z is read in its own type and summed in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

HALF_LOG_2PI: tl.constexpr = tl.constexpr(0.5 * math.log(2 * math.pi))

# Values of z that a program holds at a time, and the most of them that belong to one row.
TILE = 2048
MOST_COLUMNS = 256


@triton.jit(do_not_specialize=["rows", "units", "stride_units"])
def log_likelihood_forward_kernel(
    z_ptr,  # [N, C] any float, rows stride_units * UNIT apart
    log_det_ptr,  # [N] any float, log_det_stride apart
    lp_ptr,  # [N] float32
    rows,  # int32, N
    units,  # int32, C / UNIT
    stride_units,  # int32
    log_det_stride,  # int32
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    inside = row < rows
    # C and the stride as products: the compiler then knows what divides them, and loads several values at once.
    channels = units * UNIT
    row_ptr = z_ptr + row[:, None] * (stride_units.to(tl.int64) * UNIT)  # [BM, 1]
    squares = tl.zeros([BM, BK], tl.float32)
    for first in range(0, channels, BK):
        channel = first + tl.arange(0, BK)
        mask = inside[:, None] & (channel < channels)[None, :]
        z = tl.load(row_ptr + channel[None, :], mask=mask, other=0.0).to(tl.float32)  # [BM, BK]
        squares += z * z
    log_det = tl.load(log_det_ptr + row * log_det_stride, mask=inside, other=0.0).to(tl.float32)  # [BM]
    lp = tl.div_rn(log_det - 0.5 * tl.sum(squares, 1), channels.to(tl.float32)) - HALF_LOG_2PI  # [BM]
    tl.store(lp_ptr + row, lp, mask=inside)


@triton.jit(do_not_specialize=["rows", "units", "stride_units"])
def log_likelihood_backward_kernel(
    z_ptr,  # [N, C] any float, rows stride_units * UNIT apart
    d_lp_ptr,  # [N] float32, d_lp_stride apart
    d_z_ptr,  # [N, C] any float, contiguous
    d_log_det_ptr,  # [N] any float
    rows,  # int32, N
    units,  # int32, C / UNIT
    stride_units,  # int32
    d_lp_stride,  # int32
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    inside = row < rows
    channels = units * UNIT
    d_lp = tl.load(d_lp_ptr + row * d_lp_stride, mask=inside, other=0.0)  # [BM]
    share = tl.div_rn(d_lp, channels.to(tl.float32))  # [BM]
    tl.store(d_log_det_ptr + row, share.to(d_log_det_ptr.dtype.element_ty), mask=inside)
    row_ptr = z_ptr + row[:, None] * (stride_units.to(tl.int64) * UNIT)  # [BM, 1]
    d_row_ptr = d_z_ptr + row[:, None] * (units.to(tl.int64) * UNIT)  # [BM, 1]
    for first in range(0, channels, BK):
        channel = first + tl.arange(0, BK)
        mask = inside[:, None] & (channel < channels)[None, :]
        z = tl.load(row_ptr + channel[None, :], mask=mask, other=0.0).to(tl.float32)  # [BM, BK]
        tl.store(d_row_ptr + channel[None, :], (-z * share[:, None]).to(d_z_ptr.dtype.element_ty), mask=mask)


class Tile(NamedTuple):
    """The part of z that a program holds at a time, and how it reads it."""

    unit: int  # divides C and the stride of the rows; up to 16, which is what a load of 16 bytes can use
    rows: int
    columns: int
    warps: int


def tile_of(channels: int, stride: int) -> Tile:
    """Return the tile for rows of this many channels, `stride` values apart."""
    columns = min(triton.next_power_of_2(channels), MOST_COLUMNS)
    unit = math.gcd(channels, stride, 16)
    # Values that are loaded one by one need an address each: with 4 warps the registers would not suffice.
    return Tile(unit, TILE // columns, columns, 4 if unit >= 4 else 8)


def log_likelihood_forward(
    z: Tensor,  # [N, C] float32, float16 or bfloat16; unit stride of the channels
    log_det: Tensor,  # [N] float32, float16 or bfloat16
) -> Tensor:
    """Return lp, float32 [N]."""
    rows, channels = _check(z)
    assert log_det.shape == (rows,)
    lp = torch.empty(rows, dtype=torch.float32, device=z.device)
    if rows > 0:
        tile = tile_of(channels, z.stride(0))
        log_likelihood_forward_kernel[(triton.cdiv(rows, tile.rows),)](
            z,
            log_det,
            lp,
            rows,
            channels // tile.unit,
            z.stride(0) // tile.unit,
            log_det.stride(0),
            UNIT=tile.unit,
            BM=tile.rows,
            BK=tile.columns,
            num_warps=tile.warps,
        )
    return lp


def log_likelihood_backward(
    z: Tensor,  # [N, C] float32, float16 or bfloat16; unit stride of the channels
    d_lp: Tensor,  # [N] float32 of any stride; the gradient of a sum or a mean has stride 0
    log_det_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return dz [N, C] in the type of z, contiguous, and d_log_det [N]."""
    rows, channels = _check(z)
    assert d_lp.shape == (rows,)
    assert d_lp.dtype == torch.float32
    d_z = torch.empty(rows, channels, dtype=z.dtype, device=z.device)
    d_log_det = torch.empty(rows, dtype=log_det_dtype, device=z.device)
    if rows > 0:
        tile = tile_of(channels, z.stride(0))
        log_likelihood_backward_kernel[(triton.cdiv(rows, tile.rows),)](
            z,
            d_lp,
            d_z,
            d_log_det,
            rows,
            channels // tile.unit,
            z.stride(0) // tile.unit,
            d_lp.stride(0),
            UNIT=tile.unit,
            BM=tile.rows,
            BK=tile.columns,
            num_warps=tile.warps,
        )
    return d_z, d_log_det


def _check(z: Tensor) -> tuple[int, int]:
    """Assert what the kernels rely on; return N and C."""
    rows, channels = z.shape
    assert channels > 0
    assert channels == 1 or z.stride(1) == 1
    return rows, channels
