"""The gradients of one coupling layer between two matrix products of a library: one pass over memory.

With dv = W_perm^T d_out for v = g y + offset, and y = [x1, x2 exp(s) + a_t]:

    doffset = sum(dv),  dg = sum(dv y),  dy = g dv
    dx = [dy1, dy2 exp(s)]  without what flows through the subnet
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
from .forward import ABSENT, MOVED, PLAIN, Coupling, tanh_and_slope

# Rows whose parameter gradients one program of the backward adds up, a multiple of every BR it is launched with. Enough
# programs for a few thousand rows, and partial sums that are a twentieth of the traffic.
GROUP_ROWS = 16


@triton.jit
def _load_dv(DV, TO, row, channel, inside, width, C: tl.constexpr, FORM: tl.constexpr):
    if FORM == MOVED:
        place = tl.load(TO + channel, mask=channel < width, other=0)
        return tl.load(DV + row[:, None] * C + place[None, :], mask=inside, other=0.0)
    return tl.load(DV + row[:, None] * C + channel[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["rows", "clamp", "inner_clamp"])
def coupling_backward_kernel(
    X,  # [N, C] fp32, the layer's input
    A,  # [N, 2 * C2], W2 relu(..) without b2
    B2,  # [2 * C2] fp32
    G,  # [C] fp32
    OFFSET,  # [C] fp32
    TO,  # [C] int64, where each channel moves
    DV,  # [N, C] fp32, see FORM
    PULL,  # [N] fp32, dv -= pull v: the gradient of -|v|^2 / 2
    D_LOG_DET,  # [N] fp32
    DX,  # [N, C] fp32, without what flows through the subnet
    DA,  # [N, 2 * C2]
    SUMS,  # [groups, 2 * C + 2 * C2] fp32: doffset | dg | db2
    rows,
    clamp,
    inner_clamp,
    C: tl.constexpr,
    FORM: tl.constexpr,
    LAST: tl.constexpr,
    GROUP: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    in_passive, in_active = channel < C1, channel < C2
    b_s = tl.load(B2 + channel, mask=in_active, other=0.0)[None, :]
    b_t = tl.load(B2 + C2 + channel, mask=in_active, other=0.0)[None, :]
    g1 = tl.load(G + channel, mask=in_passive, other=0.0)[None, :]
    g2 = tl.load(G + C1 + channel, mask=in_active, other=0.0)[None, :]
    d_offset1 = tl.zeros((BR, BC), tl.float32)
    d_offset2 = tl.zeros((BR, BC), tl.float32)
    d_g1 = tl.zeros((BR, BC), tl.float32)
    d_g2 = tl.zeros((BR, BC), tl.float32)
    d_b_s = tl.zeros((BR, BC), tl.float32)
    d_b_t = tl.zeros((BR, BC), tl.float32)

    for first in range(0, GROUP, BR):
        row = tl.program_id(0).to(tl.int64) * GROUP + first + tl.arange(0, BR)
        inside = row < rows
        passive = inside[:, None] & in_passive[None, :]
        active = inside[:, None] & in_active[None, :]
        at_x = row[:, None] * C + channel[None, :]
        at_a = row[:, None] * (2 * C2) + channel[None, :]
        x1 = tl.load(X + at_x, mask=passive, other=0.0)  # [BR, BC]
        x2 = tl.load(X + at_x + C1, mask=active, other=0.0)
        a_s = tl.load(A + at_a, mask=active, other=0.0).to(tl.float32)
        a_t = tl.load(A + at_a + C2, mask=active, other=0.0).to(tl.float32)
        tanh, slope = tanh_and_slope(0.1 * inner_clamp * (a_s + b_s))
        scale = tl.exp(clamp * tanh)
        y2 = x2 * scale + 0.1 * (a_t + b_t)

        if FORM == ABSENT:
            dv1 = tl.zeros((BR, BC), tl.float32)
            dv2 = tl.zeros((BR, BC), tl.float32)
        else:
            dv1 = _load_dv(DV, TO, row, channel, passive, C1, C, FORM)
            dv2 = _load_dv(DV, TO, row, channel + C1, active, C, C, FORM)
        if LAST:
            pull = tl.load(PULL + row, mask=inside, other=0.0)[:, None]
            dv1 -= pull * (g1 * x1 + tl.load(OFFSET + channel, mask=in_passive, other=0.0)[None, :])
            dv2 -= pull * (g2 * y2 + tl.load(OFFSET + C1 + channel, mask=in_active, other=0.0)[None, :])
        dy2 = g2 * dv2
        dx2 = dy2 * scale
        # y2 = x2 exp(s) + a_t and log_det = sum(s); ds/da is clamp inner_clamp (1 - tanh^2), and a carries FrEIA's 0.1
        d_log_det = tl.load(D_LOG_DET + row, mask=inside, other=0.0)[:, None]
        da_s = (0.1 * clamp * inner_clamp) * slope * (dx2 * x2 + d_log_det)
        da_t = 0.1 * dy2
        tl.store(DX + at_x, g1 * dv1, mask=passive)
        tl.store(DX + at_x + C1, dx2, mask=active)
        dtype = DA.dtype.element_ty
        tl.store(DA + at_a, da_s.to(dtype), mask=active)
        tl.store(DA + at_a + C2, da_t.to(dtype), mask=active)

        d_offset1 += dv1
        d_offset2 += dv2
        d_g1 += dv1 * x1
        d_g2 += dv2 * y2
        d_b_s += da_s
        d_b_t += da_t
    at = SUMS + tl.program_id(0).to(tl.int64) * (2 * C + 2 * C2) + channel
    tl.store(at, tl.sum(d_offset1, 0), mask=in_passive)
    tl.store(at + C1, tl.sum(d_offset2, 0), mask=in_active)
    tl.store(at + C, tl.sum(d_g1, 0), mask=in_passive)
    tl.store(at + C + C1, tl.sum(d_g2, 0), mask=in_active)
    tl.store(at + 2 * C, tl.sum(d_b_s, 0), mask=in_active)
    tl.store(at + 2 * C + C2, tl.sum(d_b_t, 0), mask=in_active)


def coupling_backward(
    x: Tensor,  # [N, C] float32
    a: Tensor,  # [N, 2 * C2] float16 or float32
    layer: Coupling,
    dv: Tensor | None,  # [N, C] float32; with a hard permutation the gradient of the moved v; None: zero
    pull: Tensor | None,  # [N] float32, subtracts pull v from dv
    d_log_det: Tensor,  # [N] float32
    *,
    tiles: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients: dx [N, C] but for the subnet's share, da [N, 2 * C2] of a's type, doffset [C], dg [C], db2 [2 * C2].

    `tiles` overrides the tile sizes chosen.
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
        assert GROUP_ROWS % chosen["BR"] == 0
        with torch.cuda.device_of(x):
            coupling_backward_kernel[(groups, triton.cdiv(channels - active, chosen["BC"]))](
                x, a, layer.b2, layer.g, layer.offset, layer.to if layer.to is not None else layer.g,
                dv if dv is not None else x, pull if pull is not None else d_log_det, d_log_det, dx, da, sums,
                rows, layer.clamp, layer.inner_clamp,
                C=channels, FORM=form.value, LAST=pull is not None, GROUP=GROUP_ROWS, **chosen,
            )  # fmt: skip
    d_offset, d_g, d_b2 = sums.sum(dim=0).split([channels, channels, 2 * active])
    return dx, da, d_offset, d_g, d_b2
