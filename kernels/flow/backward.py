"""Gradients of the flow from the saved activations: one launch along the rows, one over the weights.

With z the output of the last layer, v = g y + offset, y = [x1, x2 exp(s) + 0.1 pre_t], log_det = sum(s) + sum(log g):

    dv = W_perm^T d_out,  dg = sum(dv y),  doffset = sum(dv),  dy = g dv
    d_pre_s = (dy2 x2 exp(s) + d_log_det) ds/dpre_s,  d_pre_t = 0.1 dy2,  dx2 = dy2 exp(s)
    d_hidden = W2^T d_pre where the hidden unit is active,  dx1 = dy1 + W1x^T d_hidden

`flow_backward_kernel` carries the gradient of a tile of rows back through all layers and writes d_pre and a few sums
per tile and layer. `flow_weight_gradient_kernel` (weight_gradient.py) then sums the gradients of the subnet's weights
over the rows. There are no atomics: the same input gives the same bits.

All gradients inside are multiplied by a scale, a power of two that keeps them inside the range of float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .condition import DENSE, TABLES, add_condition, load_condition, locate_rows
from .forward import Saved
from .permutation import permute
from .rows import Rows, condition_kind
from .staging import program_memory, staging
from .unpack import PackedGradients, flow_unpack
from .weight_gradient import flow_weight_gradient_kernel, row_splits
from .weights import FlowWeights


@triton.jit
def subnet_input_gradient(
    d1,  # [BM, K] float32
    operands,  # x1, d_pre_s, d_pre_t, [BM, K] operand each
    layer,  # int
    condition,  # see `add_condition`
    weight_ptrs,  # w1x_ptr, w1p_ptr, bias_ptr, table_ptr, w2_ptr
    K: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    PP: tl.constexpr,
    COND: tl.constexpr,
    BH: tl.constexpr,
    NS: tl.constexpr,
):
    """Return d1 + W1x^T (W2^T d_pre where the hidden unit is active), [BM, K] float32."""
    x1, ds, dt = operands
    w1x_ptr, w1p_ptr, bias_ptr, table_ptr, w2_ptr = weight_ptrs
    channel = tl.arange(0, K)
    for first in tl.range(0, H, BH, num_stages=NS):
        unit = first + tl.arange(0, BH)
        w1x = tl.load(w1x_ptr + layer * HP * K + unit[None, :] * K + channel[:, None])  # [K, BH]
        hidden = tl.dot(x1, w1x, input_precision="tf32x3")  # [BM, BH]
        hidden = add_condition(hidden, layer, unit, condition, (w1p_ptr, bias_ptr, table_ptr), HP, PP, COND)
        w2_tile_ptr = w2_ptr + layer * 2 * K * HP + channel[:, None] * HP + unit[None, :]  # [K, BH]
        d_hidden = tl.dot(ds, tl.load(w2_tile_ptr), input_precision="tf32x3")  # [BM, BH]
        d_hidden = tl.dot(dt, tl.load(w2_tile_ptr + K * HP), d_hidden, input_precision="tf32x3")
        d_hidden = tl.where(hidden > 0, d_hidden, 0.0).to(x1.dtype)
        w1x_rows = tl.load(w1x_ptr + layer * HP * K + unit[:, None] * K + channel[None, :])  # [BH, K]
        d1 = tl.dot(d_hidden, w1x_rows, d1, input_precision="tf32x3")
    return d1


@triton.jit(do_not_specialize=["rows", "sources", "blocks", "layers", "clamp", "inner_clamp"])
def flow_backward_kernel(
    index_ptr,  # [N] int64; read if HAS_INDEX
    condition_ptr,  # [R, P] any float; read if DENSE
    w1x_ptr,  # [L, HP, K] operand, as all weights laid out by `weights.py`
    w1p_ptr,  # [L, HP, PP] operand; read if DENSE
    bias_ptr,  # [L, HP] float32; read if DENSE or NONE
    table_ptr,  # [L, height + width, HP] operand; read if TABLES
    w2_ptr,  # [L, 2, K, HP] operand
    affine_ptr,  # [L, 3, 2, K] float32
    perm_ptr,  # [L, 2, S, 2, 2, K, K] operand; read unless HARD
    perm_index_ptr,  # [L, 2, 2, K] int32; read if HARD
    stage_ptr,  # [programs, S, BM, 2 * K] operand; used if BK
    state_ptr,  # [programs, BM, 2 * K] float32; used if BK
    lp_ptr,  # [N] float32
    v_ptr,  # [N, C] float32, g y + offset of the last layer
    saved_x_ptr,  # [L, 2, N, CS] operand
    saved_y2_ptr,  # [L, N, CS] operand
    saved_s_ptr,  # [L, N, CS] float32
    d_lp_ptr,  # [N] float32
    d_log_det_ptr,  # [N] float32
    d_z_ptr,  # [N, C] float32; read if HAS_DZ
    scale_ptr,  # [1] float32
    d_x_ptr,  # [N, C] float32; written if WANT_DX
    d_pre_ptr,  # [L, 2, N, CS] operand
    partial_ptr,  # [blocks, L, 6, K] float32: sums of dv y | dv | d_pre, two halves each
    partial_det_ptr,  # [blocks] float32
    rows,  # int32, N
    sources,  # int32, R
    height,  # int32, of a map
    width,  # int32, of a map
    blocks,  # int32, tiles of rows
    layers,  # int32, L
    clamp,  # float32
    inner_clamp,  # float32
    C: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    COND: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    GATHER: tl.constexpr,
    HARD: tl.constexpr,
    HAS_DZ: tl.constexpr,
    WANT_DX: tl.constexpr,
    CS: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    NS: tl.constexpr,
):
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    dtype = w1x_ptr.dtype.element_ty
    channel = tl.arange(0, K)
    scale = tl.load(scale_ptr)
    saved_layer = tl.cast(rows, tl.int64) * CS
    if BK:
        stage_ptr, state_ptr = program_memory(stage_ptr, state_ptr, BM, K)
    subnet_ptrs = (w1x_ptr, w1p_ptr, bias_ptr, table_ptr, w2_ptr)
    permutation = (perm_ptr, perm_index_ptr, stage_ptr)

    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * BM + tl.arange(0, BM)
        written = row < rows
        source, line, column, inside = locate_rows(
            index_ptr, row, written, sources, width, height * width, HAS_INDEX, GATHER
        )
        # A row without results has no gradient, and its NaN must not reach the gradients of the weights.
        lp = tl.load(lp_ptr + row, mask=written, other=float("nan"))
        inside = inside & (tl.abs(lp) < float("inf"))
        in_first = inside[:, None] & (channel < C1)[None, :]
        in_second = inside[:, None] & (channel < C2)[None, :]
        in_saved = inside[:, None] & (channel < CS)[None, :]
        in_written = written[:, None] & (channel < CS)[None, :]
        saved = row[:, None] * CS + channel[None, :]  # [BM, K]

        # lp = (-C/2 ln(2 pi) - 1/2 |z|^2 + log_det) / C, and |z| = |v| of the last layer
        d_lp = scale * tl.load(d_lp_ptr + row, mask=inside, other=0.0)  # [BM]
        d_det = d_lp / C + scale * tl.load(d_log_det_ptr + row, mask=inside, other=0.0)  # [BM]
        tl.store(partial_det_ptr + block, tl.sum(d_det, 0))
        offset = row[:, None] * C + channel[None, :]  # [BM, K]
        d1 = tl.load(v_ptr + offset, mask=in_first, other=0.0) * (-d_lp / C)[:, None]  # [BM, K]
        d2 = tl.load(v_ptr + offset + C1, mask=in_second, other=0.0) * (-d_lp / C)[:, None]
        if HAS_DZ:
            dz1 = scale * tl.load(d_z_ptr + offset, mask=in_first, other=0.0)
            dz2 = scale * tl.load(d_z_ptr + offset + C1, mask=in_second, other=0.0)
            dv1, dv2 = permute(dz1, dz2, layers - 1, permutation, 1, HARD, BM, K, BK, NS)
            d1 += dv1
            d2 += dv2

        for step in range(layers):
            layer = layers - 1 - step
            if step > 0:
                if BK:
                    tl.debug_barrier()
                    d1 = tl.load(state_ptr)
                    d2 = tl.load(state_ptr + K)
                    tl.debug_barrier()
                # out = W_perm v
                d1, d2 = permute(d1, d2, layer, permutation, 1, HARD, BM, K, BK, NS)
            sums_ptr = partial_ptr + (tl.cast(block, tl.int64) * layers + layer) * 6 * K + channel
            layer_affine_ptr = affine_ptr + layer * 6 * K + channel
            # v = g y + offset: sums over rows of dv y and of dv, first half
            x1 = tl.load(saved_x_ptr + layer * 2 * saved_layer + saved, mask=in_saved, other=0.0)
            tl.store(sums_ptr, tl.sum(d1 * x1.to(tl.float32), 0))
            tl.store(sums_ptr + 2 * K, tl.sum(d1, 0))
            d1 = d1 * tl.load(layer_affine_ptr)[None, :]
            if BK:
                # The barrier also keeps the compiler from loading the second half early: both would not fit.
                tl.store(state_ptr, d1)
                tl.debug_barrier()
            y2 = tl.load(saved_y2_ptr + layer * saved_layer + saved, mask=in_saved, other=0.0).to(tl.float32)
            tl.store(sums_ptr + K, tl.sum(d2 * y2, 0))
            tl.store(sums_ptr + 3 * K, tl.sum(d2, 0))
            d2 = d2 * tl.load(layer_affine_ptr + K)[None, :]
            # y2 = x2 exp(s) + 0.1 pre_t and log_det += sum(s); s = clamp tanh(0.1 inner_clamp pre_s)
            d_pre_t = 0.1 * d2
            tl.store(sums_ptr + 5 * K, tl.sum(d_pre_t, 0))
            dt = d_pre_t.to(dtype)
            d_pre_tile_ptr = d_pre_ptr + layer * 2 * saved_layer + saved
            tl.store(d_pre_tile_ptr + saved_layer, dt, mask=in_written)
            s = tl.load(saved_s_ptr + layer * saved_layer + saved, mask=in_saved, other=0.0)
            d2 = d2 * tl.exp(s)
            tanh = s / clamp
            x2 = tl.load(saved_x_ptr + (layer * 2 + 1) * saved_layer + saved, mask=in_saved, other=0.0).to(tl.float32)
            d_pre_s = (d2 * x2 + d_det[:, None]) * (0.1 * inner_clamp * clamp * (1 - tanh * tanh))
            # The padding of s reads as 0, where tanh has slope 1.
            d_pre_s = tl.where(in_second, d_pre_s, 0.0)
            tl.store(sums_ptr + 4 * K, tl.sum(d_pre_s, 0))
            ds = d_pre_s.to(dtype)
            tl.store(d_pre_tile_ptr, ds, mask=in_written)
            if BK:
                tl.store(state_ptr + K, d2)
                tl.debug_barrier()
                d1 = tl.zeros((BM, K), tl.float32)
                x1 = tl.load(saved_x_ptr + layer * 2 * saved_layer + saved, mask=in_saved, other=0.0)
            if COND == DENSE:
                p = load_condition(condition_ptr, source, inside, P, PP).to(dtype)  # [BM, PP]
            else:
                p = x1  # never used
            condition = (p, line, column, height, width)
            operands = (x1, ds, dt)
            d1 = subnet_input_gradient(d1, operands, layer, condition, subnet_ptrs, K, H, HP, PP, COND, BH, NS)
            if BK:
                tl.store(state_ptr, d1 + tl.load(state_ptr))
        if BK:
            tl.debug_barrier()
            d1 = tl.load(state_ptr)
            d2 = tl.load(state_ptr + K)
        if WANT_DX:
            tl.store(d_x_ptr + offset, d1 / scale, mask=written[:, None] & (channel < C1)[None, :])
            tl.store(d_x_ptr + offset + C1, d2 / scale, mask=written[:, None] & (channel < C2)[None, :])
        if BK:
            tl.debug_barrier()


class FlowGradients(NamedTuple):
    """Gradients of the weights of all layers, stacked, and of the features; float32."""

    w1: Tensor  # [L, H, C1 + P]
    b1: Tensor  # [L, H]
    w2: Tensor  # [L, 2 * C2, H]
    b2: Tensor  # [L, 2 * C2]
    global_scale: Tensor  # [L, C]
    global_offset: Tensor  # [L, C]
    x: Tensor | None  # [N, C]


class _Upstream(NamedTuple):
    """Results of the forward and their gradients, float32; `scale` is a power of two that multiplies them."""

    lp: Tensor  # [N]
    d_lp: Tensor  # [N]
    d_log_det: Tensor  # [N]
    d_z: Tensor | None  # [N, C]
    scale: Tensor  # [1]


def flow_backward(
    rows: Rows,
    weights: FlowWeights,
    saved: Saved,
    lp: Tensor,  # [N]
    d_lp: Tensor,  # [N] float32
    d_log_det: Tensor,  # [N] float32
    d_z: Tensor | None,  # [N, C] float32
    scale: Tensor,  # [1] float32, a power of two
    *,
    channels: int,
    hidden: int,
    condition_channels: int,
    clamp: float,
    scaled_tanh: bool,
    want_dx: bool = False,
    tiles: Mapping[str, int],
    weight_tiles: Mapping[str, int],
) -> FlowGradients:
    """Launch both kernels on N rows; the arguments are those of `flow_forward` and the gradients of its results."""
    constants = _constants(rows, weights, saved)
    with torch.cuda.device_of(lp):
        d_x, d_pre, partial, partial_det = _row_gradients(
            rows,
            weights,
            saved,
            _Upstream(lp, d_lp, d_log_det, d_z, scale),
            (clamp, 1 / clamp if scaled_tanh else 1.0),
            {**constants, "C": channels, "H": hidden, "WANT_DX": want_dx},
            tiles,
        )
        w1x, w1p, b1, w2 = _weight_gradients(rows, weights, lp, (saved.x, d_pre), constants, hidden, weight_tiles)
    found = flow_unpack(
        weights,
        scale,
        PackedGradients(w1x, w1p, b1, w2, partial, partial_det),
        channels=channels,
        hidden=hidden,
        condition_channels=condition_channels,
        kind=constants["COND"],
    )
    return FlowGradients._make([*found, d_x])


def _constants(rows: Rows, weights: FlowWeights, saved: Saved) -> dict[str, Any]:
    """Return the constants that both kernels take."""
    kind = condition_kind(rows, weights, raster=False)
    p, pp = 0, 32
    if kind == DENSE:
        assert rows.condition is not None
        p, pp = rows.condition.shape[1], weights.w1p.shape[2]
    elif kind == TABLES:
        pp = 2 * weights.codes.shape[1]
    return {
        "K": weights.b2.shape[2],
        "HP": weights.bias.shape[1],
        "P": p,
        "PP": pp,
        "COND": kind,
        "HAS_INDEX": rows.index is not None,
        "GATHER": rows.gather,
        "CS": saved.s.shape[2],
    }


def _row_gradients(
    rows: Rows,
    weights: FlowWeights,
    saved: Saved,
    upstream: _Upstream,
    clamps: tuple[float, float],
    constants: Mapping[str, Any],
    tiles: Mapping[str, int],
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Launch the kernel along the rows; return d_x if wanted, d_pre [L, 2, N, CS] and the sums of each tile of rows."""
    count, layers, k, device = rows.count, weights.b2.shape[0], constants["K"], upstream.lp.device
    operand = weights.w1x.dtype
    blocks = triton.cdiv(count, tiles["BM"])
    d_x = torch.empty(count, constants["C"], device=device) if constants["WANT_DX"] else None
    d_pre = torch.empty(layers, 2, count, constants["CS"], dtype=operand, device=device)
    partial, partial_det = torch.empty(blocks, layers, 6, k, device=device), torch.empty(blocks, device=device)
    nothing = torch.empty(0, device=device)
    if count:
        programs, stage, state = staging(blocks, k, tiles, operand, device)
        flow_backward_kernel[(programs,)](
            rows.index if rows.index is not None else nothing,
            rows.condition if rows.condition is not None else nothing,
            weights.w1x,
            weights.w1p,
            weights.bias,
            weights.tables,
            weights.w2,
            weights.affine,
            weights.w_perm,
            weights.perm_index,
            stage,
            state,
            upstream.lp,
            *saved,
            upstream.d_lp,
            upstream.d_log_det,
            upstream.d_z if upstream.d_z is not None else nothing,
            upstream.scale,
            d_x if d_x is not None else nothing,
            d_pre,
            partial,
            partial_det,
            count,
            len(rows.features),
            rows.height,
            rows.width,
            blocks,
            layers,
            *clamps,
            **constants,
            HARD=bool(weights.perm_index.numel()),
            HAS_DZ=upstream.d_z is not None,
            BM=tiles["BM"],
            BH=tiles["BH"],
            BK=tiles["BK"],
            NS=tiles["num_stages"],
            num_warps=tiles["num_warps"],
            num_stages=tiles["num_stages"],
        )
    return d_x, d_pre, partial, partial_det


def _weight_gradients(
    rows: Rows,
    weights: FlowWeights,
    lp: Tensor,
    saved: tuple[Tensor, Tensor],  # x and d_pre, [L, 2, N, CS] operand each
    constants: Mapping[str, Any],
    hidden: int,
    tiles: Mapping[str, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel over the weights; return gradients of w1x, w1p, b1 and w2 for each part of the rows."""
    layers, padded, k, device = weights.b2.shape[0], constants["HP"], constants["K"], lp.device
    blocks, unit_blocks = triton.cdiv(rows.count, tiles["BM"]), triton.cdiv(hidden, tiles["BH"])
    splits = row_splits(unit_blocks * layers, blocks, device)
    d_w1x = torch.empty(splits, layers, padded, k, device=device)
    d_w1p = torch.empty(splits, layers, padded, constants["PP"], device=device)
    d_b1 = torch.empty(splits, layers, padded, device=device)
    d_w2 = torch.empty(splits, layers, 2, padded, k, device=device)
    nothing = torch.empty(0, device=device)
    flow_weight_gradient_kernel[(unit_blocks, layers, splits)](
        rows.index if rows.index is not None else nothing,
        rows.condition if rows.condition is not None else nothing,
        weights.codes,
        weights.w1x,
        weights.w1p,
        weights.bias,
        weights.tables,
        weights.w2,
        lp,
        *saved,
        d_w1x,
        d_w1p,
        d_b1,
        d_w2,
        rows.count,
        len(rows.features),
        rows.height,
        rows.width,
        blocks,
        layers,
        splits,
        **constants,
        BM=tiles["BM"],
        BH=tiles["BH"],
        NS=tiles["num_stages"],
        num_warps=tiles["num_warps"],
        num_stages=tiles["num_stages"],
    )
    return d_w1x, d_w1p, d_b1, d_w2
