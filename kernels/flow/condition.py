"""The condition of the flow's rows: where they lie on their map, and its share of the subnet's hidden units.

hidden = W1x x1 + W1p p + b1,        for positions W1p p(h, w) + b1 = A[w] + B[h]
"""

from __future__ import annotations

import triton
import triton.language as tl

# COND: how the condition reaches the hidden units.
NONE = tl.constexpr(0)  # not at all
RASTER = tl.constexpr(1)  # tables; a tile is TH x TW neighboring pixels of a map
TABLES = tl.constexpr(2)  # tables; rows at any positions
DENSE = tl.constexpr(3)  # a product with a dense condition


@triton.jit
def locate_rows(
    index_ptr,  # [N] int64; read if HAS_INDEX
    row,  # [BM] int64
    inside,  # [BM] bool, the row exists
    sources,  # int, rows of the features
    width,  # int, of a map
    area,  # int, of a map
    HAS_INDEX: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Return source row, line and column of each row, and whether the row may be read at all, [BM] each.

    With an index the position is index modulo the area of the map; with GATHER the features are read at the index,
    too. An index out of range marks its row as unreadable: nothing is read out of bounds.
    """
    if HAS_INDEX:
        index = tl.load(index_ptr + row, mask=inside, other=0).to(tl.int64)
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
def raster_rows(
    tile,  # int, number of the tile
    height,  # int, of a map
    width,  # int, of a map
    BM: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
):
    """Return the rows of a tile of TH x TW pixels, whether they are inside the map, and the tile's top and left."""
    across, down = tl.cdiv(width, TW), tl.cdiv(height, TH)
    image = tile // (across * down)
    top = (tile // across) % down * TH
    left = tile % across * TW
    m = tl.arange(0, BM)
    line, column = top + m // TW, left + m % TW  # [BM] each
    inside = (line < height) & (column < width)
    row = tl.cast(image, tl.int64) * (height * width) + line * width + column
    return row, inside, top, left


@triton.jit
def raster_tables(
    corner,  # top and left of the tile
    height,  # int, of a map
    width,  # int, of a map
    BM: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    KT: tl.constexpr,
):
    """Return which table rows make the bias of a tile by a small product: TH rows of B and TW rows of A.

    bool [BM, KT], which two each row of the tile adds up; int [KT], which rows of the table they are; bool [KT],
    whether they exist.
    """
    top, left = corner
    m = tl.arange(0, BM)
    entry = tl.arange(0, KT)
    chosen = (entry[None, :] == (m // TW)[:, None]) | (entry[None, :] == (TH + m % TW)[:, None])
    table_row = tl.where(entry < TH, top + entry, height + left + entry - TH)
    exists = tl.where(entry < TH, table_row < height, (entry < TH + TW) & (table_row < height + width))
    return chosen, table_row, exists


@triton.jit
def load_condition(
    condition_ptr,  # [R, P] any float
    source,  # [BM] int64
    inside,  # [BM] bool
    P: tl.constexpr,
    PP: tl.constexpr,
):
    """Return the dense condition of each row, [BM, PP]."""
    entry = tl.arange(0, PP)
    mask = inside[:, None] & (entry < P)[None, :]
    return tl.load(condition_ptr + source[:, None] * P + entry[None, :], mask=mask, other=0.0)


@triton.jit
def table_bias(
    table_ptr,  # [height + width, HP] operand, B above A
    line,  # [BM] int32
    column,  # [BM] int32
    height,  # int
    unit,  # [BH] int
    HP: tl.constexpr,
):
    """Return A[column] + B[line] of every row, two rows of the table, [BM, BH] float32."""
    of_line = tl.load(table_ptr + line[:, None] * HP + unit[None, :])
    of_column = tl.load(table_ptr + (height + column)[:, None] * HP + unit[None, :])
    return of_line.to(tl.float32) + of_column.to(tl.float32)


@triton.jit
def add_condition(
    hidden,  # [BM, BH] float32
    layer,  # int
    unit,  # [BH] int
    condition,  # `raster_tables` (the first as operand) if RASTER, else p, line and column; then height and width
    weight_ptrs,  # w1p_ptr, bias_ptr, table_ptr
    HP: tl.constexpr,
    PP: tl.constexpr,
    COND: tl.constexpr,
):
    """Return hidden + W1p p + b1, [BM, BH] float32."""
    w1p_ptr, bias_ptr, table_ptr = weight_ptrs
    if COND == RASTER:
        chosen, table_row, exists, height, width = condition
        table = tl.load(
            table_ptr + (layer * (height + width) + table_row)[:, None] * HP + unit[None, :],
            mask=exists[:, None],
            other=0.0,
        )  # [KT, BH]
        hidden = tl.dot(chosen, table, hidden, input_precision="tf32x3")
    else:
        p, line, column, height, width = condition
        if COND == TABLES:
            hidden += table_bias(table_ptr + layer * (height + width) * HP, line, column, height, unit, HP)
        else:
            hidden += tl.load(bias_ptr + layer * HP + unit)[None, :]
            if COND == DENSE:
                w1p = tl.load(w1p_ptr + layer * HP * PP + unit[None, :] * PP + tl.arange(0, PP)[:, None])  # [PP, BH]
                hidden = tl.dot(p, w1p, hidden, input_precision="tf32x3")
    return hidden
