"""One coupling layer between two matrix products of a library, for flows too wide to stay on the chip.

Of a layer (equations: fastbgad/reference/flow.py)

    a = 0.1 (W2 relu(W1 [x1; p] + b1) + b2)
    y = [x1, x2 exp(s) + a_t],  s = clamp tanh(a_s) or clamp tanh(a_s / clamp)
    out = W_perm (g y + offset)

the products are the library's; what lies between W2 and W_perm is one pass over memory here. The way back:
coupling_backward.py.
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

# What becomes of v = g y + offset, and where its gradient comes from.
ABSENT = tl.constexpr(0)  # nothing: the last layer when only |z| is asked for
PLAIN = tl.constexpr(1)  # [N, C] float32
SPLIT = tl.constexpr(2)  # [N, 3 C] 16-bit, high | low | high, for an accurate product
MOVED = tl.constexpr(3)  # [N, C] float32, each channel moved to its place: the next state itself


@triton.jit
def tanh_and_slope(a):
    """tanh(a) and its derivative 1 - tanh^2(a), from e^(-2 |a|), which never overflows."""
    e = tl.exp(-2.0 * tl.abs(a))
    magnitude = (1.0 - e) / (1.0 + e)
    return tl.where(a < 0, -magnitude, magnitude), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _store_v(V, TO, row, channel, v, inside, width, C: tl.constexpr, FORM: tl.constexpr):
    if FORM == SPLIT:
        store_split(V, row, channel, v, inside, C)
    elif FORM == MOVED:
        place = tl.load(TO + channel, mask=channel < width, other=0)
        tl.store(V + row[:, None] * C + place[None, :], v, mask=inside)
    elif FORM == PLAIN:
        tl.store(V + row[:, None] * C + channel[None, :], v, mask=inside)


@triton.jit(do_not_specialize=["rows", "clamp", "inner_clamp", "largest"])
def coupling_forward_kernel(
    X,  # [N, C] fp32
    A,  # [N, 2 * C2], W2 relu(..) without b2
    B2,  # [2 * C2] fp32
    G,  # [C] fp32
    OFFSET,  # [C] fp32
    TO,  # [C] int64, where each channel moves
    LOG_DET,  # [N] fp32, of the layers before
    V,  # see FORM
    NEW_LOG_DET,  # [N] fp32
    SQUARE,  # [N] fp32, |v|^2
    rows,
    clamp,
    inner_clamp,
    largest,  # the largest number that the products' operands can hold
    C: tl.constexpr,
    FORM: tl.constexpr,
    WANT_SQUARE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = row < rows
    s_sum = tl.zeros((BR, BC), tl.float32)
    square = tl.zeros((BR, BC), tl.float32)
    for first in range(0, C1, BC):
        channel = first + tl.arange(0, BC)
        passive = inside[:, None] & (channel < C1)[None, :]
        active = inside[:, None] & (channel < C2)[None, :]
        x = X + row[:, None] * C + channel[None, :]
        a = A + row[:, None] * (2 * C2) + channel[None, :]
        x1 = tl.load(x, mask=passive, other=0.0)  # [BR, BC]
        x2 = tl.load(x + C1, mask=active, other=0.0)
        a_s = tl.load(a, mask=active, other=0.0).to(tl.float32)
        a_t = tl.load(a + C2, mask=active, other=0.0).to(tl.float32)
        # What does not fit makes s NaN, and so log_det; NaN itself compares false. A hidden unit that overflowed is in
        # every a_t and shows in v2; x1 and a_s could hide, behind the ReLU of the hidden units and behind tanh.
        a_s = tl.where((tl.abs(x1) <= largest) & (tl.abs(a_s) <= largest), a_s, float("nan"))
        a_s = 0.1 * (a_s + tl.load(B2 + channel, mask=channel < C2, other=0.0)[None, :])
        a_t = 0.1 * (a_t + tl.load(B2 + C2 + channel, mask=channel < C2, other=0.0)[None, :])

        tanh, _ = tanh_and_slope(a_s * inner_clamp)
        s = clamp * tanh
        y2 = x2 * tl.exp(s) + a_t
        v1 = x1 * tl.load(G + channel, mask=channel < C1, other=0.0)[None, :]
        v1 += tl.load(OFFSET + channel, mask=channel < C1, other=0.0)[None, :]
        v2 = y2 * tl.load(G + C1 + channel, mask=channel < C2, other=0.0)[None, :]
        v2 += tl.load(OFFSET + C1 + channel, mask=channel < C2, other=0.0)[None, :]

        # Outside the mask everything was read as zero, so s and v are zero there.
        s_sum += tl.where((tl.abs(v1) <= largest) & (tl.abs(v2) <= largest), s, float("nan"))
        if WANT_SQUARE:
            square += v1 * v1 + v2 * v2
        _store_v(V, TO, row, channel, v1, passive, C1, C, FORM)
        _store_v(V, TO, row, channel + C1, v2, active, C, C, FORM)
    log_det = tl.load(LOG_DET + row, mask=inside, other=0.0) + tl.sum(s_sum, 1)
    tl.store(NEW_LOG_DET + row, log_det, mask=inside)
    if WANT_SQUARE:
        tl.store(SQUARE + row, tl.sum(square, 1), mask=inside)


class Coupling(NamedTuple):
    """What the kernels need to know of one layer."""

    b2: Tensor  # [2 * C2] float32
    g: Tensor  # [C] float32
    offset: Tensor  # [C] float32
    to: Tensor | None  # [C] int64, hard permutation: channel c of v becomes channel to[c]; None for a rotation
    clamp: float
    scaled_tanh: bool  # s = clamp tanh(a / clamp) instead of clamp tanh(a)

    @property
    def inner_clamp(self) -> float:
        """What a_s is multiplied by inside the tanh."""
        return 1 / self.clamp if self.scaled_tanh else 1.0

    def check(self, x: Tensor, a: Tensor) -> None:
        """Asserts that these are a layer's x [N, C] and a [N, 2 * C2]."""
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
    """v = g y + offset as the next product reads it, log_det + sum(s) [N], and |v|^2 [N].

    v is [N, 3 C] high | low | high of a's type if that is float16, else [N, C] float32; with a hard permutation it is
    the next state [N, C] float32, which needs no product, in `out` if given. What is not asked for comes back empty.

    A row's log_det becomes NaN where a product read or gave a number that a's type cannot hold, or will read one.

    `tiles` overrides the tile sizes chosen.
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
            coupling_forward_kernel[(triton.cdiv(rows, chosen["BR"]),)](
                x, a, layer.b2, layer.g, layer.offset, layer.to if layer.to is not None else layer.g, log_det,
                out, new_log_det, square, rows, layer.clamp, layer.inner_clamp, torch.finfo(a.dtype).max,
                C=channels, FORM=form.value, WANT_SQUARE=want_square, **chosen,
            )  # fmt: skip
    return out, new_log_det, square
