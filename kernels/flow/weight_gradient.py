"""Gradients of the subnet's weights, summed over the rows in a fixed order.

    d_hidden = W2^T d_pre where the hidden unit is active
    dW1 = sum(d_hidden [x1; p]),  db1 = sum(d_hidden),  dW2 = sum(relu(hidden) d_pre)

A program takes a block of hidden units of one layer and one part of the rows. It computes the units' activations
again, which is cheaper than saving them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .condition import DENSE, NONE, TABLES, add_condition, locate_rows


@triton.jit
def load_condition_halves(
    condition_ptr,  # [R, P] any float
    source,  # [BM] int64
    inside,  # [BM] bool
    P: tl.constexpr,
    HALF: tl.constexpr,
):
    """Return both halves of the dense condition of each row, [BM, HALF] each."""
    entry = tl.arange(0, HALF)
    p_tile_ptr = condition_ptr + source[:, None] * P + entry[None, :]
    first = tl.load(p_tile_ptr, mask=inside[:, None] & (entry < P)[None, :], other=0.0)
    second = tl.load(p_tile_ptr + HALF, mask=inside[:, None] & (entry + HALF < P)[None, :], other=0.0)
    return first, second


@triton.jit
def store_subnet_gradients(
    out_ptrs,  # d_w1x_ptr [splits, L, HP, K], d_b1_ptr [splits, L, HP], d_w2_ptr [splits, L, 2, HP, K], float32 each
    gradients,  # d_w1x [BH, K], d_b1 [BH], d_w2_s [BH, K], d_w2_t [BH, K], float32 each
    part,  # int, of splits and layers
    unit,  # [BH] int
    K: tl.constexpr,
    HP: tl.constexpr,
):
    """Store the gradients of a block of hidden units but for those of the condition's weights."""
    d_w1x_ptr, d_b1_ptr, d_w2_ptr = out_ptrs
    d_w1x, d_b1, d_w2_s, d_w2_t = gradients
    channel = tl.arange(0, K)
    tl.store(d_b1_ptr + part * HP + unit, d_b1)
    w1x_row = (part * HP + unit)[:, None]
    tl.store(d_w1x_ptr + w1x_row * K + channel[None, :], d_w1x)
    w2_row = (part * 2 * HP + unit)[:, None]
    tl.store(d_w2_ptr + w2_row * K + channel[None, :], d_w2_s)
    tl.store(d_w2_ptr + (w2_row + HP) * K + channel[None, :], d_w2_t)


@triton.jit(do_not_specialize=["rows", "sources", "blocks", "layers", "splits"])
def flow_weight_gradient_kernel(
    index_ptr,  # [N] int64; read if HAS_INDEX
    condition_ptr,  # [R, P] any float; read if DENSE
    codes_ptr,  # [height + width, PP / 2] operand; read if TABLES
    w1x_ptr,  # [L, HP, K] operand
    w1p_ptr,  # [L, HP, PP] operand; read if DENSE
    bias_ptr,  # [L, HP] float32; read if DENSE or NONE
    table_ptr,  # [L, height + width, HP] operand; read if TABLES
    w2_ptr,  # [L, 2, K, HP] operand
    lp_ptr,  # [N] float32
    saved_x_ptr,  # [L, 2, N, CS] operand
    d_pre_ptr,  # [L, 2, N, CS] operand
    d_w1x_ptr,  # [splits, L, HP, K] float32
    d_w1p_ptr,  # [splits, L, HP, PP] float32; written unless NONE
    d_b1_ptr,  # [splits, L, HP] float32
    d_w2_ptr,  # [splits, L, 2, HP, K] float32
    rows,  # int32, N
    sources,  # int32, R
    height,  # int32, of a map
    width,  # int32, of a map
    blocks,  # int32, tiles of rows
    layers,  # int32, L
    splits,  # int32, parts of the rows
    K: tl.constexpr,
    HP: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    COND: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    GATHER: tl.constexpr,
    CS: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    NS: tl.constexpr,
):
    dtype = w1x_ptr.dtype.element_ty
    HALF: tl.constexpr = PP // 2
    HAS_CONDITION: tl.constexpr = COND != NONE
    unit = tl.program_id(0) * BH + tl.arange(0, BH)
    layer = tl.program_id(1)
    split = tl.program_id(2)
    channel = tl.arange(0, K)
    entry = tl.arange(0, HALF)
    saved_layer = tl.cast(rows, tl.int64) * CS

    w1x = tl.load(w1x_ptr + layer * HP * K + unit[None, :] * K + channel[:, None])  # [K, BH]
    w2_tile_ptr = w2_ptr + layer * 2 * K * HP + channel[:, None] * HP + unit[None, :]  # [K, BH]
    w2_s, w2_t = tl.load(w2_tile_ptr), tl.load(w2_tile_ptr + K * HP)
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
        source, line, column, inside = locate_rows(
            index_ptr, row, row < rows, sources, width, height * width, HAS_INDEX, GATHER
        )
        lp = tl.load(lp_ptr + row, mask=row < rows, other=float("nan"))
        inside = inside & (tl.abs(lp) < float("inf"))
        in_saved = inside[:, None] & (channel < CS)[None, :]
        saved = row[:, None] * CS + channel[None, :]
        x1 = tl.load(saved_x_ptr + layer * 2 * saved_layer + saved, mask=in_saved, other=0.0)  # [BM, K]
        ds = tl.load(d_pre_ptr + layer * 2 * saved_layer + saved, mask=in_saved, other=0.0)
        dt = tl.load(d_pre_ptr + (layer * 2 + 1) * saved_layer + saved, mask=in_saved, other=0.0)

        hidden = tl.dot(x1, w1x, input_precision="tf32x3")  # [BM, BH]
        if COND == DENSE:
            first, second = load_condition_halves(condition_ptr, source, inside, P, HALF)
            first, second = first.to(dtype), second.to(dtype)  # [BM, HALF] each
            w1p_tile_ptr = w1p_ptr + layer * HP * PP + unit[None, :] * PP + entry[:, None]  # [HALF, BH]
            hidden = tl.dot(first, tl.load(w1p_tile_ptr), hidden, input_precision="tf32x3")
            hidden = tl.dot(second, tl.load(w1p_tile_ptr + HALF), hidden, input_precision="tf32x3")
            hidden += tl.load(bias_ptr + layer * HP + unit)[None, :]
        else:
            condition = (x1, line, column, height, width)
            hidden = add_condition(hidden, layer, unit, condition, (w1p_ptr, bias_ptr, table_ptr), HP, PP, COND)
            if COND == TABLES:
                # The code of a position is that of its column followed by that of its line.
                first = tl.load(codes_ptr + (height + column)[:, None] * HALF + entry[None, :])
                second = tl.load(codes_ptr + line[:, None] * HALF + entry[None, :])
        d_hidden = tl.dot(ds, w2_s, input_precision="tf32x3")  # [BM, BH]
        d_hidden = tl.dot(dt, w2_t, d_hidden, input_precision="tf32x3")
        d_hidden = tl.where(hidden > 0, d_hidden, 0.0)
        d_b1 += tl.sum(d_hidden, 0)
        hidden = tl.trans(tl.maximum(hidden, 0.0).to(dtype))  # [BH, BM]
        d_hidden = tl.trans(d_hidden.to(dtype))  # [BH, BM]
        d_w2_s = tl.dot(hidden, ds, d_w2_s, input_precision="tf32x3")
        d_w2_t = tl.dot(hidden, dt, d_w2_t, input_precision="tf32x3")
        d_w1x = tl.dot(d_hidden, x1, d_w1x, input_precision="tf32x3")
        if HAS_CONDITION:
            d_first = tl.dot(d_hidden, first, d_first, input_precision="tf32x3")
            d_second = tl.dot(d_hidden, second, d_second, input_precision="tf32x3")

    part = split * layers + layer
    gradients = (d_w1x, d_b1, d_w2_s, d_w2_t)
    store_subnet_gradients((d_w1x_ptr, d_b1_ptr, d_w2_ptr), gradients, part, unit, K, HP)
    if HAS_CONDITION:
        unit_row = (part * HP + unit)[:, None]
        tl.store(d_w1p_ptr + unit_row * PP + entry[None, :], d_first)
        tl.store(d_w1p_ptr + unit_row * PP + HALF + entry[None, :], d_second)


def row_splits(programs: int, blocks: int, device: torch.device) -> int:
    """Return into how many parts the rows are cut, each summed by programs of its own.

    It is the smallest number that comes close to the shortest time, rounds of programs times tiles of rows in each; a
    program fills a multiprocessor. It depends on the GPU and on the number of rows alone, and so do the bits of the
    sum.
    """
    if device.type != "cuda":
        return min(2, max(blocks, 1))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    times = {
        splits: triton.cdiv(programs * splits, processors) * triton.cdiv(blocks, splits)
        for splits in range(1, max(1, min(blocks, 8)) + 1)
    }
    return next(splits for splits, time in times.items() if time <= 1.1 * min(times.values()))
