"""Operands of a library's matrix products in the wide flow: 16-bit copies, and rows free of unusable numbers.

16 bits are too few for the permutation, which causes the largest error: its input is split into a high and a low part,

    v W^T = v_high W_high^T + v_low W_high^T + v_high W_low^T = [v_high | v_low | v_high] [W_high | W_high | W_low]^T

(without v_low W_low^T, which is below the rounding of the sum), one product of depth 3 C. A number that does not fit in
16 bits becomes infinite.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tile_sizes import tiles as chosen_tiles


@triton.jit
def store_split(
    out_ptr,  # [N, 3 * C] 16-bit
    row,  # [BM] int64
    channel,  # [BK] int
    value,  # [BM, BK] float32
    inside,  # [BM, BK] bool
    C: tl.constexpr,
):
    """Store high | low | high, [BM, BK] of each."""
    dtype = out_ptr.dtype.element_ty
    high = value.to(dtype)
    low = (value - high.to(tl.float32)).to(dtype)
    pair_ptr = out_ptr + row[:, None] * (3 * C) + channel[None, :]  # [BM, BK]
    tl.store(pair_ptr, high, mask=inside)
    tl.store(pair_ptr + C, low, mask=inside)
    tl.store(pair_ptr + 2 * C, high, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def coupling_operand_kernel(
    x_ptr,  # [N, C] float32, rows X_STRIDE apart
    out_ptr,  # [N, C] any float, rows OUT_STRIDE apart; [N, 3 * C] high | low | high if THREE
    rows,  # int32, N
    C: tl.constexpr,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    THREE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    channel = tl.program_id(1) * BK + tl.arange(0, BK)  # [BK]
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    value = tl.load(x_ptr + row[:, None] * X_STRIDE + channel[None, :], mask=inside, other=0.0)  # [BM, BK]
    if THREE:
        store_split(out_ptr, row, channel, value, inside, C)
    else:
        pair_ptr = out_ptr + row[:, None] * OUT_STRIDE + channel[None, :]
        tl.store(pair_ptr, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "largest"])
def coupling_rows_kernel(
    x_ptr,  # [N, C] float32
    out_ptr,  # [N, C] float32
    lost_ptr,  # [N] uint8
    rows,  # int32, N
    largest,  # float32
    C: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    inside = row < rows
    unusable = tl.zeros((BM, BK), tl.int32)
    for first in range(0, C, BK):
        channel = first + tl.arange(0, BK)
        mask = inside[:, None] & (channel < C)[None, :]
        x = tl.load(x_ptr + row[:, None] * C + channel[None, :], mask=mask, other=0.0)  # [BM, BK]
        unusable += 1 - (tl.abs(x) <= largest).to(tl.int32)  # NaN compares false
    lost = tl.sum(unusable, 1) > 0  # [BM]
    tl.store(lost_ptr + row, lost.to(tl.uint8), mask=inside)
    for first in range(0, C, BK):
        channel = first + tl.arange(0, BK)
        mask = inside[:, None] & (channel < C)[None, :]
        offset = row[:, None] * C + channel[None, :]  # [BM, BK]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0)  # [BM, BK]
        tl.store(out_ptr + offset, tl.where(lost[:, None], 0.0, x), mask=mask)


@triton.jit(do_not_specialize=["rows", "layer_stride"])
def coupling_clear_kernel(
    data_ptr,  # [L, N, C] any float
    lost_ptr,  # [N] uint8
    rows,  # int32, N
    layer_stride,  # int64
    C: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    lost = tl.load(lost_ptr + row, mask=row < rows, other=0) != 0  # [BM]
    if tl.sum(lost.to(tl.int32), 0) > 0:
        row_ptr = data_ptr + tl.program_id(1).to(tl.int64) * layer_stride + row[:, None] * C  # [BM, 1]
        for first in range(0, C, BK):
            channel = first + tl.arange(0, BK)
            tl.store(row_ptr + channel[None, :], 0.0, mask=lost[:, None] & (channel < C)[None, :])


def coupling_operand(x: Tensor, out: Tensor, *, three: bool = False, tiles: Mapping[str, int] | None = None) -> None:
    """Copy x [N, C] into out, in the type of a matrix product's operand.

    `out` is [N, C], possibly a view into longer rows, or [N, 3 * C] for high | low | high. `tiles` overrides the chosen
    tile sizes.
    """
    rows, channels = x.shape
    assert x.dtype == torch.float32
    assert out.shape == (rows, 3 * channels if three else channels)
    assert channels == 1 or x.stride(1) == out.stride(1) == 1
    assert not three or out.is_contiguous()
    if rows and channels:
        chosen = dict(chosen_tiles("coupling_forward", "operand", x.device) if tiles is None else tiles)
        with torch.cuda.device_of(x):
            coupling_operand_kernel[(triton.cdiv(rows, chosen["BM"]), triton.cdiv(channels, chosen["BK"]))](
                x,
                out,
                rows,
                C=channels,
                X_STRIDE=x.stride(0),
                OUT_STRIDE=out.stride(0),
                THREE=three,
                **chosen,
            )


def coupling_rows(x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Return x [N, C] with zeros in the rows that hold a NaN or a value beyond +-largest, and the mask of these rows.

    Zeros go through a flow and back without affecting the gradient of any other row; a NaN would spread. The mask is
    bool [N].
    """
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    rows, channels = x.shape
    clean, lost = torch.empty_like(x), torch.empty(rows, dtype=torch.uint8, device=x.device)
    if rows:
        chosen = chosen_tiles("coupling_forward", "rows", x.device)
        with torch.cuda.device_of(x):
            coupling_rows_kernel[(triton.cdiv(rows, chosen["BM"]),)](
                x, clean, lost, rows, largest, C=channels, **chosen
            )
    return clean, lost.view(torch.bool)


def coupling_clear(data: Tensor, lost: Tensor) -> None:
    """Set the rows of data [L, N, C] that are lost (bool [N]) to zero; the others are not read."""
    layers, rows, channels = data.shape
    assert lost.shape == (rows,)
    assert lost.dtype == torch.bool
    assert lost.is_contiguous()
    assert data.stride()[1:] == (channels, 1) or rows <= 1
    if data.numel():
        chosen = chosen_tiles("coupling_forward", "rows", data.device)
        with torch.cuda.device_of(data):
            coupling_clear_kernel[(triton.cdiv(rows, chosen["BM"]), layers)](
                data, lost.view(torch.uint8), rows, data.stride(0), C=channels, **chosen
            )
