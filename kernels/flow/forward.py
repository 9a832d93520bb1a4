"""The whole flow in one launch: a tile of rows goes through all coupling layers without leaving the chip.

Equations: fastbgad/reference/flow.py and log_likelihood.py. Source: Yao et al., CVPR 2023; FrEIA's AllInOneBlock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shared import DENSE, NONE, RASTER, TABLES, hidden_bias, permute_hard, permute_soft, place_rows, staging, tanh
from .weights import MOST_CHANNELS, FlowWeights, saved_stride, tile_channels

LOG_2PI = tl.constexpr(math.log(2 * math.pi))


@triton.jit(do_not_specialize=["rows", "sources", "tiles", "layers", "clamp", "inner_clamp"])
def flow_forward_kernel(
    X, INDEX, CONDITION, W1X, W1P, BIAS, TABLE, W2, B2, AFFINE, PERM, PERM_INDEX, LOG_G, STAGE, STATE,
    LP, LOG_DET, Z, V, SAVED_X, SAVED_Y2, SAVED_S,
    rows, sources, row_stride, height, width, tiles, layers, clamp, inner_clamp,
    C: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, P: tl.constexpr, PP: tl.constexpr,
    COND: tl.constexpr, HAS_INDEX: tl.constexpr, GATHER: tl.constexpr, HARD: tl.constexpr, SPLIT: tl.constexpr,
    WANT_Z: tl.constexpr, SAVE: tl.constexpr, CS: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, NS: tl.constexpr, TW: tl.constexpr, KT: tl.constexpr,
):  # fmt: skip
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    TH: tl.constexpr = BM // TW
    dtype = W1X.dtype.element_ty
    channel = tl.arange(0, K)
    area = height * width

    if BK:
        # Wide rows live in memory of their program (in the cache) and only visit the registers.
        parts: tl.constexpr = 1 + SPLIT
        STAGE += tl.program_id(0).to(tl.int64) * (BM * 2 * K * parts)
        state = STATE + tl.program_id(0).to(tl.int64) * (BM * 2 * K)
        state += tl.arange(0, BM)[:, None] * (2 * K) + channel[None, :]

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        if COND == RASTER:
            # A tile is TH x TW pixels: TH rows of B and TW rows of A make the bias of all its rows by a small product.
            across, down = tl.cdiv(width, TW), tl.cdiv(height, TH)
            image = tile // (across * down)
            top = (tile // across) % down * TH
            left = tile % across * TW
            m = tl.arange(0, BM)
            line, column = top + m // TW, left + m % TW
            inside = (line < height) & (column < width)
            row = tl.cast(image, tl.int64) * area + line * width + column
            source = row
            entry = tl.arange(0, KT)
            one_hot = ((entry[None, :] == (m // TW)[:, None]) | (entry[None, :] == (TH + m % TW)[:, None])).to(dtype)
            table_row = tl.where(entry < TH, top + entry, height + left + entry - TH)
            table_inside = tl.where(entry < TH, table_row < height, (entry < TH + TW) & (table_row < height + width))
        else:
            row = tl.cast(tile, tl.int64) * BM + tl.arange(0, BM)
            written = row < rows
            source, line, column, inside = place_rows(INDEX, row, written, sources, width, area, HAS_INDEX, GATHER)
            if COND == DENSE:
                entry = tl.arange(0, PP)
                p = tl.load(
                    CONDITION + source[:, None] * P + entry[None, :],
                    mask=inside[:, None] & (entry < P)[None, :], other=0.0,
                ).to(dtype)  # fmt: skip
            else:
                p = tl.zeros((BM, 16), dtype)  # never used

        at = X + source[:, None] * row_stride + channel[None, :]
        x1 = tl.load(at, mask=inside[:, None] & (channel < C1)[None, :], other=0.0).to(tl.float32)  # [BM, K]
        x2 = tl.load(at + C1, mask=inside[:, None] & (channel < C2)[None, :], other=0.0).to(tl.float32)
        # In 16 bits a feature beyond the largest float16 would turn into another number; such a row is given up as NaN.
        # So is one with an infinite or NaN feature. Rows never mix, so the others are not touched.
        largest = 65504.0 if dtype == tl.float16 else 3.4028235e38
        usable = (tl.sum((tl.abs(x1) <= largest).to(tl.int32), 1) == K) & (
            tl.sum((tl.abs(x2) <= largest).to(tl.int32), 1) == K
        )
        log_det = tl.zeros((BM,), tl.float32)
        if SAVE:
            saved_layer = tl.cast(rows, tl.int64) * CS
            saved = row[:, None] * CS + channel[None, :]
            in_saved = written[:, None] & (channel < CS)[None, :]

        if BK:
            tl.store(state, x1)
            tl.store(state + K, x2)
            tl.debug_barrier()

        for layer in range(layers):
            if BK:
                x1 = tl.load(state)
            x1_operand = x1.to(dtype)
            if SAVE:
                tl.store(SAVED_X + layer * 2 * saved_layer + saved, x1_operand, mask=in_saved)
                if BK:
                    x2 = tl.load(state + K)
                tl.store(SAVED_X + (layer * 2 + 1) * saved_layer + saved, x2.to(dtype), mask=in_saved)
            # pre = W2 relu(W1 [x1; p] + b1) + b2
            pre_s = tl.zeros((BM, K), tl.float32) + tl.load(B2 + layer * 2 * K + channel)[None, :]
            pre_t = tl.zeros((BM, K), tl.float32) + tl.load(B2 + (layer * 2 + 1) * K + channel)[None, :]
            for first in tl.range(0, H, BH, num_stages=NS):
                unit = first + tl.arange(0, BH)
                w1 = tl.load(W1X + layer * HP * K + unit[None, :] * K + channel[:, None])  # [K, BH]
                hidden = tl.dot(x1_operand, w1, input_precision="tf32x3")  # [BM, BH]
                if COND == RASTER:
                    table = tl.load(
                        TABLE + (layer * (height + width) + table_row)[:, None] * HP + unit[None, :],
                        mask=table_inside[:, None], other=0.0,
                    )  # fmt: skip
                    hidden = tl.dot(one_hot, table, hidden, input_precision="tf32x3")
                else:
                    hidden = hidden_bias(
                        hidden, p, W1P, BIAS, TABLE, layer, line, column, height, width, unit, HP, PP, COND
                    )
                hidden = tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL).to(dtype)
                w2 = W2 + layer * 2 * K * HP + channel[None, :] * HP + unit[:, None]  # [BH, K]
                pre_s = tl.dot(hidden, tl.load(w2), pre_s, input_precision="tf32x3")
                pre_t = tl.dot(hidden, tl.load(w2 + K * HP), pre_t, input_precision="tf32x3")

            # s = clamp tanh(0.1 pre_s) or clamp tanh(0.1 pre_s / clamp); y = [x1, x2 exp(s) + 0.1 pre_t]
            s = clamp * tanh(0.1 * inner_clamp * pre_s)
            if BK:
                x1 = tl.load(state)
                x2 = tl.load(state + K)
            # What left the range of the operands could hide behind the ReLU and come back: here it shows.
            s = tl.where(tl.abs(x1) <= largest, s, float("nan"))
            log_det += tl.sum(s, 1)
            x2 = x2 * tl.exp(s) + 0.1 * pre_t
            if SAVE:
                tl.store(SAVED_Y2 + layer * saved_layer + saved, x2.to(dtype), mask=in_saved)
                tl.store(SAVED_S + layer * saved_layer + saved, s, mask=in_saved)
            # out = W_perm (g y + offset)
            affine = AFFINE + layer * 6 * K + channel
            x1 = x1 * tl.load(affine)[None, :] + tl.load(affine + 2 * K)[None, :]
            x2 = x2 * tl.load(affine + K)[None, :] + tl.load(affine + 3 * K)[None, :]
            # The last permutation is a rotation: it does not change |z|.
            if layer < layers - 1:
                if HARD:
                    x1, x2 = permute_hard(x1, x2, PERM_INDEX + layer * 4 * K, BM, K)
                else:
                    x1, x2 = permute_soft(
                        x1, x2, PERM + layer * 2 * (4 + 4 * SPLIT) * K * K, STAGE, BM, K, BK, NS, SPLIT, True
                    )
            if BK:
                tl.debug_barrier()
                tl.store(state, x1)
                tl.store(state + K, x2)
                tl.debug_barrier()
        if BK:
            x1 = tl.load(state)
            x2 = tl.load(state + K)

        # lp = (-C/2 ln(2 pi) - 1/2 |z|^2 + log_det) / C
        log_det += tl.load(LOG_G)
        lp = (log_det - 0.5 * (tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1))) / C - 0.5 * LOG_2PI
        nan = float("nan")
        valid = inside & usable
        if COND == RASTER:
            written = inside
        tl.store(LP + row, tl.where(valid, lp, nan), mask=written)
        tl.store(LOG_DET + row, tl.where(valid, log_det, nan), mask=written)
        in_first = written[:, None] & (channel < C1)[None, :]
        in_second = written[:, None] & (channel < C2)[None, :]
        if SAVE:
            at = V + row[:, None] * C + channel[None, :]
            tl.store(at, x1, mask=in_first)
            tl.store(at + C1, x2, mask=in_second)
        if WANT_Z:
            if HARD:
                x1, x2 = permute_hard(x1, x2, PERM_INDEX + (layers - 1) * 4 * K, BM, K)
            else:
                x1, x2 = permute_soft(
                    x1, x2, PERM + (layers - 1) * 2 * (4 + 4 * SPLIT) * K * K, STAGE, BM, K, BK, NS, SPLIT, True
                )
            at = Z + row[:, None] * C + channel[None, :]
            tl.store(at, tl.where(valid[:, None], x1, nan), mask=in_first)
            tl.store(at + C1, tl.where(valid[:, None], x2, nan), mask=in_second)
        if BK:
            # The next tile overwrites the state that others may still be reading.
            tl.debug_barrier()


@dataclass(frozen=True)
class Rows:
    """Where a flow's rows come from.

    - features [R, C]; without an index the rows are all of them, in raster order of maps of height x width;
    - index [N] and gather: the rows are features[index], at position index modulo height * width;
    - index [N] without gather: the rows are all features (N = R) and the index is their positions;
    - condition [R, P]: dense, takes the place of positions; gathered along with the features.
    """

    features: Tensor
    height: int = 1
    width: int = 1
    index: Tensor | None = None
    gather: bool = False
    condition: Tensor | None = None

    @property
    def count(self) -> int:
        """N, the number of rows that go through the flow."""
        return len(self.features) if self.index is None else len(self.index)

    def slice(self, start: int, stop: int) -> Rows:
        """The rows from `start` to `stop`; rows of whole maps are then given by their index."""
        if self.index is None and self.condition is None and self.height * self.width > 1:
            index = torch.arange(start, min(stop, self.count), device=self.features.device)
            return replace(self, index=index, gather=True)
        if self.gather:
            assert self.index is not None
            return replace(self, index=self.index[start:stop])
        return replace(
            self,
            features=self.features[start:stop],
            index=None if self.index is None else self.index[start:stop],
            condition=None if self.condition is None else self.condition[start:stop],
        )


class Saved(NamedTuple):
    """What the forward keeps for the backward: 10 bytes per channel pair, row and layer in 16 bits.

    CS is C1 rounded up to a multiple of 8.
    """

    v: Tensor  # [N, C] float32, g y + offset of the last layer
    x: Tensor  # [L, 2, N, CS] operand, every layer's input
    y2: Tensor  # [L, N, CS] operand, x2 exp(s) + a_t
    s: Tensor  # [L, N, CS] float32


class ForwardResult(NamedTuple):
    """Log-likelihood per dimension and log-determinant, [N] float32; z [N, C] and the saved tensors where asked for.

    A row whose features or whose index cannot be used has NaN; no other row is touched by it.
    """

    lp: Tensor
    log_det: Tensor
    z: Tensor | None
    saved: Saved | None


def tile_key(channels: int, operand: str, raster: bool = False) -> str:
    """The key of a flow in the tile configurations, e.g. "C64 float16 raster": channels of a tile and their type."""
    return f"C{2 * tile_channels(channels)} {operand}" + (" raster" if raster else "")


def is_raster(rows: Rows, weights: FlowWeights) -> bool:
    """Whether the rows are whole maps with positions, which inference cuts into tiles of neighbouring pixels."""
    return rows.index is None and rows.condition is None and bool(weights.tables.numel())


def condition_kind(rows: Rows, weights: FlowWeights, raster: bool) -> int:
    """One of NONE, RASTER, TABLES and DENSE."""
    if rows.condition is not None:
        return int(DENSE)
    if not weights.tables.numel():
        return int(NONE)
    return int(RASTER) if raster else int(TABLES)


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
    """Launches the kernel on N rows.

    Args:
        rows: the features (float32, float16 or bfloat16, unit stride along C) and their condition.
        weights: from `flow_weights.pack`; their type is that of the matrix products.
        channels, hidden: C and H.
        clamp, scaled_tanh: s = clamp tanh(a), or clamp tanh(a / clamp).
        want_z: return the latent.
        save: return what the backward needs.
        tiles: BM, BH, BK (0: rows stay in registers), num_warps, num_stages.
    """
    x, index = rows.features, rows.index
    assert x.shape[1:] == (channels,)
    assert channels <= MOST_CHANNELS
    assert x.stride(1) == 1
    count, layers, k = rows.count, weights.b2.shape[0], weights.b2.shape[2]
    operand = weights.w1x.dtype

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    lp, log_det, nothing = empty(count), empty(count), empty(0)
    z = empty(count, channels) if want_z else None
    saved = None
    if save:
        stride = saved_stride(channels)
        saved = Saved(
            empty(count, channels),
            empty(layers, 2, count, stride, dtype=operand),
            empty(layers, count, stride, dtype=operand),
            empty(layers, count, stride),
        )
    if not count:
        return ForwardResult(lp, log_det, z, saved)

    # Whole maps are cut into tiles of neighbouring pixels; training rows and dense conditions into runs of rows.
    kind = condition_kind(rows, weights, raster=is_raster(rows, weights) and not save)
    block_rows, block_columns = raster_tile(tiles["BM"])
    if kind == RASTER:
        maps = count // (rows.height * rows.width)
        blocks = maps * triton.cdiv(rows.width, block_columns) * triton.cdiv(rows.height, block_rows)
    else:
        blocks = triton.cdiv(count, tiles["BM"])
    programs, stage, state = staging(blocks, k, tiles, operand, x.device)
    condition = rows.condition if rows.condition is not None else nothing
    with torch.cuda.device_of(x):
        flow_forward_kernel[(programs,)](
            x, index if index is not None else nothing, condition, weights.w1x, weights.w1p, weights.bias,
            weights.tables, weights.w2, weights.b2, weights.affine, weights.w_perm, weights.perm_index, weights.log_g,
            stage, state,
            lp, log_det, z if z is not None else nothing, *(saved if saved is not None else (nothing,) * 4),
            count, len(x), x.stride(0), rows.height, rows.width, blocks, layers, clamp,
            1 / clamp if scaled_tanh else 1.0,
            C=channels, K=k, H=hidden, HP=weights.bias.shape[1],
            P=condition.shape[1] if rows.condition is not None else 0,
            PP=weights.w1p.shape[2] if rows.condition is not None else 0,
            COND=kind, HAS_INDEX=index is not None, GATHER=rows.gather, HARD=bool(weights.perm_index.numel()),
            SPLIT=operand == torch.float16, WANT_Z=want_z, SAVE=save, CS=saved_stride(channels),
            BM=tiles["BM"], BH=tiles["BH"], BK=tiles["BK"], NS=tiles["num_stages"], TW=block_columns,
            KT=max(16, triton.next_power_of_2(block_rows + block_columns)),
            num_warps=tiles["num_warps"], num_stages=tiles["num_stages"],
        )  # fmt: skip
    return ForwardResult(lp, log_det, z, saved)


def raster_tile(rows: int) -> tuple[int, int]:
    """Height and width of a tile of `rows` pixels: square or twice as wide as high, for the shortest pair of edges."""
    width = 1 << ((rows.bit_length() - 1) + 1) // 2
    return rows // width, width
