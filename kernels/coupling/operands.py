"""What a library's matrix products read in the wide flow: 16-bit operands, and rows without a number that is none.

16 bits are too few for the permutation, the largest error of all: its input is split into a high and a low part,

    v W^T = v_high W_high^T + v_low W_high^T + v_high W_low^T = [v_high | v_low | v_high] [W_high | W_high | W_low]^T

(without v_low W_low^T, which is below the rounding of the sum), one product of depth 3 C. What does not fit in 16 bits
becomes infinite.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tile_sizes import tiles as chosen_tiles


@triton.jit
def store_split(OUT, row, channel, value, inside, C: tl.constexpr):
    """high | low | high, [BR, BC] of each."""
    dtype = OUT.dtype.element_ty
    high = value.to(dtype)
    low = (value - high.to(tl.float32)).to(dtype)
    at = OUT + row[:, None] * (3 * C) + channel[None, :]
    tl.store(at, high, mask=inside)
    tl.store(at + C, low, mask=inside)
    tl.store(at + 2 * C, high, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def coupling_operand_kernel(
    X,  # [N, ..] fp32
    OUT,  # [N, ..], or [N, 3 * COLUMNS] high | low | high if THREE
    rows,
    COLUMNS: tl.constexpr,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    THREE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (row < rows)[:, None] & (channel < COLUMNS)[None, :]
    value = tl.load(X + row[:, None] * X_STRIDE + channel[None, :], mask=inside, other=0.0)
    if THREE:
        store_split(OUT, row, channel, value, inside, COLUMNS)
    else:
        tl.store(OUT + row[:, None] * OUT_STRIDE + channel[None, :], value.to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "largest"])
def coupling_rows_kernel(
    X,  # [N, C] fp32
    OUT,  # [N, C] fp32
    LOST,  # [N] uint8
    rows,
    largest,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = row < rows
    unusable = tl.zeros((BR, BC), tl.int32)
    for first in range(0, C, BC):
        channel = first + tl.arange(0, BC)
        mask = inside[:, None] & (channel < C)[None, :]
        x = tl.load(X + row[:, None] * C + channel[None, :], mask=mask, other=0.0)  # [BR, BC]
        unusable += 1 - (tl.abs(x) <= largest).to(tl.int32)  # NaN compares false
    lost = tl.sum(unusable, 1) > 0
    tl.store(LOST + row, lost.to(tl.uint8), mask=inside)
    for first in range(0, C, BC):
        channel = first + tl.arange(0, BC)
        mask = inside[:, None] & (channel < C)[None, :]
        at = row[:, None] * C + channel[None, :]
        x = tl.load(X + at, mask=mask, other=0.0)
        tl.store(OUT + at, tl.where(lost[:, None], 0.0, x), mask=mask)


@triton.jit(do_not_specialize=["rows", "layer_stride"])
def coupling_clear_kernel(
    DATA,  # [L, N, WIDTH]
    LOST,  # [N] uint8
    rows,
    layer_stride,
    WIDTH: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    lost = tl.load(LOST + row, mask=row < rows, other=0) != 0
    if tl.sum(lost.to(tl.int32), 0) > 0:
        line = DATA + tl.program_id(1).to(tl.int64) * layer_stride + row[:, None] * WIDTH
        for first in range(0, WIDTH, BC):
            column = first + tl.arange(0, BC)
            tl.store(line + column[None, :], 0.0, mask=lost[:, None] & (column < WIDTH)[None, :])


def coupling_operand(x: Tensor, out: Tensor, *, three: bool = False, tiles: Mapping[str, int] | None = None) -> None:
    """Writes x [N, K] into out, in the type of a matrix product's operand.

    `out` is [N, K], a view into longer rows if need be, or [N, 3 K] for high | low | high. `tiles` overrides the tile
    sizes chosen.
    """
    rows, columns = x.shape
    assert x.dtype == torch.float32
    assert out.shape == (rows, 3 * columns if three else columns)
    assert columns == 1 or x.stride(1) == out.stride(1) == 1
    assert not three or out.is_contiguous()
    if rows and columns:
        chosen = dict(chosen_tiles("coupling_forward", "operand", x.device) if tiles is None else tiles)
        with torch.cuda.device_of(x):
            coupling_operand_kernel[(triton.cdiv(rows, chosen["BR"]), triton.cdiv(columns, chosen["BC"]))](
                x, out, rows, COLUMNS=columns, X_STRIDE=x.stride(0), OUT_STRIDE=out.stride(0), THREE=three, **chosen,
            )  # fmt: skip


def coupling_rows(x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """x [N, C] with zeros for the rows that hold a NaN or a value beyond +-largest, and which rows these are, bool [N].

    Zeros travel through a flow and back without touching any other row's gradient; a NaN does not.
    """
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    rows, channels = x.shape
    clean, lost = torch.empty_like(x), torch.empty(rows, dtype=torch.uint8, device=x.device)
    if rows:
        chosen = chosen_tiles("coupling_forward", "rows", x.device)
        with torch.cuda.device_of(x):
            coupling_rows_kernel[(triton.cdiv(rows, chosen["BR"]),)](
                x, clean, lost, rows, largest, C=channels, **chosen
            )
    return clean, lost.view(torch.bool)


def coupling_clear(data: Tensor, lost: Tensor) -> None:
    """Zeros for the rows of data [L, N, K] that are lost, bool [N]; the others are not even read."""
    layers, rows, width = data.shape
    assert lost.shape == (rows,)
    assert lost.dtype == torch.bool
    assert lost.is_contiguous()
    assert data.stride()[1:] == (width, 1) or rows <= 1
    if data.numel():
        chosen = chosen_tiles("coupling_forward", "rows", data.device)
        with torch.cuda.device_of(data):
            coupling_clear_kernel[(triton.cdiv(rows, chosen["BR"]), layers)](
                data, lost.view(torch.uint8), rows, data.stride(0), WIDTH=width, **chosen
            )
