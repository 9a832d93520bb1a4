"""Preparing the weights of a flow in one launch: what `weights.pack` does in some fifty.

    W1 -> w1x, w1p, tables       b1 -> bias, tables        W2 -> w2        b2 -> b2
    global_scale -> g, dg/dglobal_scale, log_g             global_offset -> offset        W_perm -> w_perm

A training step prepares the weights again after every update, and its other kernels are few and short; fifty launches
would be a third of it. The tensors of all layers are read where they are, through a table of their addresses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_cache import DeviceCache, capturing
from .condition import DENSE, TABLES
from .weights import HIDDEN_MULTIPLE, FlowWeights, tile_channels, tile_condition

# Hidden units that one program prepares; of a table, with half as many rows.
BLOCK = 64
ACTIVATIONS = {"SOFTPLUS": 0, "SIGMOID": 1, "EXP": 2}
# The order of the addresses of a layer.
W1, B1, W2, B2, SCALE, OFFSET, W_PERM = (tl.constexpr(i) for i in range(7))


@triton.jit
def global_affine(
    scale,  # [K] float32
    ACTIVATION: tl.constexpr,
):
    """Return g and its derivative: 0.1 softplus(scale, beta = 0.5), 10 sigmoid(scale - 2) or exp(scale)."""
    if ACTIVATION == 0:
        # log(1 + e) loses the digits of a small e; log(u) e / (u - 1) with the rounded u = 1 + e does not.
        e = tl.exp(-tl.abs(0.5 * scale))
        u = 1 + e
        log1p = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))
        g = 0.2 * (tl.maximum(0.5 * scale, 0.0) + log1p)
        slope = 0.1 / (1 + tl.exp(-0.5 * scale))
    elif ACTIVATION == 1:
        sigmoid = 1 / (1 + tl.exp(2 - scale))
        g = 10 * sigmoid
        slope = g * (1 - sigmoid)
    else:
        g = tl.exp(scale)
        slope = g
    return g, slope


@triton.jit
def address(addresses_ptr, layer, WHICH: tl.constexpr):
    """Return the pointer to one of a layer's float32 tensors."""
    return tl.load(addresses_ptr + layer * 7 + WHICH).to(tl.pointer_type(tl.float32))


@triton.jit
def pack_first_layer(
    addresses_ptr,  # [L, 7] int64
    out_ptrs,  # w1x_ptr [L, HP, K] operand, w1p_ptr [L, HP, PP] operand, bias_ptr [L, HP] float32
    layer,  # int
    unit,  # [BH] int
    C1: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    COND: tl.constexpr,
):
    """Prepare the subnet's first linear layer, for a block of hidden units."""
    w1x_ptr, w1p_ptr, bias_ptr = out_ptrs
    dtype = w1x_ptr.dtype.element_ty
    channel = tl.arange(0, K)
    inside = unit < H
    w1_ptr = address(addresses_ptr, layer, W1) + unit[:, None] * (C1 + P)
    w1x = tl.load(w1_ptr + channel[None, :], mask=inside[:, None] & (channel < C1)[None, :], other=0.0)  # [BH, K]
    tl.store(w1x_ptr + (layer * HP + unit)[:, None] * K + channel[None, :], w1x.to(dtype))
    tl.store(bias_ptr + layer * HP + unit, tl.load(address(addresses_ptr, layer, B1) + unit, mask=inside, other=0.0))
    if COND == DENSE:
        entry = tl.arange(0, PP)
        w1p = tl.load(w1_ptr + C1 + entry[None, :], mask=inside[:, None] & (entry < P)[None, :], other=0.0)  # [BH, PP]
        tl.store(w1p_ptr + (layer * HP + unit)[:, None] * PP + entry[None, :], w1p.to(dtype))


@triton.jit
def pack_second_layer(
    addresses_ptr,  # [L, 7] int64
    w2_ptr,  # [L, 2, K, HP] operand
    layer,  # int
    unit,  # [BH] int
    C2: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
):
    """Prepare the subnet's second linear layer, for a block of hidden units."""
    channel = tl.arange(0, K)
    source_ptr = address(addresses_ptr, layer, W2)
    for half in tl.static_range(2):
        rows = tl.load(
            source_ptr + (half * C2 + channel)[:, None] * H + unit[None, :],
            mask=(channel < C2)[:, None] & (unit < H)[None, :],
            other=0.0,
        )  # [K, BH]
        tile_ptr = w2_ptr + ((layer * 2 + half) * K + channel)[:, None] * HP + unit[None, :]
        tl.store(tile_ptr, rows.to(w2_ptr.dtype.element_ty))


@triton.jit
def pack_quadrant(
    addresses_ptr,  # [L, 7] int64
    perm_ptr,  # [L, 2, S, 2, 2, K, K] operand
    layer,  # int
    quadrant,  # int, 0 to 7: back, half_from, half_to
    C1: tl.constexpr,
    C2: tl.constexpr,
    K: tl.constexpr,
):
    """Prepare one quadrant of W_perm, there (out = v W_perm^T) or back (v = out W_perm); stored [from, to]."""
    dtype = perm_ptr.dtype.element_ty
    SPLIT: tl.constexpr = dtype == tl.float16
    back, half_from, half_to = quadrant // 4, quadrant // 2 % 2, quadrant % 2
    row = tl.arange(0, K)
    channel = tl.arange(0, K)
    stride_from = tl.where(back == 1, C1 + C2, 1)
    stride_to = tl.where(back == 1, 1, C1 + C2)
    in_from = row < tl.where(half_from == 1, C2, C1)
    in_to = channel < tl.where(half_to == 1, C2, C1)
    from_ptr = address(addresses_ptr, layer, W_PERM) + (half_from * C1 + row)[:, None] * stride_from
    values = tl.load(
        from_ptr + (half_to * C1 + channel)[None, :] * stride_to,
        mask=in_from[:, None] & in_to[None, :],
        other=0.0,
    )  # [K, K]
    stored = (layer * 2 + back) * (1 + SPLIT) * 4 + half_from * 2 + half_to
    tile_ptr = perm_ptr + stored * K * K + row[:, None] * K + channel[None, :]
    high = values.to(dtype)
    tl.store(tile_ptr, high)
    if SPLIT:
        tl.store(tile_ptr + 4 * K * K, (values - high.to(tl.float32)).to(dtype))


@triton.jit
def pack_vectors(
    addresses_ptr,  # [L, 7] int64
    out_ptrs,  # b2_ptr [L, 2, K], affine_ptr [L, 3, 2, K], log_g_ptr [1], float32 each
    layer,  # int
    layers,  # int
    C1: tl.constexpr,
    C2: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Prepare b2, g, offset and dg / d(global scale) of a layer; with the first layer also sum(log g) of all."""
    b2_ptr, affine_ptr, log_g_ptr = out_ptrs
    channel = tl.arange(0, K)
    scale_ptr = address(addresses_ptr, layer, SCALE)
    for half in tl.static_range(2):
        inside = channel < C1 - half * (C1 - C2)
        b2 = tl.load(address(addresses_ptr, layer, B2) + half * C2 + channel, mask=channel < C2, other=0.0)  # [K]
        tl.store(b2_ptr + (layer * 2 + half) * K + channel, b2)
        g, slope = global_affine(tl.load(scale_ptr + half * C1 + channel, mask=inside, other=0.0), ACTIVATION)
        offset = tl.load(address(addresses_ptr, layer, OFFSET) + half * C1 + channel, mask=inside, other=0.0)
        half_ptr = affine_ptr + (layer * 6 + half) * K + channel
        tl.store(half_ptr, tl.where(inside, g, 0.0))
        tl.store(half_ptr + 2 * K, offset)
        tl.store(half_ptr + 4 * K, tl.where(inside, slope, 0.0))
    if layer == 0:
        entry = tl.arange(0, 2 * K)
        log_g = tl.zeros((2 * K,), tl.float32)
        for other in range(layers):
            scale = tl.load(address(addresses_ptr, other, SCALE) + entry, mask=entry < C1 + C2, other=0.0)
            every_g, _ = global_affine(scale, ACTIVATION)
            log_g += tl.where(entry < C1 + C2, tl.log(every_g), 0.0)
        tl.store(log_g_ptr, tl.sum(log_g, 0))


@triton.jit
def pack_table(
    addresses_ptr,  # [L, 7] int64
    codes_ptr,  # [height + width, PP / 2] float32
    table_ptr,  # [L, height + width, HP] operand
    layer,  # int
    table_row,  # [BH / 2] int
    unit,  # [BH] int
    table_rows,  # int, height + width
    height,  # int
    C1: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
):
    """Prepare B of the lines and A of the columns; a position's code is that of its column, then that of its line."""
    HALF: tl.constexpr = PP // 2
    entry = tl.arange(0, HALF)
    exists = (table_row < table_rows)[:, None]
    code = tl.load(codes_ptr + table_row[:, None] * HALF + entry[None, :], mask=exists, other=0.0)  # [BH / 2, HALF]
    w1_ptr = address(addresses_ptr, layer, W1) + unit[None, :] * (C1 + P) + C1 + entry[:, None]  # [HALF, BH]
    used = (entry < P // 2)[:, None] & (unit < H)[None, :]
    of_line = tl.dot(code, tl.load(w1_ptr + P // 2, mask=used, other=0.0), input_precision="tf32x3")
    of_column = tl.dot(code, tl.load(w1_ptr, mask=used, other=0.0), input_precision="tf32x3")
    b1 = tl.load(address(addresses_ptr, layer, B1) + unit, mask=unit < H, other=0.0)  # [BH]
    values = tl.where((table_row < height)[:, None], of_line, of_column + b1[None, :])  # [BH / 2, BH]
    tile_ptr = table_ptr + (layer * table_rows + table_row)[:, None] * HP + unit[None, :]
    tl.store(tile_ptr, values.to(table_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["table_rows", "height", "layers"])
def flow_pack_kernel(
    addresses_ptr,  # [L, 7] int64
    codes_ptr,  # [height + width, PP / 2] float32; read if TABLES
    w1x_ptr,  # [L, HP, K] operand
    w1p_ptr,  # [L, HP, PP] operand; written if DENSE
    bias_ptr,  # [L, HP] float32
    table_ptr,  # [L, height + width, HP] operand; written if TABLES
    w2_ptr,  # [L, 2, K, HP] operand
    b2_ptr,  # [L, 2, K] float32
    affine_ptr,  # [L, 3, 2, K] float32
    perm_ptr,  # [L, 2, S, 2, 2, K, K] operand
    log_g_ptr,  # [1] float32
    table_rows,  # int32, height + width; 0 without positions
    height,  # int32, of a map
    layers,  # int32, L
    C: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    COND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BH: tl.constexpr,
):
    """Prepare the weights of one layer: blocks of hidden units, then 8 quadrants, the vectors, tiles of the table."""
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    UNITS: tl.constexpr = HP // BH
    part = tl.program_id(0)
    layer = tl.program_id(1)
    block = tl.arange(0, BH)
    if part < UNITS:
        first_ptrs = (w1x_ptr, w1p_ptr, bias_ptr)
        pack_first_layer(addresses_ptr, first_ptrs, layer, part * BH + block, C1, K, H, HP, P, PP, COND)
        pack_second_layer(addresses_ptr, w2_ptr, layer, part * BH + block, C2, K, H, HP)
    elif part < UNITS + 8:
        pack_quadrant(addresses_ptr, perm_ptr, layer, part - UNITS, C1, C2, K)
    elif part == UNITS + 8:
        pack_vectors(addresses_ptr, (b2_ptr, affine_ptr, log_g_ptr), layer, layers, C1, C2, K, ACTIVATION)
    else:
        if COND == TABLES:
            tile = part - UNITS - 9
            table_row = tile // UNITS * (BH // 2) + tl.arange(0, BH // 2)
            unit = tile % UNITS * BH + block
            pack_table(
                addresses_ptr, codes_ptr, table_ptr, layer, table_row, unit, table_rows, height, C1, H, HP, P, PP
            )


def flow_pack(
    weights: Sequence[Tensor],
    codes: Tensor | None,
    places: tuple[int, int],
    *,
    channels: int,
    hidden: int,
    condition_channels: int,
    dense: bool,
    activation: str,
    operand: torch.dtype,
) -> FlowWeights:
    """Return the prepared weights of a flow with a soft permutation.

    Args:
        weights: seven contiguous float32 tensors per layer: w1, b1, w2, b2, global_scale, global_offset, w_perm.
        codes: of the lines and then of the columns of a map, float32 [height + width, PP / 2]; None without positions.
        places: height and width of the map.
        channels, hidden, condition_channels: C, H and P.
        dense: the condition is a tensor.
        activation: of the global scale, see `ACTIVATIONS`.
        operand: float16 or float32, the type of the operands of products.
    """
    layers, device = len(weights) // 7, weights[0].device
    k, padded = tile_channels(channels), -(-hidden // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE
    pp, table_rows = tile_condition(condition_channels), sum(places) if codes is not None else 0

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    packed = FlowWeights(
        w1x=empty(layers, padded, k, dtype=operand),
        w1p=empty(layers, padded, pp, dtype=operand) if dense else empty(0, dtype=operand),
        bias=empty(layers, padded),
        tables=empty(layers, table_rows, padded, dtype=operand) if codes is not None else empty(0, dtype=operand),
        codes=codes.to(operand, copy=True) if codes is not None else empty(0, dtype=operand),
        w2=empty(layers, 2, k, padded, dtype=operand),
        b2=empty(layers, 2, k),
        affine=empty(layers, 3, 2, k),
        w_perm=empty(layers, 2, 2 if operand == torch.float16 else 1, 2, 2, k, k, dtype=operand),
        perm_index=empty(0, dtype=torch.int32),
        log_g=empty(1),
    )
    units = padded // BLOCK
    with torch.cuda.device_of(weights[0]):
        flow_pack_kernel[(units + 9 + triton.cdiv(table_rows, BLOCK // 2) * units, layers)](
            addresses(tuple(tensor.data_ptr() for tensor in weights), device),
            codes if codes is not None else packed.bias,
            packed.w1x,
            packed.w1p,
            packed.bias,
            packed.tables,
            packed.w2,
            packed.b2,
            packed.affine,
            packed.w_perm,
            packed.log_g,
            table_rows,
            places[0],
            layers,
            C=channels,
            K=k,
            H=hidden,
            HP=padded,
            P=condition_channels,
            PP=pp,
            COND=int(DENSE if dense else TABLES),
            ACTIVATION=ACTIVATIONS[activation],
            BH=BLOCK,
            num_warps=8,
        )
    return packed


_tables: DeviceCache[Tensor] = DeviceCache(256)


def addresses(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return addresses as an int64 tensor on the device; equal addresses share one, whatever tensors they are of."""
    return _tables.get((pointers, device), device, lambda: _table(pointers, device))


def _table(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a new tensor that holds the addresses."""
    if not capturing(device):
        return torch.tensor(pointers, dtype=torch.int64, device=device)
    # A replay would read the host's list again, whatever its memory then holds, so a capture refuses that copy. A
    # number that is filled in is part of the captured kernel.
    table = torch.empty(len(pointers), dtype=torch.int64, device=device)
    for entry, pointer in zip(table, pointers, strict=True):
        entry.fill_(pointer)
    return table
