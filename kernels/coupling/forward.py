"""One coupling layer between two matrix products of a library, for flows too wide to stay on the chip.

    a = 0.1 (W2 relu(W1 [x1; p] + b1) + b2)
    y = [x1, x2 exp(s) + a_t],  s = clamp tanh(a_s) or clamp tanh(a_s / clamp)
    out = W_perm v,  v = g y + offset

(equations: fastbgad/reference/flow.py). A library computes the products; everything between W2 and W_perm is one pass
over memory here. The gradients are in backward.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tile_sizes import tiles as chosen_tiles
from .operands import store_split

# FORM: how v = g y + offset is stored, and its gradient read.
ABSENT = tl.constexpr(0)  # not at all: the last layer where only |z| is wanted
PLAIN = tl.constexpr(1)  # [N, C] float32
SPLIT = tl.constexpr(2)  # [N, 3 C] 16-bit, high | low | high, for an accurate product
MOVED = tl.constexpr(3)  # [N, C] float32, each channel permuted: the next layer's input itself


@triton.jit
def tanh_and_slope(a):
    """Return tanh(a) and its derivative 1 - tanh^2(a), from e^(-2 |a|), which never overflows."""
    e = tl.exp(-2.0 * tl.abs(a))
    magnitude = (1.0 - e) / (1.0 + e)
    return tl.where(a < 0, -magnitude, magnitude), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def load_halves(
    x_tile_ptr,  # [BM, BK] pointers to float32, into x [N, C]
    a_tile_ptr,  # [BM, BK] pointers to any float, into a [N, 2 * C2]
    passive,  # [BM, BK] bool
    active,  # [BM, BK] bool
    C1: tl.constexpr,
    C2: tl.constexpr,
):
    """Return x1, x2, a_s and a_t of a tile, [BM, BK] float32 each."""
    x1 = tl.load(x_tile_ptr, mask=passive, other=0.0)
    x2 = tl.load(x_tile_ptr + C1, mask=active, other=0.0)
    a_s = tl.load(a_tile_ptr, mask=active, other=0.0).to(tl.float32)
    a_t = tl.load(a_tile_ptr + C2, mask=active, other=0.0).to(tl.float32)
    return x1, x2, a_s, a_t


@triton.jit
def store_v(
    v_ptr,  # see FORM
    to_ptr,  # [C] int64, where each channel moves; read if MOVED
    row,  # [BM] int64
    channel,  # [BK] int
    v,  # [BM, BK] float32
    inside,  # [BM, BK] bool
    end,  # int, end of the half's channels
    C: tl.constexpr,
    FORM: tl.constexpr,
):
    """Store v in one of its forms."""
    if FORM == SPLIT:
        store_split(v_ptr, row, channel, v, inside, C)
    elif FORM == MOVED:
        target = tl.load(to_ptr + channel, mask=channel < end, other=0)  # [BK]
        tl.store(v_ptr + row[:, None] * C + target[None, :], v, mask=inside)
    elif FORM == PLAIN:
        tl.store(v_ptr + row[:, None] * C + channel[None, :], v, mask=inside)


@triton.jit
def scale_and_shift(
    y,  # [BM, BK] float32
    g_ptr,  # [C] float32
    offset_ptr,  # [C] float32
    channel,  # [BK] int, within the half
    C_HALF: tl.constexpr,
):
    """Return v = g y + offset of a half, [BM, BK] float32; the pointers are those of the half."""
    v = y * tl.load(g_ptr + channel, mask=channel < C_HALF, other=0.0)[None, :]
    v += tl.load(offset_ptr + channel, mask=channel < C_HALF, other=0.0)[None, :]
    return v


@triton.jit(do_not_specialize=["rows", "clamp", "inner_clamp", "largest"])
def coupling_forward_kernel(
    x_ptr,  # [N, C] float32
    a_ptr,  # [N, 2 * C2] any float, W2 relu(..) without b2
    b2_ptr,  # [2 * C2] float32
    g_ptr,  # [C] float32
    offset_ptr,  # [C] float32
    to_ptr,  # [C] int64, where each channel moves
    log_det_ptr,  # [N] float32, of the layers before
    v_ptr,  # see FORM
    new_log_det_ptr,  # [N] float32
    square_ptr,  # [N] float32, |v|^2
    rows,  # int32, N
    clamp,  # float32
    inner_clamp,  # float32
    largest,  # float32, the largest number that the products' operands can hold
    C: tl.constexpr,
    FORM: tl.constexpr,
    WANT_SQUARE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    inside = row < rows
    s_sum = tl.zeros((BM, BK), tl.float32)
    square = tl.zeros((BM, BK), tl.float32)
    for first in range(0, C1, BK):
        channel = first + tl.arange(0, BK)  # [BK]
        passive = inside[:, None] & (channel < C1)[None, :]
        active = inside[:, None] & (channel < C2)[None, :]
        x_tile_ptr = x_ptr + row[:, None] * C + channel[None, :]
        a_tile_ptr = a_ptr + row[:, None] * (2 * C2) + channel[None, :]
        x1, x2, a_s, a_t = load_halves(x_tile_ptr, a_tile_ptr, passive, active, C1, C2)  # [BM, BK] each
        # A number that does not fit makes s NaN, and so log_det; NaN itself compares false. A hidden unit that
        # overflowed is in every a_t and shows in v2; x1 and a_s could hide behind the hidden units' ReLU and the tanh.
        a_s = tl.where((tl.abs(x1) <= largest) & (tl.abs(a_s) <= largest), a_s, float("nan"))
        a_s = 0.1 * (a_s + tl.load(b2_ptr + channel, mask=channel < C2, other=0.0)[None, :])
        a_t = 0.1 * (a_t + tl.load(b2_ptr + C2 + channel, mask=channel < C2, other=0.0)[None, :])

        tanh, _ = tanh_and_slope(a_s * inner_clamp)
        s = clamp * tanh  # [BM, BK]
        y2 = x2 * tl.exp(s) + a_t  # [BM, BK]
        v1 = scale_and_shift(x1, g_ptr, offset_ptr, channel, C1)  # [BM, BK]
        v2 = scale_and_shift(y2, g_ptr + C1, offset_ptr + C1, channel, C2)  # [BM, BK]

        # Outside the mask everything was read as zero, so s and v are zero there.
        s_sum += tl.where((tl.abs(v1) <= largest) & (tl.abs(v2) <= largest), s, float("nan"))
        if WANT_SQUARE:
            square += v1 * v1 + v2 * v2
        store_v(v_ptr, to_ptr, row, channel, v1, passive, C1, C, FORM)
        store_v(v_ptr, to_ptr, row, channel + C1, v2, active, C, C, FORM)
    log_det = tl.load(log_det_ptr + row, mask=inside, other=0.0) + tl.sum(s_sum, 1)  # [BM]
    tl.store(new_log_det_ptr + row, log_det, mask=inside)
    if WANT_SQUARE:
        tl.store(square_ptr + row, tl.sum(square, 1), mask=inside)


class Coupling(NamedTuple):
    """Parameters of one layer that the kernels need."""

    b2: Tensor  # [2 * C2] float32
    g: Tensor  # [C] float32
    offset: Tensor  # [C] float32
    to: Tensor | None  # [C] int64, hard permutation: channel c of v becomes channel to[c]; None for a rotation
    clamp: float
    scaled_tanh: bool  # s = clamp tanh(a / clamp) instead of clamp tanh(a)

    @property
    def inner_clamp(self) -> float:
        """Factor of a_s inside the tanh."""
        return 1 / self.clamp if self.scaled_tanh else 1.0

    def check(self, x: Tensor, a: Tensor) -> None:
        """Assert that these are a layer's x [N, C] and a [N, 2 * C2], as the kernels read them."""
        rows, channels = x.shape
        assert a.shape == (rows, 2 * (channels // 2))
        assert a.dtype in (torch.float16, torch.float32)
        assert self.b2.shape == a.shape[1:]
        assert self.g.shape == self.offset.shape == x.shape[1:]
        assert x.dtype == self.b2.dtype == self.g.dtype == self.offset.dtype == torch.float32
        assert all(tensor.is_contiguous() for tensor in (x, a, self.b2, self.g, self.offset))
        assert self.to is None or (self.to.shape == x.shape[1:] and self.to.dtype == torch.int64)


def coupling_forward(
    x: Tensor,  # [N, C] float32
    a: Tensor,  # [N, 2 * C2] float16 or float32, the type of the products' operands
    layer: Coupling,
    log_det: Tensor,  # [N] float32
    *,
    want_v: bool = True,
    want_square: bool = False,
    out: Tensor | None = None,
    tiles: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return v = g y + offset as the next product reads it, log_det + sum(s) [N], and |v|^2 [N].

    v is [N, 3 C] high | low | high of a's type if that is float16, else [N, C] float32; with a hard permutation it is
    the next layer's input [N, C] float32, which needs no product, in `out` if given. Results that are not wanted are
    empty.

    A row's log_det becomes NaN where a product read or returned a number that a's type cannot hold, or will read one.

    `tiles` overrides the chosen tile sizes.
    """
    rows, channels = x.shape
    layer.check(x, a)
    assert log_det.shape == (rows,)
    assert log_det.is_contiguous()
    split = a.dtype == torch.float16
    form = ABSENT if not want_v else MOVED if layer.to is not None else SPLIT if split else PLAIN
    if out is None:
        columns = {ABSENT.value: 0, SPLIT.value: 3 * channels}.get(form.value, channels)
        dtype = torch.float16 if form == SPLIT else torch.float32
        out = torch.empty(rows if columns else 0, columns, dtype=dtype, device=x.device)
    assert form == ABSENT or out.shape == (rows, 3 * channels if form == SPLIT else channels)
    assert out.is_contiguous()
    new_log_det = torch.empty_like(log_det)
    square = torch.empty(rows if want_square else 0, device=x.device)
    if rows:
        chosen = dict(chosen_tiles("coupling_forward", "rows", x.device) if tiles is None else tiles)
        with torch.cuda.device_of(x):
            coupling_forward_kernel[(triton.cdiv(rows, chosen["BM"]),)](
                x,
                a,
                layer.b2,
                layer.g,
                layer.offset,
                layer.to if layer.to is not None else layer.g,
                log_det,
                out,
                new_log_det,
                square,
                rows,
                layer.clamp,
                layer.inner_clamp,
                torch.finfo(a.dtype).max,
                C=channels,
                FORM=form.value,
                WANT_SQUARE=want_square,
                **chosen,
            )
    return out, new_log_det, square
