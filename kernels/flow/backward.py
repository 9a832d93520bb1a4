"""Gradients of the flow from what the forward saved: one launch along the rows, one over the weights.

`flow_backward_kernel` carries the gradient of a tile of rows back through all layers and writes the gradient of the
subnet's output, a few numbers per row and layer. `flow_weight_gradient_kernel` then gives each program a block of
hidden units of one layer; it makes their activations again, which is cheaper than storing them, and sums over rows in
a fixed order. There are no atomics: the same input gives the same bits.

All gradients inside are multiplied by SCALE, a power of two that keeps them inside the range of float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .forward import Rows, Saved, condition_kind
from .pack import flow_unpack
from .shared import (
    DENSE,
    NONE,
    TABLES,
    hidden_bias,
    permute_hard,
    permute_soft,
    place_rows,
    staging,
)
from .weights import FlowWeights


@triton.jit(do_not_specialize=["rows", "sources", "blocks", "layers", "clamp", "inner_clamp"])
def flow_backward_kernel(
    INDEX, CONDITION, W1X, W1P, BIAS, TABLE, W2, AFFINE, PERM, PERM_INDEX, STAGE, STATE,
    LP, V, SAVED_X, SAVED_Y2, SAVED_S, D_LP, D_LOG_DET, D_Z, SCALE,
    D_X, D_PRE, PARTIAL, PARTIAL_DET,
    rows, sources, height, width, blocks, layers, clamp, inner_clamp,
    C: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    COND: tl.constexpr, HAS_INDEX: tl.constexpr, GATHER: tl.constexpr, HARD: tl.constexpr, SPLIT: tl.constexpr,
    HAS_DZ: tl.constexpr, WANT_DX: tl.constexpr, CS: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, NS: tl.constexpr,
):  # fmt: skip
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    dtype = W1X.dtype.element_ty
    channel = tl.arange(0, K)
    scale = tl.load(SCALE)
    saved_layer = tl.cast(rows, tl.int64) * CS
    if BK:
        parts: tl.constexpr = 1 + SPLIT
        STAGE += tl.program_id(0).to(tl.int64) * (BM * 2 * K * parts)
        state = STATE + tl.program_id(0).to(tl.int64) * (BM * 2 * K)
        state += tl.arange(0, BM)[:, None] * (2 * K) + channel[None, :]

    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * BM + tl.arange(0, BM)
        written = row < rows
        source, line, column, inside = place_rows(
            INDEX, row, written, sources, width, height * width, HAS_INDEX, GATHER
        )
        # A row that the forward gave up has no gradient, and its NaN must not reach those of the weights.
        lp = tl.load(LP + row, mask=written, other=float("nan"))
        inside = inside & (tl.abs(lp) < float("inf"))
        in_first = inside[:, None] & (channel < C1)[None, :]
        in_second = inside[:, None] & (channel < C2)[None, :]
        in_saved = inside[:, None] & (channel < CS)[None, :]
        in_written = written[:, None] & (channel < CS)[None, :]
        saved = row[:, None] * CS + channel[None, :]

        # lp = (-C/2 ln(2 pi) - 1/2 |z|^2 + log_det) / C, and |z| = |v| of the last layer
        d_lp = scale * tl.load(D_LP + row, mask=inside, other=0.0)
        d_det = d_lp / C + scale * tl.load(D_LOG_DET + row, mask=inside, other=0.0)
        tl.store(PARTIAL_DET + block, tl.sum(d_det, 0))
        at = row[:, None] * C + channel[None, :]
        d1 = tl.load(V + at, mask=in_first, other=0.0) * (-d_lp / C)[:, None]
        d2 = tl.load(V + at + C1, mask=in_second, other=0.0) * (-d_lp / C)[:, None]
        if HAS_DZ:
            dz1 = scale * tl.load(D_Z + at, mask=in_first, other=0.0)
            dz2 = scale * tl.load(D_Z + at + C1, mask=in_second, other=0.0)
            if HARD:
                back1, back2 = permute_hard(dz1, dz2, PERM_INDEX + ((layers - 1) * 4 + 2) * K, BM, K)
            else:
                perm = PERM + ((layers - 1) * 2 + 1) * (4 + 4 * SPLIT) * K * K
                back1, back2 = permute_soft(dz1, dz2, perm, STAGE, BM, K, BK, NS, SPLIT, False)
            d1 += back1
            d2 += back2

        for step in range(layers):
            layer = layers - 1 - step
            if step > 0:
                if BK:
                    tl.debug_barrier()
                    d1 = tl.load(state)
                    d2 = tl.load(state + K)
                    tl.debug_barrier()
                # out = W_perm v
                if HARD:
                    d1, d2 = permute_hard(d1, d2, PERM_INDEX + (layer * 4 + 2) * K, BM, K)
                else:
                    perm = PERM + (layer * 2 + 1) * (4 + 4 * SPLIT) * K * K
                    d1, d2 = permute_soft(d1, d2, perm, STAGE, BM, K, BK, NS, SPLIT, False)
            partial = PARTIAL + (tl.cast(block, tl.int64) * layers + layer) * 6 * K + channel
            affine = AFFINE + layer * 6 * K + channel
            # v = g y + offset: sums over rows of dv y and of dv, first half
            x1 = tl.load(SAVED_X + layer * 2 * saved_layer + saved, mask=in_saved, other=0.0)
            tl.store(partial, tl.sum(d1 * x1.to(tl.float32), 0))
            tl.store(partial + 2 * K, tl.sum(d1, 0))
            d1 = d1 * tl.load(affine)[None, :]
            if BK:
                # The barrier also keeps the loads of the second half from being brought forward: both would not fit.
                tl.store(state, d1)
                tl.debug_barrier()
            y2 = tl.load(SAVED_Y2 + layer * saved_layer + saved, mask=in_saved, other=0.0).to(tl.float32)
            tl.store(partial + K, tl.sum(d2 * y2, 0))
            tl.store(partial + 3 * K, tl.sum(d2, 0))
            d2 = d2 * tl.load(affine + K)[None, :]
            # y2 = x2 exp(s) + 0.1 pre_t and log_det += sum(s); s = clamp tanh(0.1 inner_clamp pre_s)
            d_pre_t = 0.1 * d2
            tl.store(partial + 5 * K, tl.sum(d_pre_t, 0))
            dt = d_pre_t.to(dtype)
            d_pre = D_PRE + layer * 2 * saved_layer + saved
            tl.store(d_pre + saved_layer, dt, mask=in_written)
            s = tl.load(SAVED_S + layer * saved_layer + saved, mask=in_saved, other=0.0)
            d2 = d2 * tl.exp(s)
            th = s / clamp
            x2 = tl.load(SAVED_X + (layer * 2 + 1) * saved_layer + saved, mask=in_saved, other=0.0).to(tl.float32)
            d_pre_s = (d2 * x2 + d_det[:, None]) * (0.1 * inner_clamp * clamp * (1 - th * th))
            # The padding of s reads as 0, where tanh has slope 1.
            d_pre_s = tl.where(in_second, d_pre_s, 0.0)
            tl.store(partial + 4 * K, tl.sum(d_pre_s, 0))
            ds = d_pre_s.to(dtype)
            tl.store(d_pre, ds, mask=in_written)
            if BK:
                tl.store(state + K, d2)
                tl.debug_barrier()
                d1 = tl.zeros((BM, K), tl.float32)
                x1 = tl.load(SAVED_X + layer * 2 * saved_layer + saved, mask=in_saved, other=0.0)
            if COND == DENSE:
                entry = tl.arange(0, PP)
                p = tl.load(
                    CONDITION + source[:, None] * P + entry[None, :],
                    mask=inside[:, None] & (entry < P)[None, :], other=0.0,
                ).to(dtype)  # fmt: skip
            else:
                p = x1
            # dx1 = dy1 + W1x^T (W2^T d_pre where the hidden unit is active)
            for first in tl.range(0, H, BH, num_stages=NS):
                unit = first + tl.arange(0, BH)
                w1 = tl.load(W1X + layer * HP * K + unit[None, :] * K + channel[:, None])  # [K, BH]
                hidden = tl.dot(x1, w1, input_precision="tf32x3")
                hidden = hidden_bias(
                    hidden, p, W1P, BIAS, TABLE, layer, line, column, height, width, unit, HP, PP, COND
                )
                w2 = W2 + layer * 2 * K * HP + channel[:, None] * HP + unit[None, :]  # [K, BH]
                d_hidden = tl.dot(ds, tl.load(w2), input_precision="tf32x3")
                d_hidden = tl.dot(dt, tl.load(w2 + K * HP), d_hidden, input_precision="tf32x3")
                d_hidden = tl.where(hidden > 0, d_hidden, 0.0).to(dtype)
                w1_rows = tl.load(W1X + layer * HP * K + unit[:, None] * K + channel[None, :])  # [BH, K]
                d1 = tl.dot(d_hidden, w1_rows, d1, input_precision="tf32x3")
            if BK:
                tl.store(state, d1 + tl.load(state))
        if BK:
            tl.debug_barrier()
            d1 = tl.load(state)
            d2 = tl.load(state + K)
        if WANT_DX:
            tl.store(D_X + at, d1 / scale, mask=written[:, None] & (channel < C1)[None, :])
            tl.store(D_X + at + C1, d2 / scale, mask=written[:, None] & (channel < C2)[None, :])
        if BK:
            tl.debug_barrier()


@triton.jit(do_not_specialize=["rows", "sources", "blocks", "layers", "splits"])
def flow_weight_gradient_kernel(
    INDEX, CONDITION, CODES, W1X, W1P, BIAS, TABLE, W2, LP, SAVED_X, D_PRE,
    D_W1X, D_W1P, D_B1, D_W2,
    rows, sources, height, width, blocks, layers, splits,
    K: tl.constexpr, HP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    COND: tl.constexpr, HAS_INDEX: tl.constexpr, GATHER: tl.constexpr, CS: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, NS: tl.constexpr,
):  # fmt: skip
    dtype = W1X.dtype.element_ty
    HALF: tl.constexpr = PP // 2
    HAS_CONDITION: tl.constexpr = COND != NONE
    unit = tl.program_id(0) * BH + tl.arange(0, BH)
    layer = tl.program_id(1)
    split = tl.program_id(2)
    channel = tl.arange(0, K)
    entry = tl.arange(0, HALF)
    saved_layer = tl.cast(rows, tl.int64) * CS

    w1 = tl.load(W1X + layer * HP * K + unit[None, :] * K + channel[:, None])  # [K, BH]
    w2 = W2 + layer * 2 * K * HP + channel[:, None] * HP + unit[None, :]  # [K, BH]
    w2_s, w2_t = tl.load(w2), tl.load(w2 + K * HP)
    d_w1x = tl.zeros((BH, K), tl.float32)
    d_w2_s = tl.zeros((BH, K), tl.float32)
    d_w2_t = tl.zeros((BH, K), tl.float32)
    d_b1 = tl.zeros((BH,), tl.float32)
    if HAS_CONDITION:
        d_first = tl.zeros((BH, HALF), tl.float32)
        d_second = tl.zeros((BH, HALF), tl.float32)

    per_split = tl.cdiv(blocks, splits)
    last = tl.minimum(blocks, (split + 1) * per_split)
    for block in tl.range(split * per_split, last, num_stages=NS):
        row = tl.cast(block, tl.int64) * BM + tl.arange(0, BM)
        source, line, column, inside = place_rows(
            INDEX, row, row < rows, sources, width, height * width, HAS_INDEX, GATHER
        )
        lp = tl.load(LP + row, mask=row < rows, other=float("nan"))
        inside = inside & (tl.abs(lp) < float("inf"))
        in_saved = inside[:, None] & (channel < CS)[None, :]
        saved = row[:, None] * CS + channel[None, :]
        x1 = tl.load(SAVED_X + layer * 2 * saved_layer + saved, mask=in_saved, other=0.0)
        ds = tl.load(D_PRE + layer * 2 * saved_layer + saved, mask=in_saved, other=0.0)
        dt = tl.load(D_PRE + (layer * 2 + 1) * saved_layer + saved, mask=in_saved, other=0.0)

        hidden = tl.dot(x1, w1, input_precision="tf32x3")  # [BM, BH]
        if COND == DENSE:
            at = CONDITION + source[:, None] * P + entry[None, :]
            first = tl.load(at, mask=inside[:, None] & (entry < P)[None, :], other=0.0).to(dtype)
            second = tl.load(at + HALF, mask=inside[:, None] & (entry + HALF < P)[None, :], other=0.0).to(dtype)
            w1p = W1P + layer * HP * PP + unit[None, :] * PP + entry[:, None]
            hidden = tl.dot(first, tl.load(w1p), hidden, input_precision="tf32x3")
            hidden = tl.dot(second, tl.load(w1p + HALF), hidden, input_precision="tf32x3")
            hidden += tl.load(BIAS + layer * HP + unit)[None, :]
        else:
            hidden = hidden_bias(hidden, x1, W1P, BIAS, TABLE, layer, line, column, height, width, unit, HP, PP, COND)
            if COND == TABLES:
                # The code of a place is that of its column followed by that of its line.
                first = tl.load(CODES + (height + column)[:, None] * HALF + entry[None, :])
                second = tl.load(CODES + line[:, None] * HALF + entry[None, :])
        d_hidden = tl.dot(ds, w2_s, input_precision="tf32x3")
        d_hidden = tl.dot(dt, w2_t, d_hidden, input_precision="tf32x3")
        d_hidden = tl.where(hidden > 0, d_hidden, 0.0)
        d_b1 += tl.sum(d_hidden, 0)
        hidden = tl.trans(tl.maximum(hidden, 0.0).to(dtype))  # [BH, BM]
        d_hidden = tl.trans(d_hidden.to(dtype))
        d_w2_s = tl.dot(hidden, ds, d_w2_s, input_precision="tf32x3")
        d_w2_t = tl.dot(hidden, dt, d_w2_t, input_precision="tf32x3")
        d_w1x = tl.dot(d_hidden, x1, d_w1x, input_precision="tf32x3")
        if HAS_CONDITION:
            d_first = tl.dot(d_hidden, first, d_first, input_precision="tf32x3")
            d_second = tl.dot(d_hidden, second, d_second, input_precision="tf32x3")

    part = split * layers + layer
    tl.store(D_B1 + part * HP + unit, d_b1)
    at = (part * HP + unit)[:, None]
    tl.store(D_W1X + at * K + channel[None, :], d_w1x)
    at = (part * 2 * HP + unit)[:, None]
    tl.store(D_W2 + at * K + channel[None, :], d_w2_s)
    tl.store(D_W2 + (at + HP) * K + channel[None, :], d_w2_t)
    if HAS_CONDITION:
        at = (part * HP + unit)[:, None]
        tl.store(D_W1P + at * PP + entry[None, :], d_first)
        tl.store(D_W1P + at * PP + HALF + entry[None, :], d_second)


class FlowGradients(NamedTuple):
    """Gradients of the weights of all layers, stacked, and of the features; float32."""

    w1: Tensor  # [L, H, C1 + P]
    b1: Tensor  # [L, H]
    w2: Tensor  # [L, 2 * C2, H]
    b2: Tensor  # [L, 2 * C2]
    global_scale: Tensor  # [L, C]
    global_offset: Tensor  # [L, C]
    x: Tensor | None  # [N, C]


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
    """Launches both kernels on N rows; the arguments are those of `flow_forward` and the gradients of its results."""
    count, layers, k = rows.count, weights.b2.shape[0], weights.b2.shape[2]
    padded, stride = weights.bias.shape[1], saved.s.shape[2]
    operand, device = weights.w1x.dtype, lp.device
    kind = condition_kind(rows, weights, raster=False)
    p, pp = 0, 32
    if kind == DENSE:
        assert rows.condition is not None
        p, pp = rows.condition.shape[1], weights.w1p.shape[2]
    elif kind == TABLES:
        pp = 2 * weights.codes.shape[1]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    nothing = empty(0)
    index = rows.index if rows.index is not None else nothing
    condition = rows.condition if rows.condition is not None else nothing
    blocks = triton.cdiv(count, tiles["BM"])
    d_x = empty(count, channels) if want_dx else None
    d_pre = empty(layers, 2, count, stride, dtype=operand)
    partial, partial_det = empty(blocks, layers, 6, k), empty(blocks)
    shared = {
        "K": k, "HP": padded, "P": p, "PP": pp, "COND": kind, "HAS_INDEX": rows.index is not None,
        "GATHER": rows.gather, "CS": stride,
    }  # fmt: skip
    with torch.cuda.device_of(lp):
        if count:
            programs, stage, state = staging(blocks, k, tiles, operand, device)
            flow_backward_kernel[(programs,)](
                index, condition, weights.w1x, weights.w1p, weights.bias, weights.tables, weights.w2, weights.affine,
                weights.w_perm, weights.perm_index, stage, state,
                lp, *saved, d_lp, d_log_det, d_z if d_z is not None else nothing, scale,
                d_x if d_x is not None else nothing, d_pre, partial, partial_det,
                count, len(rows.features), rows.height, rows.width, blocks, layers, clamp,
                1 / clamp if scaled_tanh else 1.0,
                C=channels, H=hidden, HARD=bool(weights.perm_index.numel()), SPLIT=operand == torch.float16,
                HAS_DZ=d_z is not None, WANT_DX=want_dx, **shared,
                BM=tiles["BM"], BH=tiles["BH"], BK=tiles["BK"], NS=tiles["num_stages"],
                num_warps=tiles["num_warps"], num_stages=tiles["num_stages"],
            )  # fmt: skip

        blocks, unit_blocks = triton.cdiv(count, weight_tiles["BM"]), triton.cdiv(hidden, weight_tiles["BH"])
        splits = row_splits(unit_blocks * layers, blocks, device)
        d_w1x, d_w2 = empty(splits, layers, padded, k), empty(splits, layers, 2, padded, k)
        d_w1p, d_b1 = empty(splits, layers, padded, pp), empty(splits, layers, padded)
        flow_weight_gradient_kernel[(unit_blocks, layers, splits)](
            index, condition, weights.codes, weights.w1x, weights.w1p, weights.bias, weights.tables, weights.w2,
            lp, saved.x, d_pre, d_w1x, d_w1p, d_b1, d_w2,
            count, len(rows.features), rows.height, rows.width, blocks, layers, splits, **shared,
            BM=weight_tiles["BM"], BH=weight_tiles["BH"], NS=weight_tiles["num_stages"],
            num_warps=weight_tiles["num_warps"], num_stages=weight_tiles["num_stages"],
        )  # fmt: skip

    found = flow_unpack(
        weights, scale, d_w1x, d_w1p, d_b1, d_w2, partial, partial_det, channels=channels, hidden=hidden,
        condition_channels=condition_channels, kind=kind,
    )  # fmt: skip
    w1, b1, w2, b2, global_scale, global_offset = found
    return FlowGradients(w1, b1, w2, b2, global_scale, global_offset, d_x)


def row_splits(programs: int, blocks: int, device: torch.device) -> int:
    """Into how many parts the rows are cut, each summed by programs of its own.

    The fewest that come close to the shortest time, rounds of programs times blocks of rows in each; a program fills a
    multiprocessor. It depends on the GPU and on the number of rows alone, and so do the bits of the sum.
    """
    if device.type != "cuda":
        return min(2, max(blocks, 1))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    times = {
        splits: triton.cdiv(programs * splits, processors) * triton.cdiv(blocks, splits)
        for splits in range(1, max(1, min(blocks, 8)) + 1)
    }
    return next(splits for splits, time in times.items() if time <= 1.1 * min(times.values()))
