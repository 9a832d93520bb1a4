"""The log-likelihood of a latent per dimension, and its gradients: one pass over z each way.

    lp = (-C/2 ln(2 pi) - 1/2 |z|^2 + log_det) / C
    dz = -z d_lp / C,        d_log_det = d_lp / C

A program takes whole rows and walks over their columns, so nothing passes between programs and a NaN stays in its row.
z is read in its own type and summed in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variant import Variant

HALF_LOG_2PI: tl.constexpr = tl.constexpr(0.5 * math.log(2 * math.pi))

# Values of z that a program holds at a time, and at most how many of them are of one row.
TILE = 2048
MOST_COLUMNS = 256


@triton.jit(do_not_specialize=["rows", "units", "stride_units"])
def log_likelihood_forward_kernel(
    Z,  # [N, C], rows stride_units * UNIT apart
    LOG_DET,  # [N], log_det_stride apart
    LP,  # [N] float32
    rows, units, stride_units, log_det_stride,
    UNIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = row < rows
    # C and the stride as products: the compiler then knows what divides them, and loads several values at once.
    channels = units * UNIT
    line = Z + row[:, None] * (stride_units.to(tl.int64) * UNIT)
    squares = tl.zeros([BR, BC], tl.float32)
    for first in range(0, channels, BC):
        channel = first + tl.arange(0, BC)
        mask = inside[:, None] & (channel < channels)[None, :]
        z = tl.load(line + channel[None, :], mask=mask, other=0.0).to(tl.float32)  # [BR, BC]
        squares += z * z
    log_det = tl.load(LOG_DET + row * log_det_stride, mask=inside, other=0.0).to(tl.float32)  # [BR]
    lp = tl.div_rn(log_det - 0.5 * tl.sum(squares, 1), channels.to(tl.float32)) - HALF_LOG_2PI
    tl.store(LP + row, lp, mask=inside)


@triton.jit(do_not_specialize=["rows", "units", "stride_units"])
def log_likelihood_backward_kernel(
    Z,  # [N, C], rows stride_units * UNIT apart
    D_LP,  # [N] float32, d_lp_stride apart
    D_Z,  # [N, C], contiguous
    D_LOG_DET,  # [N]
    rows, units, stride_units, d_lp_stride,
    UNIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = row < rows
    channels = units * UNIT
    d_lp = tl.load(D_LP + row * d_lp_stride, mask=inside, other=0.0)  # [BR]
    share = tl.div_rn(d_lp, channels.to(tl.float32))
    tl.store(D_LOG_DET + row, share.to(D_LOG_DET.dtype.element_ty), mask=inside)
    line = Z + row[:, None] * (stride_units.to(tl.int64) * UNIT)
    d_line = D_Z + row[:, None] * (units.to(tl.int64) * UNIT)
    for first in range(0, channels, BC):
        channel = first + tl.arange(0, BC)
        mask = inside[:, None] & (channel < channels)[None, :]
        z = tl.load(line + channel[None, :], mask=mask, other=0.0).to(tl.float32)  # [BR, BC]
        tl.store(d_line + channel[None, :], (-z * share[:, None]).to(D_Z.dtype.element_ty), mask=mask)


class Tile(NamedTuple):
    """How z is cut up."""

    unit: int  # divides C and the stride of the rows; up to 16, which is what a load of 16 bytes can use
    rows: int
    columns: int
    warps: int


def tile_of(channels: int, stride: int) -> Tile:
    columns = min(triton.next_power_of_2(channels), MOST_COLUMNS)
    unit = math.gcd(channels, stride, 16)
    # Values loaded one by one each keep an address: twice the threads, or half of them would find no registers.
    return Tile(unit, TILE // columns, columns, 4 if unit >= 4 else 8)


def log_likelihood_forward(
    z: Tensor,  # [N, C] float32, float16 or bfloat16; unit stride of the channels
    log_det: Tensor,  # [N] float32, float16 or bfloat16
) -> Tensor:
    """lp [N] float32."""
    rows, channels = _check(z)
    assert log_det.shape == (rows,)
    lp = torch.empty(rows, dtype=torch.float32, device=z.device)
    if rows > 0:
        unit, block, columns, warps = tile_of(channels, z.stride(0))
        log_likelihood_forward_kernel[(triton.cdiv(rows, block),)](
            z, log_det, lp, rows, channels // unit, z.stride(0) // unit, log_det.stride(0),
            UNIT=unit, BR=block, BC=columns, num_warps=warps,
        )  # fmt: skip
    return lp


def log_likelihood_backward(
    z: Tensor,  # [N, C] float32, float16 or bfloat16; unit stride of the channels
    d_lp: Tensor,  # [N] float32; any stride: 0 is what the gradient of a sum or a mean has
    log_det_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """dz [N, C] in the type of z, contiguous, and d_log_det [N]."""
    rows, channels = _check(z)
    assert d_lp.shape == (rows,)
    assert d_lp.dtype == torch.float32
    d_z = torch.empty(rows, channels, dtype=z.dtype, device=z.device)
    d_log_det = torch.empty(rows, dtype=log_det_dtype, device=z.device)
    if rows > 0:
        unit, block, columns, warps = tile_of(channels, z.stride(0))
        log_likelihood_backward_kernel[(triton.cdiv(rows, block),)](
            z, d_lp, d_z, d_log_det, rows, channels // unit, z.stride(0) // unit, d_lp.stride(0),
            UNIT=unit, BR=block, BC=columns, num_warps=warps,
        )  # fmt: skip
    return d_z, d_log_det


def _check(z: Tensor) -> tuple[int, int]:
    rows, channels = z.shape
    assert channels > 0
    assert channels == 1 or z.stride(1) == 1
    return rows, channels


def variants() -> list[Variant]:
    """For the ahead-of-time gate: few and many channels, an odd number of them, and a 16-bit latent."""
    found = []
    for channels, dtype in ((40, "fp32"), (40, "fp16"), (41, "fp32"), (200, "fp32"), (512, "fp32")):
        unit, rows, columns, warps = tile_of(channels, channels)
        numbers = dict.fromkeys(("rows", "units", "stride_units"), "i32")
        constants = {"UNIT": unit, "BR": rows, "BC": columns}
        name = f"C={channels} {dtype}"
        types = {"Z": f"*{dtype}", "LOG_DET": "*fp32", "LP": "*fp32", **numbers}
        forward = {**constants, "log_det_stride": 1}
        found.append(Variant(f"log_likelihood_forward {name}", log_likelihood_forward_kernel, types, forward, warps))
        types = {"Z": f"*{dtype}", "D_LP": "*fp32", "D_Z": f"*{dtype}", "D_LOG_DET": "*fp32", **numbers}
        backward = {**constants, "d_lp_stride": 1}
        found.append(Variant(f"log_likelihood_backward {name}", log_likelihood_backward_kernel, types, backward, warps))
    return found
