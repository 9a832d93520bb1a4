"""The permutation of a flow's layer on a tile of rows, and its inverse.

    out = W_perm v,        v = W_perm^T out

x1 and x2, the two halves of a row, are two register tiles of K channels each, so W_perm is four blocks of [K, K]; see
`weights.py` for their layout. A hard permutation moves channels without a product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def permute(
    v1,  # [BM, K] float32
    v2,  # [BM, K] float32
    layer,  # int
    permutation,  # perm_ptr [L, 2, S, 2, 2, K, K] operand, perm_index_ptr [L, 2, 2, K] int32, stage_ptr
    BACK: tl.constexpr,  # 0: out = W_perm v; 1: v = W_perm^T out
    HARD: tl.constexpr,
    BM: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    NS: tl.constexpr,
):
    """Return the permuted halves, [BM, K] float32 each."""
    perm_ptr, perm_index_ptr, stage_ptr = permutation
    if HARD:
        out1, out2 = permute_hard(v1, v2, perm_index_ptr + (layer * 4 + 2 * BACK) * K, BM, K)
    else:
        PARTS: tl.constexpr = 1 + (perm_ptr.dtype.element_ty == tl.float16)
        blocks_ptr = perm_ptr + (layer * 2 + BACK) * (4 * PARTS) * K * K
        if BK:
            out1, out2 = permute_staged(v1, v2, blocks_ptr, stage_ptr, BM, K, BK, NS)
        else:
            # The backward has no registers left for blocks that are read before they are used.
            out1, out2 = permute_in_registers(v1, v2, blocks_ptr, K, BACK == 0)
    return out1, out2


@triton.jit
def permute_in_registers(
    v1,  # [BM, K] float32
    v2,  # [BM, K] float32
    blocks_ptr,  # [S, 2, 2, K, K] operand
    K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Return the product of both halves with the blocks, [BM, K] float32 each, without leaving the registers.

    In 16 bits this product would dominate the error, so both sides are split into a high and a low part and three of
    the four products are summed: v_high W_high + v_low W_high + v_high W_low. EARLY reads all blocks before the first
    product, which waits for memory once but takes more registers.
    """
    dtype = blocks_ptr.dtype.element_ty
    SPLIT: tl.constexpr = dtype == tl.float16
    channel = tl.arange(0, K)
    block_ptr = blocks_ptr + channel[:, None] * K + channel[None, :]  # [from, to]
    high1 = v1.to(dtype)
    high2 = v2.to(dtype)
    q11, q21 = tl.load(block_ptr), tl.load(block_ptr + 2 * K * K)
    if EARLY:
        q12, q22 = tl.load(block_ptr + K * K), tl.load(block_ptr + 3 * K * K)
        if SPLIT:
            low_ptr = block_ptr + 4 * K * K
            r11, r21 = tl.load(low_ptr), tl.load(low_ptr + 2 * K * K)
            r12, r22 = tl.load(low_ptr + K * K), tl.load(low_ptr + 3 * K * K)
    out1 = tl.dot(high1, q11, input_precision="tf32x3")
    out1 = tl.dot(high2, q21, out1, input_precision="tf32x3")
    if SPLIT:
        low1 = (v1 - high1.to(tl.float32)).to(dtype)
        low2 = (v2 - high2.to(tl.float32)).to(dtype)
        out1 = tl.dot(low1, q11, out1)
        out1 = tl.dot(low2, q21, out1)
        if not EARLY:
            low_ptr = block_ptr + 4 * K * K
            r11, r21 = tl.load(low_ptr), tl.load(low_ptr + 2 * K * K)
        out1 = tl.dot(high1, r11, out1)
        out1 = tl.dot(high2, r21, out1)
    if not EARLY:
        q12, q22 = tl.load(block_ptr + K * K), tl.load(block_ptr + 3 * K * K)
    out2 = tl.dot(high1, q12, input_precision="tf32x3")
    out2 = tl.dot(high2, q22, out2, input_precision="tf32x3")
    if SPLIT:
        out2 = tl.dot(low1, q12, out2)
        out2 = tl.dot(low2, q22, out2)
        if not EARLY:
            r12, r22 = tl.load(low_ptr + K * K), tl.load(low_ptr + 3 * K * K)
        out2 = tl.dot(high1, r12, out2)
        out2 = tl.dot(high2, r22, out2)
    return out1, out2


@triton.jit
def permute_staged(
    v1,  # [BM, K] float32
    v2,  # [BM, K] float32
    blocks_ptr,  # [S, 2, 2, K, K] operand
    stage_ptr,  # [S, BM, 2 * K] operand, memory of this program alone
    BM: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    NS: tl.constexpr,
):
    """Return what `permute_in_registers` returns, for wide rows, whose operands would not fit in the registers.

    The operands go through memory (in the cache) and come back in blocks of BK channels, as in any matrix product. Each
    step has one product per half: with more, the halves' sums would change their layout in registers several times a
    step.
    """
    dtype = blocks_ptr.dtype.element_ty
    SPLIT: tl.constexpr = dtype == tl.float16
    channel = tl.arange(0, K)
    m = tl.arange(0, BM)
    tile_ptr = stage_ptr + m[:, None] * (2 * K) + channel[None, :]
    high1, high2 = v1.to(dtype), v2.to(dtype)
    tl.store(tile_ptr, high1)
    tl.store(tile_ptr + K, high2)
    if SPLIT:
        tl.store(tile_ptr + BM * 2 * K, (v1 - high1.to(tl.float32)).to(dtype))
        tl.store(tile_ptr + BM * 2 * K + K, (v2 - high2.to(tl.float32)).to(dtype))
    tl.debug_barrier()
    out1 = tl.zeros((BM, K), tl.float32)
    out2 = tl.zeros((BM, K), tl.float32)
    BLOCKS: tl.constexpr = 2 * K // BK
    for step in tl.range(0, BLOCKS * (1 + 2 * SPLIT), num_stages=NS):
        # part 0: high high, 1: low high, 2: high low
        part = step // BLOCKS
        first = step % BLOCKS * BK
        within = first % K + tl.arange(0, BK)
        operand_ptr = stage_ptr + part % 2 * (BM * 2 * K) + m[:, None] * (2 * K) + (first + tl.arange(0, BK))[None, :]
        block_ptr = (
            blocks_ptr + part // 2 * (4 * K * K) + first // K * (2 * K * K) + within[:, None] * K + channel[None, :]
        )
        operand = tl.load(operand_ptr)  # [BM, BK]
        out1 = tl.dot(operand, tl.load(block_ptr), out1, input_precision="tf32x3")
        out2 = tl.dot(operand, tl.load(block_ptr + K * K), out2, input_precision="tf32x3")
    # No thread may overwrite the stage while others still read it.
    tl.debug_barrier()
    return out1, out2


@triton.jit
def permute_hard(
    v1,  # [BM, K] float32
    v2,  # [BM, K] float32
    index_ptr,  # [2, K] int32
    BM: tl.constexpr,
    K: tl.constexpr,
):
    """Return out[i] = v[index[i]] of both halves, [BM, K] float32 each, without a product."""
    channel = tl.arange(0, K)
    index1 = tl.load(index_ptr + channel)
    index2 = tl.load(index_ptr + K + channel)
    return gather_halves(v1, v2, index1, BM, K), gather_halves(v1, v2, index2, BM, K)


@triton.jit
def gather_halves(
    v1,  # [BM, K] float32
    v2,  # [BM, K] float32
    index,  # [K] int32
    BM: tl.constexpr,
    K: tl.constexpr,
):
    """Return the channels `index` of [v1, v2], [BM, K] float32; an index of K and above means v2."""
    within = tl.broadcast_to((index % K)[None, :], BM, K)
    return tl.where((index < K)[None, :], tl.gather(v1, within, 1), tl.gather(v2, within, 1))
