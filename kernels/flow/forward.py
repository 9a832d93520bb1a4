"""The whole flow in one launch: a tile of rows goes through all coupling layers without leaving the chip.

    a = 0.1 (W2 relu(W1 [x1; p] + b1) + b2)
    y = [x1, x2 exp(s) + a_t],  s = clamp tanh(a_s) or clamp tanh(a_s / clamp)
    out = W_perm (g y + offset),  log_det += sum(s) + sum(log g)
    lp = (-C/2 ln(2 pi) - 1/2 |z|^2 + log_det) / C

with z the output of the last layer (fastbgad/reference/flow.py and log_likelihood.py; Yao et al., CVPR 2023; FrEIA's
AllInOneBlock). The two halves of a row are two tiles [BM, K].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .condition import DENSE, RASTER, add_condition, load_condition, locate_rows, raster_rows, raster_tables
from .permutation import permute
from .rows import Rows, condition_kind, is_raster, raster_tile, tile_key
from .staging import program_memory, staging
from .weights import MOST_CHANNELS, FlowWeights, saved_stride

__all__ = ["ForwardResult", "Rows", "Saved", "flow_forward", "is_raster", "tile_key"]

LOG_2PI = tl.constexpr(math.log(2 * math.pi))


@triton.jit
def tanh(a):
    """Return tanh(a) through one exponential: 1 - 2 / (e^(2a) + 1); exact at both ends, NaN stays NaN."""
    return 1 - 2 / (tl.exp(2 * a) + 1)


@triton.jit
def load_halves(
    row_ptr,  # [BM, K] pointers to any float, into rows of C channels
    inside,  # [BM] bool
    channel,  # [K] int
    C1: tl.constexpr,
    C2: tl.constexpr,
):
    """Return both halves of rows, padded with zeros, [BM, K] float32 each."""
    x1 = tl.load(row_ptr, mask=inside[:, None] & (channel < C1)[None, :], other=0.0).to(tl.float32)
    x2 = tl.load(row_ptr + C1, mask=inside[:, None] & (channel < C2)[None, :], other=0.0).to(tl.float32)
    return x1, x2


@triton.jit
def all_within(
    x,  # [BM, K] float32
    largest,  # float32
    K: tl.constexpr,
):
    """Return which rows hold only numbers up to +-largest, [BM] bool; NaN is not one."""
    return tl.sum((tl.abs(x) <= largest).to(tl.int32), 1) == K


@triton.jit
def subnet(
    x1,  # [BM, K] operand
    layer,  # int
    condition,  # see `add_condition`
    weight_ptrs,  # w1x_ptr, w1p_ptr, bias_ptr, table_ptr, w2_ptr, b2_ptr
    K: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    PP: tl.constexpr,
    COND: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    NS: tl.constexpr,
):
    """Return both halves of pre = W2 relu(W1 [x1; p] + b1) + b2, [BM, K] float32 each."""
    w1x_ptr, w1p_ptr, bias_ptr, table_ptr, w2_ptr, b2_ptr = weight_ptrs
    dtype = w1x_ptr.dtype.element_ty
    channel = tl.arange(0, K)
    pre_s = tl.zeros((BM, K), tl.float32) + tl.load(b2_ptr + layer * 2 * K + channel)[None, :]
    pre_t = tl.zeros((BM, K), tl.float32) + tl.load(b2_ptr + (layer * 2 + 1) * K + channel)[None, :]
    for first in tl.range(0, H, BH, num_stages=NS):
        unit = first + tl.arange(0, BH)
        w1x = tl.load(w1x_ptr + layer * HP * K + unit[None, :] * K + channel[:, None])  # [K, BH]
        hidden = tl.dot(x1, w1x, input_precision="tf32x3")  # [BM, BH]
        hidden = add_condition(hidden, layer, unit, condition, (w1p_ptr, bias_ptr, table_ptr), HP, PP, COND)
        hidden = tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL).to(dtype)
        w2_tile_ptr = w2_ptr + layer * 2 * K * HP + channel[None, :] * HP + unit[:, None]  # [BH, K]
        pre_s = tl.dot(hidden, tl.load(w2_tile_ptr), pre_s, input_precision="tf32x3")
        pre_t = tl.dot(hidden, tl.load(w2_tile_ptr + K * HP), pre_t, input_precision="tf32x3")
    return pre_s, pre_t


@triton.jit(do_not_specialize=["rows", "sources", "tiles", "layers", "clamp", "inner_clamp"])
def flow_forward_kernel(
    x_ptr,  # [R, C] any float, rows row_stride apart
    index_ptr,  # [N] int64; read if HAS_INDEX
    condition_ptr,  # [R, P] any float; read if DENSE
    w1x_ptr,  # [L, HP, K] operand, as all weights laid out by `weights.py`
    w1p_ptr,  # [L, HP, PP] operand; read if DENSE
    bias_ptr,  # [L, HP] float32; read if DENSE or NONE
    table_ptr,  # [L, height + width, HP] operand; read if RASTER or TABLES
    w2_ptr,  # [L, 2, K, HP] operand
    b2_ptr,  # [L, 2, K] float32
    affine_ptr,  # [L, 3, 2, K] float32
    perm_ptr,  # [L, 2, S, 2, 2, K, K] operand; read unless HARD
    perm_index_ptr,  # [L, 2, 2, K] int32; read if HARD
    log_g_ptr,  # [1] float32
    stage_ptr,  # [programs, S, BM, 2 * K] operand; used if BK
    state_ptr,  # [programs, BM, 2 * K] float32; used if BK
    lp_ptr,  # [N] float32
    log_det_ptr,  # [N] float32
    z_ptr,  # [N, C] float32; written if WANT_Z
    v_ptr,  # [N, C] float32; written if SAVE, as all saved activations
    saved_x_ptr,  # [L, 2, N, CS] operand
    saved_y2_ptr,  # [L, N, CS] operand
    saved_s_ptr,  # [L, N, CS] float32
    rows,  # int32, N
    sources,  # int32, R
    row_stride,  # int32
    height,  # int32, of a map
    width,  # int32, of a map
    tiles,  # int32
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
    WANT_Z: tl.constexpr,
    SAVE: tl.constexpr,
    CS: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    NS: tl.constexpr,
    TW: tl.constexpr,
    KT: tl.constexpr,
):
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    TH: tl.constexpr = BM // TW
    dtype = w1x_ptr.dtype.element_ty
    channel = tl.arange(0, K)
    if BK:
        stage_ptr, state_ptr = program_memory(stage_ptr, state_ptr, BM, K)
    subnet_ptrs = (w1x_ptr, w1p_ptr, bias_ptr, table_ptr, w2_ptr, b2_ptr)
    permutation = (perm_ptr, perm_index_ptr, stage_ptr)

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        if COND == RASTER:
            row, inside, top, left = raster_rows(tile, height, width, BM, TH, TW)
            source, written = row, inside
            chosen, table_row, exists = raster_tables((top, left), height, width, BM, TH, TW, KT)
            condition = (chosen.to(dtype), table_row, exists, height, width)
        else:
            row = tl.cast(tile, tl.int64) * BM + tl.arange(0, BM)
            written = row < rows
            source, line, column, inside = locate_rows(
                index_ptr, row, written, sources, width, height * width, HAS_INDEX, GATHER
            )
            if COND == DENSE:
                p = load_condition(condition_ptr, source, inside, P, PP).to(dtype)  # [BM, PP]
            else:
                p = tl.zeros((BM, 16), dtype)  # never used
            condition = (p, line, column, height, width)

        x_tile_ptr = x_ptr + source[:, None] * row_stride + channel[None, :]
        x1, x2 = load_halves(x_tile_ptr, inside, channel, C1, C2)  # [BM, K] each
        # In 16 bits a feature beyond the largest float16 would turn into another number; the results of such a row are
        # NaN, as are those of a row with an infinite or NaN feature. Rows never mix, so no other row is affected.
        largest = 65504.0 if dtype == tl.float16 else 3.4028235e38
        usable = all_within(x1, largest, K) & all_within(x2, largest, K)
        log_det = tl.zeros((BM,), tl.float32)
        if SAVE:
            saved_layer = tl.cast(rows, tl.int64) * CS
            saved = row[:, None] * CS + channel[None, :]  # [BM, K]
            in_saved = written[:, None] & (channel < CS)[None, :]

        if BK:
            tl.store(state_ptr, x1)
            tl.store(state_ptr + K, x2)
            tl.debug_barrier()

        for layer in range(layers):
            if BK:
                x1 = tl.load(state_ptr)
            x1_operand = x1.to(dtype)
            if SAVE:
                tl.store(saved_x_ptr + layer * 2 * saved_layer + saved, x1_operand, mask=in_saved)
                if BK:
                    x2 = tl.load(state_ptr + K)
                tl.store(saved_x_ptr + (layer * 2 + 1) * saved_layer + saved, x2.to(dtype), mask=in_saved)
            pre_s, pre_t = subnet(x1_operand, layer, condition, subnet_ptrs, K, H, HP, PP, COND, BM, BH, NS)

            # s = clamp tanh(0.1 pre_s) or clamp tanh(0.1 pre_s / clamp); y = [x1, x2 exp(s) + 0.1 pre_t]
            s = clamp * tanh(0.1 * inner_clamp * pre_s)  # [BM, K]
            if BK:
                x1 = tl.load(state_ptr)
                x2 = tl.load(state_ptr + K)
            # A number outside the range of the operands could hide behind the ReLU and return: here it shows.
            s = tl.where(tl.abs(x1) <= largest, s, float("nan"))
            log_det += tl.sum(s, 1)
            x2 = x2 * tl.exp(s) + 0.1 * pre_t
            if SAVE:
                tl.store(saved_y2_ptr + layer * saved_layer + saved, x2.to(dtype), mask=in_saved)
                tl.store(saved_s_ptr + layer * saved_layer + saved, s, mask=in_saved)
            # out = W_perm (g y + offset)
            layer_affine_ptr = affine_ptr + layer * 6 * K + channel
            x1 = x1 * tl.load(layer_affine_ptr)[None, :] + tl.load(layer_affine_ptr + 2 * K)[None, :]
            x2 = x2 * tl.load(layer_affine_ptr + K)[None, :] + tl.load(layer_affine_ptr + 3 * K)[None, :]
            # The last permutation is a rotation: it does not change |z|.
            if layer < layers - 1:
                x1, x2 = permute(x1, x2, layer, permutation, 0, HARD, BM, K, BK, NS)
            if BK:
                tl.debug_barrier()
                tl.store(state_ptr, x1)
                tl.store(state_ptr + K, x2)
                tl.debug_barrier()
        if BK:
            x1 = tl.load(state_ptr)
            x2 = tl.load(state_ptr + K)

        # lp = (-C/2 ln(2 pi) - 1/2 |z|^2 + log_det) / C
        log_det += tl.load(log_g_ptr)
        lp = (log_det - 0.5 * (tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1))) / C - 0.5 * LOG_2PI
        nan = float("nan")
        valid = inside & usable
        tl.store(lp_ptr + row, tl.where(valid, lp, nan), mask=written)
        tl.store(log_det_ptr + row, tl.where(valid, log_det, nan), mask=written)
        in_first = written[:, None] & (channel < C1)[None, :]
        in_second = written[:, None] & (channel < C2)[None, :]
        if SAVE:
            v_tile_ptr = v_ptr + row[:, None] * C + channel[None, :]
            tl.store(v_tile_ptr, x1, mask=in_first)
            tl.store(v_tile_ptr + C1, x2, mask=in_second)
        if WANT_Z:
            x1, x2 = permute(x1, x2, layers - 1, permutation, 0, HARD, BM, K, BK, NS)
            z_tile_ptr = z_ptr + row[:, None] * C + channel[None, :]
            tl.store(z_tile_ptr, tl.where(valid[:, None], x1, nan), mask=in_first)
            tl.store(z_tile_ptr + C1, tl.where(valid[:, None], x2, nan), mask=in_second)
        if BK:
            # The next tile overwrites the state that other threads may still be reading.
            tl.debug_barrier()


class Saved(NamedTuple):
    """Saved activations of the forward, for the backward: 10 bytes per channel pair, row and layer in 16 bits.

    CS is C1 rounded up to a multiple of 8.
    """

    v: Tensor  # [N, C] float32, g y + offset of the last layer
    x: Tensor  # [L, 2, N, CS] operand, every layer's input
    y2: Tensor  # [L, N, CS] operand, x2 exp(s) + a_t
    s: Tensor  # [L, N, CS] float32


class ForwardResult(NamedTuple):
    """Log-likelihood per dimension and log-determinant, [N] float32; z [N, C] and saved activations where wanted.

    A row whose features or whose index cannot be used has NaN; no other row is affected by it.
    """

    lp: Tensor
    log_det: Tensor
    z: Tensor | None
    saved: Saved | None


def flow_forward(
    rows: Rows,
    weights: FlowWeights,
    *,
    channels: int,
    hidden: int,
    clamp: float,
    scaled_tanh: bool,
    want_z: bool = False,
    save: bool = False,
    tiles: Mapping[str, int],
) -> ForwardResult:
    """Launch the kernel on N rows and return its results.

    Args:
        rows: the features (float32, float16 or bfloat16, unit stride along C) and their condition.
        weights: from `pack.flow_pack` or `weights.pack`; their type is that of the operands of products.
        channels, hidden: C and H.
        clamp, scaled_tanh: s = clamp tanh(a), or clamp tanh(a / clamp).
        want_z: return the latent.
        save: return the saved activations that the backward needs.
        tiles: BM, BH, BK (0: rows stay in registers), num_warps, num_stages.
    """
    x = rows.features
    assert x.shape[1:] == (channels,)
    assert channels <= MOST_CHANNELS
    assert x.stride(1) == 1
    result = _empty_result(rows.count, channels, weights, want_z, save, x.device)
    if not rows.count:
        return result

    # Whole maps are cut into tiles of neighboring pixels; training rows and dense conditions into runs of rows.
    kind = condition_kind(rows, weights, raster=is_raster(rows, weights) and not save)
    constants = {
        "C": channels,
        "K": weights.b2.shape[2],
        "H": hidden,
        "HP": weights.bias.shape[1],
        "P": rows.condition.shape[1] if rows.condition is not None else 0,
        "PP": weights.w1p.shape[2] if rows.condition is not None else 0,
        "COND": kind,
        "HAS_INDEX": rows.index is not None,
        "GATHER": rows.gather,
        "HARD": bool(weights.perm_index.numel()),
        "WANT_Z": want_z,
        "SAVE": save,
        "CS": saved_stride(channels),
    }
    with torch.cuda.device_of(x):
        _launch(rows, weights, result, (clamp, 1 / clamp if scaled_tanh else 1.0), constants, tiles)
    return result


def _launch(
    rows: Rows,
    weights: FlowWeights,
    result: ForwardResult,
    clamps: tuple[float, float],
    constants: Mapping[str, Any],
    tiles: Mapping[str, int],
) -> None:
    """Launch the kernel, which writes to the tensors of `result`."""
    x = rows.features
    nothing = torch.empty(0, device=x.device)
    blocks, tile_height, tile_width = _blocks(rows, constants["COND"], tiles["BM"])
    programs, stage, state = staging(blocks, constants["K"], tiles, weights.w1x.dtype, x.device)
    flow_forward_kernel[(programs,)](
        x,
        rows.index if rows.index is not None else nothing,
        rows.condition if rows.condition is not None else nothing,
        weights.w1x,
        weights.w1p,
        weights.bias,
        weights.tables,
        weights.w2,
        weights.b2,
        weights.affine,
        weights.w_perm,
        weights.perm_index,
        weights.log_g,
        stage,
        state,
        result.lp,
        result.log_det,
        result.z if result.z is not None else nothing,
        *(result.saved if result.saved is not None else (nothing,) * 4),
        rows.count,
        len(x),
        x.stride(0),
        rows.height,
        rows.width,
        blocks,
        weights.b2.shape[0],
        *clamps,
        **constants,
        BM=tiles["BM"],
        BH=tiles["BH"],
        BK=tiles["BK"],
        NS=tiles["num_stages"],
        TW=tile_width,
        KT=max(16, triton.next_power_of_2(tile_height + tile_width)),
        num_warps=tiles["num_warps"],
        num_stages=tiles["num_stages"],
    )


def _blocks(rows: Rows, kind: int, tile_rows: int) -> tuple[int, int, int]:
    """Return the number of tiles, and height and width of a tile of pixels."""
    height, width = raster_tile(tile_rows)
    if kind != RASTER:
        return triton.cdiv(rows.count, tile_rows), height, width
    maps = rows.count // (rows.height * rows.width)
    return maps * triton.cdiv(rows.width, width) * triton.cdiv(rows.height, height), height, width


def _empty_result(
    count: int, channels: int, weights: FlowWeights, want_z: bool, save: bool, device: torch.device
) -> ForwardResult:
    """Return tensors for the kernel to write to."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    saved = None
    if save:
        layers, stride, operand = weights.b2.shape[0], saved_stride(channels), weights.w1x.dtype
        saved = Saved(
            empty(count, channels),
            empty(layers, 2, count, stride, dtype=operand),
            empty(layers, count, stride, dtype=operand),
            empty(layers, count, stride),
        )
    return ForwardResult(empty(count), empty(count), empty(count, channels) if want_z else None, saved)
