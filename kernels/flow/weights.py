"""The prepared weights of a flow: stacked over layers, split into halves, padded with zeros.

A tile in registers cannot be sliced, so the two halves of a row are two tiles of K channels each, K the power of two
that holds C1, and the permutation is four quadrants. Padding is zero throughout, so padded channels stay zero in every
layer and no inner loop needs a mask.

The positional condition is separable, W1p p(h, w) + b1 = A[w] + B[h]: two tables replace a product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The hidden channels are padded to this, a multiple of every tile size BH that the kernels are launched with.
HIDDEN_MULTIPLE = 64
# Largest number of channels whose rows stay on the chip through all layers.
MOST_CHANNELS = 256


class FlowWeights(NamedTuple):
    """L layers; C1 + C2 = C channels, K >= C1 of each half in a tile; H hidden, HP of them stored.

    "operand" is the type that matrix products read, float16 or float32.
    """

    w1x: Tensor  # [L, HP, K] operand, first linear layer on x1
    w1p: Tensor  # [L, HP, PP] operand, first linear layer on a dense condition; empty without one
    bias: Tensor  # [L, HP] float32, b1
    tables: Tensor  # [L, height + width, HP] operand, B above A (which holds b1 too); empty without positions
    codes: Tensor  # [height + width, PP / 2] operand, the positions' codes; empty without positions
    w2: Tensor  # [L, 2, K, HP] operand, second linear layer: rows of s, rows of t
    b2: Tensor  # [L, 2, K] float32
    affine: Tensor  # [L, 3, 2, K] float32: g, offset and dg / d(global scale), each of both halves
    w_perm: Tensor  # [L, 2, S, 2, 2, K, K] operand: there and back; S parts (high, low); from half, to half; from, to
    perm_index: Tensor  # [L, 2, 2, K] int32: where each channel comes from, there and back; empty unless HARD
    log_g: Tensor  # [1] float32, sum of log g over channels and layers


def tile_channels(channels: int) -> int:
    """Return K, the power of two, at least 16, that holds the larger half of `channels`."""
    return max(16, 1 << (channels - channels // 2 - 1).bit_length())


def pack(
    w1: Tensor,  # [L, H, C1 + P]
    b1: Tensor,  # [L, H]
    w2: Tensor,  # [L, 2 * C2, H]
    b2: Tensor,  # [L, 2 * C2]
    g: Tensor,  # [L, C]
    slope: Tensor,  # [L, C], derivative of g with respect to the parameter
    offset: Tensor,  # [L, C]
    w_perm: Tensor,  # [L, C, C]
    codes: tuple[Tensor, Tensor] | None,  # [height, P / 2] of the lines and [width, P / 2] of the columns
    dense: bool,
    hard: bool,
    dtype: torch.dtype,
) -> FlowWeights:
    """Prepare stacked float32 weights in plain PyTorch, in some fifty launches; `flow_pack` is tested against it.

    `codes` makes tables for positions, `dense` keeps the columns of W1 that read a dense condition; an unconditional
    flow has neither. `hard`: W_perm is a permutation matrix.
    """
    layers, hidden, inputs = w1.shape
    channels = g.shape[1]
    c2 = channels // 2
    c1, k = channels - c2, tile_channels(channels)
    padded = -(-hidden // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE
    p = inputs - c1

    w1x = w1.new_zeros(layers, padded, k, dtype=dtype)
    w1x[:, :hidden, :c1] = w1[:, :, :c1]
    bias = w1.new_zeros(layers, padded)
    bias[:, :hidden] = b1
    w1p = w1.new_zeros(layers, padded, tile_condition(p), dtype=dtype) if dense else w1.new_zeros(0, dtype=dtype)
    if dense:
        w1p[:, :hidden, :p] = w1[:, :, c1:]
    tables, packed_codes = w1.new_zeros(0, dtype=dtype), w1.new_zeros(0, dtype=dtype)
    if codes is not None:
        tables, packed_codes = _tables(w1[:, :, c1:], b1, codes, padded, dtype)

    packed_w2 = w1.new_zeros(layers, 2, k, padded, dtype=dtype)
    packed_w2[:, :, :c2, :hidden] = w2.view(layers, 2, c2, hidden)
    packed_b2 = w1.new_zeros(layers, 2, k)
    packed_b2[:, :, :c2] = b2.view(layers, 2, c2)
    affine = w1.new_zeros(layers, 3, 2, k)
    for i, values in enumerate((g, offset, slope)):
        affine[:, i, 0, :c1] = values[:, :c1]
        affine[:, i, 1, :c2] = values[:, c1:]

    perm_index = torch.empty(0, dtype=torch.int32, device=w1.device)
    packed_perm = w1.new_zeros(0, dtype=dtype)
    if hard:
        perm_index = _perm_index(w_perm)
    else:
        packed_perm = _perm_quadrants(w_perm, dtype)
    log_g = g.log().sum().reshape(1)
    return FlowWeights(
        w1x, w1p, bias, tables, packed_codes, packed_w2, packed_b2, affine, packed_perm, perm_index, log_g
    )


def _tables(
    w1p: Tensor,  # [L, H, P]
    b1: Tensor,  # [L, H]
    codes: tuple[Tensor, Tensor],
    padded: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the tables of positions and their codes."""
    lines, columns = codes
    layers, hidden, p = w1p.shape
    half = p // 2
    tables = w1p.new_zeros(layers, len(lines) + len(columns), padded, dtype=dtype)
    # The code of a position is that of its column followed by that of its line. In float64, which no switch of PyTorch
    # (TF32, autocast) makes less accurate.
    exact = w1p.double()
    tables[:, : len(lines), :hidden] = lines.double() @ exact[:, :, half:].mT
    tables[:, len(lines) :, :hidden] = columns.double() @ exact[:, :, :half].mT + b1[:, None]
    packed_codes = w1p.new_zeros(len(lines) + len(columns), tile_condition(p) // 2, dtype=dtype)
    packed_codes[:, :half] = torch.cat([lines, columns])
    return tables, packed_codes


def _perm_index(w_perm: Tensor) -> Tensor:
    """Return where each channel comes from, there and back, [L, 2, 2, K] int32."""
    layers, channels, _ = w_perm.shape
    c2, k = channels // 2, tile_channels(channels)
    c1 = channels - c2
    # out[i] = v[there[i]] and v[j] = out[back[j]]
    source = torch.stack([w_perm.argmax(dim=2), w_perm.argmax(dim=1)], dim=1).int()  # [L, 2, C]
    # Channels of the second half stand K further on, behind the first half's padding; padding comes from padding.
    source = torch.where(source < c1, source, source - c1 + k)
    perm_index = torch.full((layers, 2, 2, k), 2 * k - 1, dtype=torch.int32, device=w_perm.device)
    perm_index[:, :, 0, :c1] = source[:, :, :c1]
    perm_index[:, :, 1, :c2] = source[:, :, c1:]
    return perm_index


def _perm_quadrants(w_perm: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the quadrants of W_perm, there and back, in one or two parts, [L, 2, S, 2, 2, K, K]."""
    layers, channels, _ = w_perm.shape
    c2, k = channels // 2, tile_channels(channels)
    sizes = (channels - c2, c2)
    quadrants = w_perm.new_zeros(layers, 2, 2, 2, k, k)
    there_and_back = torch.stack([w_perm.mT, w_perm], dim=1)  # out = v W_perm^T and v = out W_perm
    for i, from_half in enumerate(there_and_back.split(sizes, dim=2)):
        for j, block in enumerate(from_half.split(sizes, dim=3)):
            quadrants[:, :, i, j, : sizes[i], : sizes[j]] = block
    high = quadrants.to(dtype)
    parts = [high, (quadrants - high.float()).to(dtype)] if dtype == torch.float16 else [high]
    return torch.stack(parts, dim=2)


def tile_condition(channels: int) -> int:
    """Return PP, the power of two, at least 32, that holds the condition; its halves are products of their own."""
    return max(32, 1 << (channels - 1).bit_length())


def saved_stride(channels: int) -> int:
    """Return CS, the channels of a saved half row; a multiple of 8, so that 16-bit rows start at 16 bytes."""
    return -(-(channels - channels // 2) // 8) * 8


def most_channels_with_gradients(operand: str) -> int:
    """Return the most channels that the backward takes; float32 operands of wider rows do not fit in registers."""
    return MOST_CHANNELS if operand == "float16" else 64
