"""Gradients of a flow's weights from those of the prepared weights, in one launch.

sums over the parts of the rows:   dw1x, dw1p -> dW1,  db1,  dW2
sums over the tiles of rows:       db2,  dglobal_offset = sum(dv)
                                   dglobal_scale = (sum(dv y) + sum(d_log_det) / g) dg / dglobal_scale
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .condition import TABLES
from .pack import BLOCK
from .weights import FlowWeights

# Tiles of rows whose partial sums are added at a time.
PARTIAL_TILES = 32


@triton.jit
def unpack_units(
    packed_ptrs,  # d_w1x_ptr [S, L, HP, K], d_b1_ptr [S, L, HP], d_w2_ptr [S, L, 2, HP, K], float32 each
    out_ptrs,  # out_w1_ptr [L, H, C1 + P], out_b1_ptr [L, H], out_w2_ptr [L, 2 * C2, H], float32 each
    parts,  # layer, layers and splits
    unit,  # [BH] int
    unscale,  # float32
    C1: tl.constexpr,
    C2: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    P: tl.constexpr,
    BH: tl.constexpr,
):
    """Sum up the gradients of both linear layers of the subnet but for the condition, for a block of hidden units."""
    d_w1x_ptr, d_b1_ptr, d_w2_ptr = packed_ptrs
    out_w1_ptr, out_b1_ptr, out_w2_ptr = out_ptrs
    layer, layers, splits = parts
    channel = tl.arange(0, K)
    inside = unit < H
    d_w1x = tl.zeros((BH, K), tl.float32)
    d_w2_s = tl.zeros((BH, K), tl.float32)
    d_w2_t = tl.zeros((BH, K), tl.float32)
    d_b1 = tl.zeros((BH,), tl.float32)
    for split in range(splits):
        part = split * layers + layer
        w1x_offset = (part * HP + unit)[:, None] * K + channel[None, :]
        w2_offset = (part * 2 * HP + unit)[:, None] * K + channel[None, :]
        d_w1x += tl.load(d_w1x_ptr + w1x_offset)
        d_w2_s += tl.load(d_w2_ptr + w2_offset)
        d_w2_t += tl.load(d_w2_ptr + w2_offset + HP * K)
        d_b1 += tl.load(d_b1_ptr + part * HP + unit)
    w1_row_ptr = out_w1_ptr + (layer * H + unit)[:, None] * (C1 + P)  # [BH, 1]
    tl.store(w1_row_ptr + channel[None, :], d_w1x * unscale, mask=inside[:, None] & (channel < C1)[None, :])
    tl.store(out_b1_ptr + layer * H + unit, d_b1 * unscale, mask=inside)
    w2_tile_ptr = out_w2_ptr + (layer * 2 * C2 + channel)[None, :] * H + unit[:, None]  # [BH, K]
    active = inside[:, None] & (channel < C2)[None, :]
    tl.store(w2_tile_ptr, d_w2_s * unscale, mask=active)
    tl.store(w2_tile_ptr + C2 * H, d_w2_t * unscale, mask=active)


@triton.jit
def unpack_condition(
    d_w1p_ptr,  # [S, L, HP, PP] float32
    out_w1_ptr,  # [L, H, C1 + P] float32
    parts,  # layer, layers and splits
    unit,  # [BH] int
    unscale,  # float32
    C1: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    COND: tl.constexpr,
    BH: tl.constexpr,
):
    """Sum up the gradients of the columns of W1 that read the condition, for a block of hidden units."""
    layer, layers, splits = parts
    HALF: tl.constexpr = PP // 2
    # Where the second half of a tile of the condition belongs.
    SECOND: tl.constexpr = P // 2 if COND == TABLES else HALF
    w1_row_ptr = out_w1_ptr + (layer * H + unit)[:, None] * (C1 + P)  # [BH, 1]
    entry = tl.arange(0, HALF)
    for half in tl.static_range(2):
        values = tl.zeros((BH, HALF), tl.float32)
        for split in range(splits):
            w1p_offset = ((split * layers + layer) * HP + unit)[:, None] * PP + entry[None, :]
            values += tl.load(d_w1p_ptr + w1p_offset + half * HALF)
        used = entry < (P // 2 if COND == TABLES else P - half * HALF)
        tile_ptr = w1_row_ptr + C1 + half * SECOND + entry[None, :]
        tl.store(tile_ptr, values * unscale, mask=(unit < H)[:, None] & used[None, :])


@triton.jit
def unpack_vectors(
    partial_ptrs,  # affine_ptr [L, 3, 2, K], partial_ptr [tiles, L, 6, K], partial_det_ptr [tiles], float32 each
    out_ptrs,  # out_b2_ptr [L, 2 * C2], out_scale_ptr [L, C], out_offset_ptr [L, C], float32 each
    parts,  # layer, layers and tiles
    unscale,  # float32
    C1: tl.constexpr,
    C2: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
):
    """Sum up the gradients of b2, global scale and global offset over all tiles of rows."""
    affine_ptr, partial_ptr, partial_det_ptr = partial_ptrs
    out_b2_ptr, out_scale_ptr, out_offset_ptr = out_ptrs
    layer, layers, tiles = parts
    channel = tl.arange(0, K)
    tile = tl.arange(0, BT)
    det = tl.zeros((BT,), tl.float32)
    for first in range(0, tiles, BT):
        det += tl.load(partial_det_ptr + first + tile, mask=first + tile < tiles, other=0.0)
    d_log_g = tl.sum(det, 0) * unscale
    for half in tl.static_range(2):
        dv_y = tl.zeros((BT, K), tl.float32)
        dv = tl.zeros((BT, K), tl.float32)
        d_pre = tl.zeros((BT, K), tl.float32)
        for first in range(0, tiles, BT):
            row = tl.cast(first + tile, tl.int64)
            sums_ptr = partial_ptr + ((row * layers + layer) * 6 + half)[:, None] * K + channel[None, :]  # [BT, K]
            exists = (first + tile < tiles)[:, None]
            dv_y += tl.load(sums_ptr, mask=exists, other=0.0)
            dv += tl.load(sums_ptr + 2 * K, mask=exists, other=0.0)
            d_pre += tl.load(sums_ptr + 4 * K, mask=exists, other=0.0)
        inside = channel < C1 - half * (C1 - C2)
        # v = g y + offset, and log_det adds sum(log g) to every row
        g = tl.load(affine_ptr + (layer * 6 + half) * K + channel, mask=inside, other=1.0)  # [K]
        slope = tl.load(affine_ptr + (layer * 6 + 4 + half) * K + channel, mask=inside, other=0.0)  # [K]
        offset = layer * (C1 + C2) + half * C1 + channel
        tl.store(out_scale_ptr + offset, (tl.sum(dv_y, 0) * unscale + d_log_g / g) * slope, mask=inside)
        tl.store(out_offset_ptr + offset, tl.sum(dv, 0) * unscale, mask=inside)
        tl.store(out_b2_ptr + layer * 2 * C2 + half * C2 + channel, tl.sum(d_pre, 0) * unscale, mask=channel < C2)


@triton.jit(do_not_specialize=["layers", "splits", "tiles"])
def flow_unpack_kernel(
    scale_ptr,  # [1] float32, divides all gradients
    affine_ptr,  # [L, 3, 2, K] float32
    d_w1x_ptr,  # [splits, L, HP, K] float32
    d_w1p_ptr,  # [splits, L, HP, PP] float32
    d_b1_ptr,  # [splits, L, HP] float32
    d_w2_ptr,  # [splits, L, 2, HP, K] float32
    partial_ptr,  # [tiles, L, 6, K] float32
    partial_det_ptr,  # [tiles] float32
    out_w1_ptr,  # [L, H, C1 + P] float32
    out_b1_ptr,  # [L, H] float32
    out_w2_ptr,  # [L, 2 * C2, H] float32
    out_b2_ptr,  # [L, 2 * C2] float32
    out_scale_ptr,  # [L, C] float32, of the global scale
    out_offset_ptr,  # [L, C] float32, of the global offset
    layers,  # int32, L
    splits,  # int32, parts of the rows
    tiles,  # int32, tiles of rows
    C: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,
    COND: tl.constexpr,
    BH: tl.constexpr,
    BT: tl.constexpr,
):
    """Sum up the gradients of one layer: blocks of hidden units, then the vectors."""
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    part = tl.program_id(0)
    layer = tl.program_id(1)
    unscale = 1 / tl.load(scale_ptr)
    if part < HP // BH:
        unit = part * BH + tl.arange(0, BH)
        subnet_ptrs = (d_w1x_ptr, d_b1_ptr, d_w2_ptr)
        subnet_outs = (out_w1_ptr, out_b1_ptr, out_w2_ptr)
        unpack_units(subnet_ptrs, subnet_outs, (layer, layers, splits), unit, unscale, C1, C2, K, H, HP, P, BH)
        if P > 0:
            unpack_condition(d_w1p_ptr, out_w1_ptr, (layer, layers, splits), unit, unscale, C1, H, HP, P, PP, COND, BH)
    else:
        partial_ptrs = (affine_ptr, partial_ptr, partial_det_ptr)
        vector_outs = (out_b2_ptr, out_scale_ptr, out_offset_ptr)
        unpack_vectors(partial_ptrs, vector_outs, (layer, layers, tiles), unscale, C1, C2, K, BT)


class PackedGradients(NamedTuple):
    """Gradients of the prepared weights, float32, for each of S parts of the rows and for each tile of rows."""

    w1x: Tensor  # [S, L, HP, K]
    w1p: Tensor  # [S, L, HP, PP]
    b1: Tensor  # [S, L, HP]
    w2: Tensor  # [S, L, 2, HP, K]
    partial: Tensor  # [tiles, L, 6, K]: sums of dv y | dv | d_pre, two halves each
    partial_det: Tensor  # [tiles]: sums of d_log_det


def flow_unpack(
    weights: FlowWeights,
    scale: Tensor,  # [1]
    gradients: PackedGradients,
    *,
    channels: int,
    hidden: int,
    condition_channels: int,
    kind: int,
) -> list[Tensor]:
    """Return the gradients of w1, b1, w2, b2, global_scale and global_offset, stacked; `kind` is COND."""
    splits, layers, padded, k = gradients.w1x.shape
    c2 = channels // 2
    shapes = (
        (hidden, channels - c2 + condition_channels),
        (hidden,),
        (2 * c2, hidden),
        (2 * c2,),
        (channels,),
        (channels,),
    )
    found = [torch.empty((layers, *shape), dtype=torch.float32, device=scale.device) for shape in shapes]
    with torch.cuda.device_of(scale):
        flow_unpack_kernel[(padded // BLOCK + 1, layers)](
            scale,
            weights.affine,
            *gradients,
            *found,
            layers,
            splits,
            len(gradients.partial),
            C=channels,
            K=k,
            H=hidden,
            HP=padded,
            P=condition_channels,
            PP=gradients.w1p.shape[3],
            COND=kind,
            BH=BLOCK,
            BT=PARTIAL_TILES,
            num_warps=8,
        )
    return found
