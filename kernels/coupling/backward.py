"""The gradients of one coupling layer between two matrix products of a library: one pass over memory.

With dv = W_perm^T d_out for v = g y + offset, and y = [x1, x2 exp(s) + a_t]:

    doffset = sum(dv),  dg = sum(dv y),  dy = g dv
    dx = [dy1, dy2 exp(s)]  without the share that flows through the subnet
    da_s = 0.1 ds/da_s (dy2 x2 exp(s) + d_log_det),  da_t = 0.1 dy2

Sums over rows are taken in groups of rows and then over the groups, always in one order: no atomics, the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tile_sizes import tiles as chosen_tiles
from .forward import ABSENT, MOVED, PLAIN, Coupling, load_halves, tanh_and_slope

# Rows whose parameter gradients one program adds up, a multiple of every BM it is launched with. Enough programs for a
# few thousand rows, and partial sums that are a twentieth of the memory traffic.
GROUP_ROWS = 16


@triton.jit
def load_dv(
    dv_ptr,  # [N, C] float32, see FORM
    to_ptr,  # [C] int64, where each channel moves; read if MOVED
    row,  # [BM] int64
    channel,  # [BK] int
    inside,  # [BM, BK] bool
    end,  # int, end of the half's channels
    C: tl.constexpr,
    FORM: tl.constexpr,
):
    """Return the gradient of a tile of v, [BM, BK] float32."""
    if FORM == MOVED:
        source = tl.load(to_ptr + channel, mask=channel < end, other=0)  # [BK]
        return tl.load(dv_ptr + row[:, None] * C + source[None, :], mask=inside, other=0.0)
    return tl.load(dv_ptr + row[:, None] * C + channel[None, :], mask=inside, other=0.0)


@triton.jit
def store_sums(
    sums_ptr,  # [2 * C + 2 * C2] float32, of this group of rows
    tiles,  # doffset, dg and db2, two halves each, [BM, BK] float32
    channel,  # [BK] int, within a half
    C1: tl.constexpr,
    C2: tl.constexpr,
):
    """Store the sums over the rows of a group: doffset | dg | db2."""
    d_offset1, d_offset2, d_g1, d_g2, d_b_s, d_b_t = tiles
    C: tl.constexpr = C1 + C2
    in_passive, in_active = channel < C1, channel < C2
    channel_ptr = sums_ptr + channel
    tl.store(channel_ptr, tl.sum(d_offset1, 0), mask=in_passive)
    tl.store(channel_ptr + C1, tl.sum(d_offset2, 0), mask=in_active)
    tl.store(channel_ptr + C, tl.sum(d_g1, 0), mask=in_passive)
    tl.store(channel_ptr + C + C1, tl.sum(d_g2, 0), mask=in_active)
    tl.store(channel_ptr + 2 * C, tl.sum(d_b_s, 0), mask=in_active)
    tl.store(channel_ptr + 2 * C + C2, tl.sum(d_b_t, 0), mask=in_active)


@triton.jit(do_not_specialize=["rows", "clamp", "inner_clamp"])
def coupling_backward_kernel(
    x_ptr,  # [N, C] float32, the layer's input
    a_ptr,  # [N, 2 * C2] any float, W2 relu(..) without b2
    b2_ptr,  # [2 * C2] float32
    g_ptr,  # [C] float32
    offset_ptr,  # [C] float32
    to_ptr,  # [C] int64, where each channel moves
    dv_ptr,  # [N, C] float32, see FORM
    pull_ptr,  # [N] float32, dv -= pull v: the gradient of -|v|^2 / 2
    d_log_det_ptr,  # [N] float32
    dx_ptr,  # [N, C] float32, without the share that flows through the subnet
    da_ptr,  # [N, 2 * C2] any float
    sums_ptr,  # [groups, 2 * C + 2 * C2] float32: doffset | dg | db2
    rows,  # int32, N
    clamp,  # float32
    inner_clamp,  # float32
    C: tl.constexpr,
    FORM: tl.constexpr,
    LAST: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    channel = tl.program_id(1) * BK + tl.arange(0, BK)  # [BK]
    in_passive, in_active = channel < C1, channel < C2
    b_s = tl.load(b2_ptr + channel, mask=in_active, other=0.0)[None, :]  # [1, BK]
    b_t = tl.load(b2_ptr + C2 + channel, mask=in_active, other=0.0)[None, :]  # [1, BK]
    g1 = tl.load(g_ptr + channel, mask=in_passive, other=0.0)[None, :]  # [1, BK]
    g2 = tl.load(g_ptr + C1 + channel, mask=in_active, other=0.0)[None, :]  # [1, BK]
    d_offset1 = tl.zeros((BM, BK), tl.float32)
    d_offset2 = tl.zeros((BM, BK), tl.float32)
    d_g1 = tl.zeros((BM, BK), tl.float32)
    d_g2 = tl.zeros((BM, BK), tl.float32)
    d_b_s = tl.zeros((BM, BK), tl.float32)
    d_b_t = tl.zeros((BM, BK), tl.float32)

    for first in range(0, GROUP, BM):
        row = tl.program_id(0).to(tl.int64) * GROUP + first + tl.arange(0, BM)  # [BM]
        inside = row < rows
        passive = inside[:, None] & in_passive[None, :]
        active = inside[:, None] & in_active[None, :]
        x_offset = row[:, None] * C + channel[None, :]  # [BM, BK]
        a_offset = row[:, None] * (2 * C2) + channel[None, :]  # [BM, BK]
        x1, x2, a_s, a_t = load_halves(x_ptr + x_offset, a_ptr + a_offset, passive, active, C1, C2)  # [BM, BK] each
        tanh, slope = tanh_and_slope(0.1 * inner_clamp * (a_s + b_s))  # [BM, BK] each
        scale = tl.exp(clamp * tanh)  # [BM, BK]
        y2 = x2 * scale + 0.1 * (a_t + b_t)  # [BM, BK]

        if FORM == ABSENT:
            dv1 = tl.zeros((BM, BK), tl.float32)
            dv2 = tl.zeros((BM, BK), tl.float32)
        else:
            dv1 = load_dv(dv_ptr, to_ptr, row, channel, passive, C1, C, FORM)  # [BM, BK]
            dv2 = load_dv(dv_ptr, to_ptr, row, channel + C1, active, C, C, FORM)  # [BM, BK]
        if LAST:
            pull = tl.load(pull_ptr + row, mask=inside, other=0.0)[:, None]  # [BM, 1]
            dv1 -= pull * (g1 * x1 + tl.load(offset_ptr + channel, mask=in_passive, other=0.0)[None, :])
            dv2 -= pull * (g2 * y2 + tl.load(offset_ptr + C1 + channel, mask=in_active, other=0.0)[None, :])
        dy2 = g2 * dv2  # [BM, BK]
        dx2 = dy2 * scale  # [BM, BK]
        # y2 = x2 exp(s) + a_t and log_det = sum(s); ds/da is clamp inner_clamp (1 - tanh^2), and a carries FrEIA's 0.1
        d_log_det = tl.load(d_log_det_ptr + row, mask=inside, other=0.0)[:, None]  # [BM, 1]
        da_s = (0.1 * clamp * inner_clamp) * slope * (dx2 * x2 + d_log_det)  # [BM, BK]
        da_t = 0.1 * dy2  # [BM, BK]
        tl.store(dx_ptr + x_offset, g1 * dv1, mask=passive)
        tl.store(dx_ptr + x_offset + C1, dx2, mask=active)
        dtype = da_ptr.dtype.element_ty
        tl.store(da_ptr + a_offset, da_s.to(dtype), mask=active)
        tl.store(da_ptr + a_offset + C2, da_t.to(dtype), mask=active)

        d_offset1 += dv1
        d_offset2 += dv2
        d_g1 += dv1 * x1
        d_g2 += dv2 * y2
        d_b_s += da_s
        d_b_t += da_t
    group_ptr = sums_ptr + tl.program_id(0).to(tl.int64) * (2 * C + 2 * C2)
    store_sums(group_ptr, (d_offset1, d_offset2, d_g1, d_g2, d_b_s, d_b_t), channel, C1, C2)


def coupling_backward(
    x: Tensor,  # [N, C] float32
    a: Tensor,  # [N, 2 * C2] float16 or float32
    layer: Coupling,
    dv: Tensor | None,  # [N, C] float32; with a hard permutation the gradient of the permuted v; None: zero
    pull: Tensor | None,  # [N] float32: dv -= pull v
    d_log_det: Tensor,  # [N] float32
    *,
    tiles: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx [N, C] without the subnet's share, da [N, 2 * C2] of a's type, doffset [C], dg [C] and db2 [2 * C2].

    `tiles` overrides the chosen tile sizes.
    """
    rows, channels = x.shape
    active = channels // 2
    layer.check(x, a)
    assert dv is None or (dv.shape == x.shape and dv.is_contiguous())
    assert d_log_det.shape == (rows,)
    assert d_log_det.is_contiguous()
    form = ABSENT if dv is None else MOVED if layer.to is not None else PLAIN
    dx, da = torch.empty_like(x), torch.empty_like(a)
    groups = triton.cdiv(rows, GROUP_ROWS)
    sums = torch.empty(groups, 2 * channels + 2 * active, device=x.device)
    if rows:
        chosen = dict(chosen_tiles("coupling_backward", "rows", x.device) if tiles is None else tiles)
        assert GROUP_ROWS % chosen["BM"] == 0
        with torch.cuda.device_of(x):
            coupling_backward_kernel[(groups, triton.cdiv(channels - active, chosen["BK"]))](
                x,
                a,
                layer.b2,
                layer.g,
                layer.offset,
                layer.to if layer.to is not None else layer.g,
                dv if dv is not None else x,
                pull if pull is not None else d_log_det,
                d_log_det,
                dx,
                da,
                sums,
                rows,
                layer.clamp,
                layer.inner_clamp,
                C=channels,
                FORM=form.value,
                LAST=pull is not None,
                GROUP=GROUP_ROWS,
                **chosen,
            )
    d_offset, d_g, d_b2 = sums.sum(dim=0).split([channels, channels, 2 * active])
    return dx, da, d_offset, d_g, d_b2
