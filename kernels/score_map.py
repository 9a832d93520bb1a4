"""The anomaly map of an image and its maximum from log-likelihood maps per level, in one pass over the output.

    score = offset - sum over levels of upsample(exp(lp_l - level_max_l))

Each program computes one tile of one image's map: for every pixel it reads the four neighbors at every level from the
cache, so no level is ever upsampled in memory. The equation is that of `fastbgad.reference.score_map`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile_sizes import tiles as chosen_tiles

INT32_LIMIT = 2**31


@triton.jit
def source_neighbors(
    position,  # [B] int, positions in the output, 0 to target - 1
    length,  # int, size of the source
    target,  # int, size of the output
):
    """Return the lower and upper source neighbor of each position, and the weight of the upper one.

        position (length - 1) / (target - 1) = low + weight

    Computed in integers: a quotient in floating point would miss a source that it should hit exactly.
    """
    steps = tl.maximum(target - 1, 1)
    scaled = position * (length - 1)
    low = scaled // steps
    weight = (scaled - low * steps).to(tl.float32) / steps.to(tl.float32)
    return low, tl.minimum(low + 1, length - 1), weight


@triton.jit
def load_density(
    lp_ptr,  # [B, h, w] any float, at the image
    line_offset,  # [TH, 1] int, where the neighbor's line begins
    column,  # [1, TW] int
    level_max,  # scalar float32
):
    """Return exp(lp - level_max) of one neighbor of every pixel, float32 [TH, TW]."""
    return tl.exp(tl.load(lp_ptr + line_offset + column).to(tl.float32) - level_max)


@triton.jit(do_not_specialize=["height"])
def score_map_kernel(
    level_ptrs,  # per level [B, h, w] any float
    heights,  # per level int32, h
    widths,  # per level int32, w
    level_max_ptr,  # [L] float32
    offset_ptr,  # [1] float32
    anomaly_map_ptr,  # [B, H, W] float32
    tile_max_ptr,  # [B, tiles] float32
    height,  # int32, H
    width,  # int32, W
    INDEX_TYPE: tl.constexpr,  # tl.int64 where a product of two sizes passes 2^31
    TH: tl.constexpr,
    TW: tl.constexpr,
):
    tiles_across = tl.cdiv(width, TW)
    tiles = tiles_across * tl.cdiv(height, TH)
    image = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    line = (tile // tiles_across) * TH + tl.arange(0, TH)  # [TH]
    column = (tile % tiles_across) * TW + tl.arange(0, TW)  # [TW]
    # Beyond the edge the last pixel is computed again: no load needs a mask, and the tile's maximum stays right.
    read_line = tl.minimum(line, height - 1).to(INDEX_TYPE)  # [TH]
    read_column = tl.minimum(column, width - 1).to(INDEX_TYPE)  # [TW]

    total = tl.zeros([TH, TW], tl.float32)
    for i in tl.static_range(len(level_ptrs)):
        top, bottom, down = source_neighbors(read_line, heights[i], height)
        left, right, across = source_neighbors(read_column, widths[i], width)
        lp_ptr = level_ptrs[i] + image.to(tl.int64) * heights[i] * widths[i]
        level_max = tl.load(level_max_ptr + i)
        above, below = (top * widths[i])[:, None], (bottom * widths[i])[:, None]  # [TH, 1]
        left, right, down, across = left[None, :], right[None, :], down[:, None], across[None, :]
        top_left = load_density(lp_ptr, above, left, level_max)  # [TH, TW]
        top_right = load_density(lp_ptr, above, right, level_max)  # [TH, TW]
        bottom_left = load_density(lp_ptr, below, left, level_max)  # [TH, TW]
        bottom_right = load_density(lp_ptr, below, right, level_max)  # [TH, TW]
        # Both neighbors always take part, so a NaN spreads as it does in the reference, even with weight 0.
        at_left = top_left * (1 - down) + bottom_left * down  # [TH, TW]
        at_right = top_right * (1 - down) + bottom_right * down  # [TH, TW]
        total += at_left * (1 - across) + at_right * across

    score = tl.load(offset_ptr) - total  # [TH, TW]
    map_ptr = anomaly_map_ptr + image.to(tl.int64) * height * width
    pixel_ptr = map_ptr + (read_line * width)[:, None] + read_column[None, :]  # [TH, TW]
    tl.store(pixel_ptr, score, mask=(line < height)[:, None] & (column < width)[None, :])
    # tl.max ignores NaN.
    broken = tl.max(tl.max((score != score).to(tl.int32), axis=1), axis=0)
    largest = tl.max(tl.max(score, axis=1), axis=0)
    tl.store(tile_max_ptr + tl.program_id(0), tl.where(broken != 0, float("nan"), largest))


def score_map(
    levels: Sequence[Tensor],  # each [B, h_l, w_l] float32, float16 or bfloat16
    size: tuple[int, int],
    level_max: Tensor,  # [L] float32
    offset: Tensor,  # one float32
    tiles: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the anomaly map [B, H, W] and the image maximum [B], float32; `tiles` overrides the chosen tile sizes."""
    height, width = size
    assert level_max.shape == (len(levels),)
    assert level_max.dtype == offset.dtype == torch.float32
    assert offset.numel() == 1
    assert min(height, width, *(min(lp.shape[1:]) for lp in levels)) > 0
    device, batch = levels[0].device, len(levels[0])
    levels = tuple(lp.contiguous() for lp in levels)
    heights, widths = tuple(lp.shape[1] for lp in levels), tuple(lp.shape[2] for lp in levels)

    chosen = dict(chosen_tiles("score_map", "map", device) if tiles is None else tiles)
    count = triton.cdiv(height, chosen["TH"]) * triton.cdiv(width, chosen["TW"])
    assert batch * count < INT32_LIMIT
    anomaly_map = torch.empty(batch, height, width, device=device)
    tile_max = torch.empty(batch, count, device=device)
    if batch:
        with torch.cuda.device_of(levels[0]):
            score_map_kernel[(batch * count,)](
                levels,
                heights,
                widths,
                level_max.contiguous(),
                offset,
                anomaly_map,
                tile_max,
                height,
                width,
                INDEX_TYPE=_index_type(heights, widths, height, width),
                **chosen,
            )
    return anomaly_map, tile_max.amax(dim=1)


def _index_type(heights: Sequence[int], widths: Sequence[int], height: int, width: int) -> tl.dtype:
    """Return the integer type that holds the products of positions and sizes."""
    products = [
        height * width,
        *(h * w for h, w in zip(heights, widths, strict=True)),
        *(h * height for h in heights),
        *(w * width for w in widths),
    ]
    return tl.int32 if max(products) < INT32_LIMIT else tl.int64
