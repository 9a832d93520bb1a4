"""Packing the weights of a flow in one launch, and their gradients back: what `flow_weights.pack` does in fifty.

A training step packs anew after every update, and its other kernels are few and short; the launches would be a third of
it. The tensors of all layers are read where they are, through a table of their addresses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_cache import DeviceCache, capturing
from .shared import DENSE, TABLES
from .weights import HIDDEN_MULTIPLE, FlowWeights, tile_channels, tile_condition

# Hidden units that one program packs; of a table, with half as many rows.
BLOCK = 64
# Blocks of rows whose partial sums are added at a time.
PARTIAL_ROWS = 32
ACTIVATIONS = {"SOFTPLUS": 0, "SIGMOID": 1, "EXP": 2}
# The order of the addresses of a layer.
W1, B1, W2_, B2_, SCALE, OFFSET, W_PERM = (tl.constexpr(i) for i in range(7))


@triton.jit
def global_affine(scale, ACTIVATION: tl.constexpr):
    """g and its derivative: 0.1 softplus(scale, beta = 0.5), 10 sigmoid(scale - 2) or exp(scale)."""
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
def address(ADDRESSES, layer, which: tl.constexpr):
    """One of a layer's float32 tensors."""
    return tl.load(ADDRESSES + layer * 7 + which).to(tl.pointer_type(tl.float32))


@triton.jit
def pack_units(
    ADDRESSES, W1X, W1P, BIAS, W2, layer, unit,
    C1: tl.constexpr, C2: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, P: tl.constexpr,
    PP: tl.constexpr, COND: tl.constexpr,
):  # fmt: skip
    """Both linear layers of the subnet, for a block of hidden units."""
    dtype = W1X.dtype.element_ty
    channel = tl.arange(0, K)
    inside = unit < H
    w1 = address(ADDRESSES, layer, W1) + unit[:, None] * (C1 + P)
    values = tl.load(w1 + channel[None, :], mask=inside[:, None] & (channel < C1)[None, :], other=0.0)
    tl.store(W1X + (layer * HP + unit)[:, None] * K + channel[None, :], values.to(dtype))
    tl.store(BIAS + layer * HP + unit, tl.load(address(ADDRESSES, layer, B1) + unit, mask=inside, other=0.0))
    if COND == DENSE:
        entry = tl.arange(0, PP)
        seen = tl.load(w1 + C1 + entry[None, :], mask=inside[:, None] & (entry < P)[None, :], other=0.0)
        tl.store(W1P + (layer * HP + unit)[:, None] * PP + entry[None, :], seen.to(dtype))
    w2 = address(ADDRESSES, layer, W2_)
    for half in tl.static_range(2):
        rows = tl.load(
            w2 + (half * C2 + channel)[:, None] * H + unit[None, :],
            mask=(channel < C2)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        tl.store(W2 + ((layer * 2 + half) * K + channel)[:, None] * HP + unit[None, :], rows.to(dtype))


@triton.jit
def pack_quadrant(
    ADDRESSES, PERM, layer, back, half_from, half_to,
    C1: tl.constexpr, C2: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One quadrant of W_perm, there (out = v W_perm^T) or back (v = out W_perm); stored [from, to]."""
    dtype = PERM.dtype.element_ty
    row = tl.arange(0, K)
    channel = tl.arange(0, K)
    stride_from = tl.where(back == 1, C1 + C2, 1)
    stride_to = tl.where(back == 1, 1, C1 + C2)
    in_from = row < tl.where(half_from == 1, C2, C1)
    in_to = channel < tl.where(half_to == 1, C2, C1)
    values = tl.load(
        address(ADDRESSES, layer, W_PERM)
        + (half_from * C1 + row)[:, None] * stride_from + (half_to * C1 + channel)[None, :] * stride_to,
        mask=in_from[:, None] & in_to[None, :], other=0.0,
    )  # fmt: skip
    quadrant = (layer * 2 + back) * (1 + SPLIT) * 4 + half_from * 2 + half_to
    at = PERM + quadrant * K * K + row[:, None] * K + channel[None, :]
    high = values.to(dtype)
    tl.store(at, high)
    if SPLIT:
        tl.store(at + 4 * K * K, (values - high.to(tl.float32)).to(dtype))


@triton.jit
def pack_vectors(
    ADDRESSES, B2, AFFINE, LOG_G, layer, layers,
    C1: tl.constexpr, C2: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """b2, g, offset and dg / d(global scale) of a layer; with the first layer also sum(log g) of all."""
    channel = tl.arange(0, K)
    scale = address(ADDRESSES, layer, SCALE)
    for half in tl.static_range(2):
        inside = channel < C1 - half * (C1 - C2)
        b2 = tl.load(address(ADDRESSES, layer, B2_) + half * C2 + channel, mask=channel < C2, other=0.0)
        tl.store(B2 + (layer * 2 + half) * K + channel, b2)
        g, slope = global_affine(tl.load(scale + half * C1 + channel, mask=inside, other=0.0), ACTIVATION)
        offset = tl.load(address(ADDRESSES, layer, OFFSET) + half * C1 + channel, mask=inside, other=0.0)
        at = AFFINE + (layer * 6 + half) * K + channel
        tl.store(at, tl.where(inside, g, 0.0))
        tl.store(at + 2 * K, offset)
        tl.store(at + 4 * K, tl.where(inside, slope, 0.0))
    if layer == 0:
        entry = tl.arange(0, 2 * K)
        log_g = tl.zeros((2 * K,), tl.float32)
        for other in range(layers):
            raw = tl.load(address(ADDRESSES, other, SCALE) + entry, mask=entry < C1 + C2, other=0.0)
            every_g, _ = global_affine(raw, ACTIVATION)
            log_g += tl.where(entry < C1 + C2, tl.log(every_g), 0.0)
        tl.store(LOG_G, tl.sum(log_g, 0))


@triton.jit
def pack_table(
    ADDRESSES, CODES, TABLE, layer, place, unit, places, height,
    C1: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    """B of the lines, A of the columns: the code of a place is that of its column followed by that of its line."""
    HALF: tl.constexpr = PP // 2
    entry = tl.arange(0, HALF)
    code = tl.load(CODES + place[:, None] * HALF + entry[None, :], mask=(place < places)[:, None], other=0.0)
    w1 = address(ADDRESSES, layer, W1) + unit[None, :] * (C1 + P) + C1 + entry[:, None]  # [HALF, BU]
    used = (entry < P // 2)[:, None] & (unit < H)[None, :]
    of_line = tl.dot(code, tl.load(w1 + P // 2, mask=used, other=0.0), input_precision="tf32x3")
    of_column = tl.dot(code, tl.load(w1, mask=used, other=0.0), input_precision="tf32x3")
    b1 = tl.load(address(ADDRESSES, layer, B1) + unit, mask=unit < H, other=0.0)
    values = tl.where((place < height)[:, None], of_line, of_column + b1[None, :])
    at = TABLE + (layer * places + place)[:, None] * HP + unit[None, :]
    tl.store(at, values.to(TABLE.dtype.element_ty), mask=(place < places)[:, None])


@triton.jit(do_not_specialize=["places", "height", "layers"])
def flow_pack_kernel(
    ADDRESSES, CODES, W1X, W1P, BIAS, TABLE, W2, B2, AFFINE, PERM, LOG_G,
    places, height, layers,
    C: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    COND: tl.constexpr, SPLIT: tl.constexpr, ACTIVATION: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    UNITS: tl.constexpr = HP // BU
    part = tl.program_id(0)
    layer = tl.program_id(1)
    block = tl.arange(0, BU)
    if part < UNITS:
        pack_units(ADDRESSES, W1X, W1P, BIAS, W2, layer, part * BU + block, C1, C2, K, H, HP, P, PP, COND)
    elif part < UNITS + 8:
        quadrant = part - UNITS
        pack_quadrant(
            ADDRESSES, PERM, layer, quadrant // 4, quadrant // 2 % 2, quadrant % 2, C1, C2, K, SPLIT
        )  # fmt: skip
    elif part == UNITS + 8:
        pack_vectors(ADDRESSES, B2, AFFINE, LOG_G, layer, layers, C1, C2, K, ACTIVATION)
    else:
        if COND == TABLES:
            tile = part - UNITS - 9
            place = tile // UNITS * (BU // 2) + tl.arange(0, BU // 2)
            unit = tile % UNITS * BU + block
            pack_table(ADDRESSES, CODES, TABLE, layer, place, unit, places, height, C1, H, HP, P, PP)


@triton.jit
def unpack_units(
    D_W1X, D_W1P, D_B1, D_W2, OUT_W1, OUT_B1, OUT_W2, layer, unit, unscale, layers, splits,
    C1: tl.constexpr, C2: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, P: tl.constexpr,
    PP: tl.constexpr, COND: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """Gradients of both linear layers of the subnet, for a block of hidden units: sums over the parts of the rows."""
    channel = tl.arange(0, K)
    inside = unit < H
    passive = tl.zeros((BU, K), tl.float32)
    of_s = tl.zeros((BU, K), tl.float32)
    of_t = tl.zeros((BU, K), tl.float32)
    b1 = tl.zeros((BU,), tl.float32)
    for split in range(splits):
        part = split * layers + layer
        of_w1 = (part * HP + unit)[:, None] * K + channel[None, :]
        of_w2 = (part * 2 * HP + unit)[:, None] * K + channel[None, :]
        passive += tl.load(D_W1X + of_w1)
        of_s += tl.load(D_W2 + of_w2)
        of_t += tl.load(D_W2 + of_w2 + HP * K)
        b1 += tl.load(D_B1 + part * HP + unit)
    w1 = OUT_W1 + (layer * H + unit)[:, None] * (C1 + P)
    tl.store(w1 + channel[None, :], passive * unscale, mask=inside[:, None] & (channel < C1)[None, :])
    tl.store(OUT_B1 + layer * H + unit, b1 * unscale, mask=inside)
    w2 = OUT_W2 + (layer * 2 * C2 + channel)[None, :] * H + unit[:, None]
    active = inside[:, None] & (channel < C2)[None, :]
    tl.store(w2, of_s * unscale, mask=active)
    tl.store(w2 + C2 * H, of_t * unscale, mask=active)
    if P > 0:
        HALF: tl.constexpr = PP // 2
        # Where the second half of a tile of the condition belongs.
        second: tl.constexpr = P // 2 if COND == TABLES else HALF
        entry = tl.arange(0, HALF)
        for half in tl.static_range(2):
            values = tl.zeros((BU, HALF), tl.float32)
            for split in range(splits):
                of_w1p = ((split * layers + layer) * HP + unit)[:, None] * PP + entry[None, :]
                values += tl.load(D_W1P + of_w1p + half * HALF)
            used = entry < (P // 2 if COND == TABLES else P - half * HALF)
            at = w1 + C1 + half * second + entry[None, :]
            tl.store(at, values * unscale, mask=inside[:, None] & used[None, :])


@triton.jit
def unpack_vectors(
    AFFINE, PARTIAL, PARTIAL_DET, OUT_B2, OUT_SCALE, OUT_OFFSET, layer, unscale, layers, blocks,
    C1: tl.constexpr, C2: tl.constexpr, K: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Gradients of b2, global scale and global offset: column sums over all blocks of rows."""
    channel = tl.arange(0, K)
    block = tl.arange(0, BB)
    det = tl.zeros((BB,), tl.float32)
    for first in range(0, blocks, BB):
        det += tl.load(PARTIAL_DET + first + block, mask=first + block < blocks, other=0.0)
    total = tl.sum(det, 0) * unscale
    for half in tl.static_range(2):
        y = tl.zeros((BB, K), tl.float32)
        v = tl.zeros((BB, K), tl.float32)
        pre = tl.zeros((BB, K), tl.float32)
        for first in range(0, blocks, BB):
            row = tl.cast(first + block, tl.int64)
            sums = PARTIAL + ((row * layers + layer) * 6 + half)[:, None] * K + channel[None, :]
            in_blocks = (first + block < blocks)[:, None]
            y += tl.load(sums, mask=in_blocks, other=0.0)
            v += tl.load(sums + 2 * K, mask=in_blocks, other=0.0)
            pre += tl.load(sums + 4 * K, mask=in_blocks, other=0.0)
        inside = channel < C1 - half * (C1 - C2)
        # v = g y + offset, and log_det adds sum(log g) to every row
        g = tl.load(AFFINE + (layer * 6 + half) * K + channel, mask=inside, other=1.0)
        slope = tl.load(AFFINE + (layer * 6 + 4 + half) * K + channel, mask=inside, other=0.0)
        at = layer * (C1 + C2) + half * C1 + channel
        tl.store(OUT_SCALE + at, (tl.sum(y, 0) * unscale + total / g) * slope, mask=inside)
        tl.store(OUT_OFFSET + at, tl.sum(v, 0) * unscale, mask=inside)
        tl.store(OUT_B2 + layer * 2 * C2 + half * C2 + channel, tl.sum(pre, 0) * unscale, mask=channel < C2)


@triton.jit(do_not_specialize=["layers", "splits", "blocks"])
def flow_unpack_kernel(
    SCALE, AFFINE, D_W1X, D_W1P, D_B1, D_W2, PARTIAL, PARTIAL_DET,
    OUT_W1, OUT_B1, OUT_W2, OUT_B2, OUT_SCALE, OUT_OFFSET,
    layers, splits, blocks,
    C: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    COND: tl.constexpr, BU: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    part = tl.program_id(0)
    layer = tl.program_id(1)
    unscale = 1 / tl.load(SCALE)
    if part < HP // BU:
        unit = part * BU + tl.arange(0, BU)
        unpack_units(
            D_W1X, D_W1P, D_B1, D_W2, OUT_W1, OUT_B1, OUT_W2, layer, unit, unscale, layers, splits,
            C1, C2, K, H, HP, P, PP, COND, BU,
        )  # fmt: skip
    else:
        unpack_vectors(
            AFFINE, PARTIAL, PARTIAL_DET, OUT_B2, OUT_SCALE, OUT_OFFSET, layer, unscale, layers, blocks, C1, C2, K, BB
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
    """Packs the weights of a flow with a soft permutation.

    Args:
        weights: seven contiguous float32 tensors per layer: w1, b1, w2, b2, global_scale, global_offset, w_perm.
        codes: of the lines and then of the columns of a map, float32 [height + width, PP / 2]; None without positions.
        places: height and width.
        channels, hidden, condition_channels: C, H and P.
        dense: the condition is a tensor.
        activation: of the global scale, see `ACTIVATIONS`.
        operand: float16 or float32, the type of the operands of products.
    """
    layers, device = len(weights) // 7, weights[0].device
    k, padded = tile_channels(channels), -(-hidden // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE
    pp, count = tile_condition(condition_channels), sum(places) if codes is not None else 0
    parts = 2 if operand == torch.float16 else 1

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    packed = FlowWeights(
        w1x=empty(layers, padded, k, dtype=operand),
        w1p=empty(layers, padded, pp, dtype=operand) if dense else empty(0, dtype=operand),
        bias=empty(layers, padded),
        tables=empty(layers, count, padded, dtype=operand) if codes is not None else empty(0, dtype=operand),
        codes=codes.to(operand, copy=True) if codes is not None else empty(0, dtype=operand),
        w2=empty(layers, 2, k, padded, dtype=operand),
        b2=empty(layers, 2, k),
        affine=empty(layers, 3, 2, k),
        w_perm=empty(layers, 2, parts, 2, 2, k, k, dtype=operand),
        perm_index=empty(0, dtype=torch.int32),
        log_g=empty(1),
    )
    units = padded // BLOCK
    tables = triton.cdiv(count, BLOCK // 2) * units
    with torch.cuda.device_of(weights[0]):
        flow_pack_kernel[(units + 9 + tables, layers)](
            addresses(tuple(tensor.data_ptr() for tensor in weights), device),
            codes if codes is not None else packed.bias, packed.w1x, packed.w1p, packed.bias, packed.tables, packed.w2,
            packed.b2, packed.affine, packed.w_perm, packed.log_g, count, places[0], layers,
            C=channels, K=k, H=hidden, HP=padded, P=condition_channels, PP=pp,
            COND=int(DENSE if dense else TABLES), SPLIT=parts == 2, ACTIVATION=ACTIVATIONS[activation], BU=BLOCK,
            num_warps=8,
        )  # fmt: skip
    return packed


_tables: DeviceCache[Tensor] = DeviceCache(256)


def addresses(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses as a tensor on the device, int64. Equal addresses make an equal table, whoever the tensors are."""
    return _tables.get((pointers, device), device, lambda: _table(pointers, device))


def _table(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    if not capturing(device):
        return torch.tensor(pointers, dtype=torch.int64, device=device)
    # A replay would read again whatever then lies where the host's list was, so a capture refuses that copy. A number
    # that is filled in is part of the captured kernel.
    table = torch.empty(len(pointers), dtype=torch.int64, device=device)
    for place, pointer in zip(table, pointers, strict=True):
        place.fill_(pointer)
    return table


def flow_unpack(
    weights: FlowWeights,
    scale: Tensor,  # [1]
    d_w1x: Tensor,  # [S, L, HP, K]
    d_w1p: Tensor,  # [S, L, HP, PP]
    d_b1: Tensor,  # [S, L, HP]
    d_w2: Tensor,  # [S, L, 2, HP, K]
    partial: Tensor,  # [blocks, L, 6, K]
    partial_det: Tensor,  # [blocks]
    *,
    channels: int,
    hidden: int,
    condition_channels: int,
    kind: int,
) -> list[Tensor]:
    """Gradients of w1, b1, w2, b2, global_scale and global_offset, stacked, from those of what was packed."""
    splits, layers, padded, k = d_w1x.shape
    c2 = channels // 2
    shapes = [
        (hidden, channels - c2 + condition_channels), (hidden,), (2 * c2, hidden), (2 * c2,), (channels,), (channels,)
    ]  # fmt: skip
    found = [torch.empty((layers, *shape), dtype=torch.float32, device=scale.device) for shape in shapes]
    with torch.cuda.device_of(scale):
        flow_unpack_kernel[(padded // BLOCK + 1, layers)](
            scale, weights.affine, d_w1x, d_w1p, d_b1, d_w2, partial, partial_det, *found,
            layers, splits, len(partial),
            C=channels, K=k, H=hidden, HP=padded, P=condition_channels, PP=d_w1p.shape[3], COND=kind, BU=BLOCK,
            BB=PARTIAL_ROWS, num_warps=8,
        )  # fmt: skip
    return found
