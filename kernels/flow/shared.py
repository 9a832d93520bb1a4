"""What the flow's kernels share: where a tile's rows come from, the subnet's hidden units, the permutation.

A tile is BM rows. x1 and x2 are two register tiles of K channels each; see `flow_weights` for the layout.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

# How the condition reaches the hidden units.
NONE = tl.constexpr(0)  # not at all
RASTER = tl.constexpr(1)  # tables; a tile is TH x TW neighbouring pixels of a map
TABLES = tl.constexpr(2)  # tables; rows at any positions
DENSE = tl.constexpr(3)  # a product with a dense condition


@triton.jit
def place_rows(INDEX, row, inside, sources, width, area, HAS_INDEX: tl.constexpr, GATHER: tl.constexpr):
    """Source row, line and column of each row, and whether the row may be read at all.

    With an index the position is index modulo the area of the map; GATHER says that the features, too, are read
    there. An index out of range marks its row as unreadable: nothing is read out of bounds.
    """
    if HAS_INDEX:
        index = tl.load(INDEX + row, mask=inside, other=0).to(tl.int64)
        inside = inside & (index >= 0)
        if GATHER:
            inside = inside & (index < sources)
            source = tl.where(inside, index, 0)
        else:
            inside = inside & (index < area)
            source = row.to(tl.int64)
        position = tl.where(inside, index, 0) % area
    else:
        source = row.to(tl.int64)
        position = source % area
    return source, (position // width).to(tl.int32), (position % width).to(tl.int32), inside


@triton.jit
def table_bias(TABLE, line, column, height, unit, HP: tl.constexpr):
    """A[column] + B[line] of every row, [BM, BH] float32: two rows of the table."""
    of_line = tl.load(TABLE + line[:, None] * HP + unit[None, :])
    of_column = tl.load(TABLE + (height + column)[:, None] * HP + unit[None, :])
    return of_line.to(tl.float32) + of_column.to(tl.float32)


@triton.jit
def hidden_bias(
    hidden, p, W1P, BIAS, TABLE, layer, line, column, height, width, unit,
    HP: tl.constexpr, PP: tl.constexpr, COND: tl.constexpr,
):  # fmt: skip
    """Adds W1p p + b1 to the hidden units [BM, BH] of rows at any positions."""
    if COND == TABLES:
        hidden += table_bias(TABLE + layer * (height + width) * HP, line, column, height, unit, HP)
    else:
        hidden += tl.load(BIAS + layer * HP + unit)[None, :]
        if COND == DENSE:
            w1p = tl.load(W1P + layer * HP * PP + unit[None, :] * PP + tl.arange(0, PP)[:, None])  # [PP, BH]
            hidden = tl.dot(p, w1p, hidden, input_precision="tf32x3")
    return hidden


@triton.jit
def permute_soft(
    v1, v2, PERM, STAGE,
    BM: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, NS: tl.constexpr, SPLIT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out = W_perm v, or v = W_perm^T out with the blocks of the way back; [BM, K] float32 each half.

    In 16 bits this product would dominate the error, so both sides are split into a high and a low part and three of
    the four products are summed: v_high W_high + v_low W_high + v_high W_low. BK 0: all in registers.
    """
    if BK:
        return permute_staged(v1, v2, PERM, STAGE, BM, K, BK, NS, SPLIT)
    return permute_in_registers(v1, v2, PERM, K, SPLIT, EARLY)


@triton.jit
def permute_in_registers(v1, v2, PERM, K: tl.constexpr, SPLIT: tl.constexpr, EARLY: tl.constexpr):
    """`permute_soft` without leaving the registers.

    EARLY reads all blocks before the first product, which waits for memory once; it takes the registers that a kernel
    with more to keep does not have.
    """
    dtype = PERM.dtype.element_ty
    channel = tl.arange(0, K)
    block = PERM + channel[:, None] * K + channel[None, :]  # [from, to]
    high1 = v1.to(dtype)
    high2 = v2.to(dtype)
    q11, q21 = tl.load(block), tl.load(block + 2 * K * K)
    if EARLY:
        q12, q22 = tl.load(block + K * K), tl.load(block + 3 * K * K)
        if SPLIT:
            low = block + 4 * K * K
            r11, r21 = tl.load(low), tl.load(low + 2 * K * K)
            r12, r22 = tl.load(low + K * K), tl.load(low + 3 * K * K)
    out1 = tl.dot(high1, q11, input_precision="tf32x3")
    out1 = tl.dot(high2, q21, out1, input_precision="tf32x3")
    if SPLIT:
        low1 = (v1 - high1.to(tl.float32)).to(dtype)
        low2 = (v2 - high2.to(tl.float32)).to(dtype)
        out1 = tl.dot(low1, q11, out1)
        out1 = tl.dot(low2, q21, out1)
        if not EARLY:
            low = block + 4 * K * K
            r11, r21 = tl.load(low), tl.load(low + 2 * K * K)
        out1 = tl.dot(high1, r11, out1)
        out1 = tl.dot(high2, r21, out1)
    if not EARLY:
        q12, q22 = tl.load(block + K * K), tl.load(block + 3 * K * K)
    out2 = tl.dot(high1, q12, input_precision="tf32x3")
    out2 = tl.dot(high2, q22, out2, input_precision="tf32x3")
    if SPLIT:
        out2 = tl.dot(low1, q12, out2)
        out2 = tl.dot(low2, q22, out2)
        if not EARLY:
            r12, r22 = tl.load(low + K * K), tl.load(low + 3 * K * K)
        out2 = tl.dot(high1, r12, out2)
        out2 = tl.dot(high2, r22, out2)
    return out1, out2


@triton.jit
def permute_staged(
    v1, v2, PERM, STAGE,
    BM: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, NS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """`permute_soft` for wide rows: both halves and their low parts as operands would not fit in the registers.

    The operands go through STAGE, memory of this program alone ([parts, BM, 2 K] operand, in the cache), and come back
    in blocks of BK channels, as in any matrix product. Each step has one product per half: with more, the halves' sums
    would change their layout in registers several times a step.
    """
    dtype = PERM.dtype.element_ty
    channel = tl.arange(0, K)
    m = tl.arange(0, BM)
    at = STAGE + m[:, None] * (2 * K) + channel[None, :]
    high1, high2 = v1.to(dtype), v2.to(dtype)
    tl.store(at, high1)
    tl.store(at + K, high2)
    if SPLIT:
        tl.store(at + BM * 2 * K, (v1 - high1.to(tl.float32)).to(dtype))
        tl.store(at + BM * 2 * K + K, (v2 - high2.to(tl.float32)).to(dtype))
    tl.debug_barrier()
    out1 = tl.zeros((BM, K), tl.float32)
    out2 = tl.zeros((BM, K), tl.float32)
    BLOCKS: tl.constexpr = 2 * K // BK
    for step in tl.range(0, BLOCKS * (1 + 2 * SPLIT), num_stages=NS):
        # part 0: high high, 1: low high, 2: high low
        part = step // BLOCKS
        first = step % BLOCKS * BK
        within = first % K + tl.arange(0, BK)
        operand = STAGE + part % 2 * (BM * 2 * K) + m[:, None] * (2 * K) + (first + tl.arange(0, BK))[None, :]
        block = PERM + part // 2 * (4 * K * K) + first // K * (2 * K * K) + within[:, None] * K + channel[None, :]
        operand = tl.load(operand)
        out1 = tl.dot(operand, tl.load(block), out1, input_precision="tf32x3")
        out2 = tl.dot(operand, tl.load(block + K * K), out2, input_precision="tf32x3")
    # Nobody may overwrite the stage while others still read it.
    tl.debug_barrier()
    return out1, out2


@triton.jit
def permute_hard(v1, v2, PERM_INDEX, BM: tl.constexpr, K: tl.constexpr):
    """out[i] = v[index[i]] on both halves, without a product: [BM, K] each."""
    channel = tl.arange(0, K)
    index1 = tl.load(PERM_INDEX + channel)
    index2 = tl.load(PERM_INDEX + K + channel)
    return gather_halves(v1, v2, index1, BM, K), gather_halves(v1, v2, index2, BM, K)


@triton.jit
def gather_halves(v1, v2, index, BM: tl.constexpr, K: tl.constexpr):
    """The channels `index` [K] of [v1, v2]; an index of K and above means v2."""
    within = tl.broadcast_to((index % K)[None, :], BM, K)
    return tl.where((index < K)[None, :], tl.gather(v1, within, 1), tl.gather(v2, within, 1))


@triton.jit
def tanh(a):
    """tanh through one exponential: 1 - 2 / (e^(2a) + 1); exact at both ends, NaN stays NaN."""
    return 1 - 2 / (tl.exp(2 * a) + 1)


# Programs that share a multiprocessor where rows are staged in memory; more would push each other out of the cache.
PROGRAMS_PER_MULTIPROCESSOR = 2


def staging(
    blocks: int, k: int, tiles: Mapping[str, int], operand: torch.dtype, device: torch.device
) -> tuple[int, Tensor, Tensor]:
    """Number of programs, and the memory that wide rows (tiles["BK"] > 0) are staged in: operands and state.

    With staging every program takes several blocks of rows in turn, so that the memory is bounded by the size of the
    GPU and not by the number of rows.
    """
    if not tiles["BK"]:
        nothing = torch.empty(0, dtype=operand, device=device)
        return blocks, nothing, nothing.float()
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    programs = min(blocks, PROGRAMS_PER_MULTIPROCESSOR * processors)
    parts = 2 if operand == torch.float16 else 1
    stage = torch.empty(programs, parts, tiles["BM"], 2 * k, dtype=operand, device=device)
    return programs, stage, torch.empty(programs, tiles["BM"], 2 * k, dtype=torch.float32, device=device)
