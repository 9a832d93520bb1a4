"""Per-level log-likelihood maps to the summed anomaly map and its maximum, in one pass over the output.

    score = offset - sum over levels of upsample(exp(lp_l - level_max_l))

Each program makes one tile of one image's map: it reads the four neighbours of every pixel at every level from cache,
so no level is ever upsampled in memory. The equation is that of `fastbgad.reference.score_map`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile_sizes import tiles as chosen_tiles
from .variant import TuningCase, Variant

INT32_LIMIT = 2**31


@triton.jit
def _sources(
    place,  # [B] places in the output
    length,
    target,
):
    """The neighbours and the weight of the higher one where `place` of 0..target-1 falls among 0..length-1.

        place (length - 1) / (target - 1) = low + weight

    In integers: a quotient in floating point would land beside a source that it should hit exactly.
    """
    steps = tl.maximum(target - 1, 1)
    scaled = place * (length - 1)
    low = scaled // steps
    weight = (scaled - low * steps).to(tl.float32) / steps.to(tl.float32)
    return low, tl.minimum(low + 1, length - 1), weight


@triton.jit(do_not_specialize=["height"])
def score_map_kernel(
    levels,  # per level [B, h, w], any floating-point type
    heights,  # per level h
    widths,  # per level w
    level_max,  # [L] fp32
    offset,  # [1] fp32
    anomaly_map,  # [B, H, W] fp32
    tile_max,  # [B, tiles] fp32
    height,
    width,
    INDEX: tl.constexpr,  # tl.int64 where a product of two sizes passes 2^31
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    tiles_across = tl.cdiv(width, BW)
    tiles = tiles_across * tl.cdiv(height, BH)
    image = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    own_rows = (tile // tiles_across) * BH + tl.arange(0, BH)
    own_columns = (tile % tiles_across) * BW + tl.arange(0, BW)
    # Beyond the edge the last pixel is computed again: no load needs a mask and the tile's maximum stays right.
    rows = tl.minimum(own_rows, height - 1).to(INDEX)  # [BH]
    columns = tl.minimum(own_columns, width - 1).to(INDEX)  # [BW]

    total = tl.zeros([BH, BW], tl.float32)
    for i in tl.static_range(len(levels)):
        top, bottom, down = _sources(rows, heights[i], height)
        left, right, across = _sources(columns, widths[i], width)
        source = levels[i] + image.to(tl.int64) * heights[i] * widths[i]
        most = tl.load(level_max + i)
        above, below = (top * widths[i])[:, None], (bottom * widths[i])[:, None]
        left, right, down, across = left[None, :], right[None, :], down[:, None], across[None, :]
        top_left = tl.exp(tl.load(source + above + left).to(tl.float32) - most)  # [BH, BW]
        top_right = tl.exp(tl.load(source + above + right).to(tl.float32) - most)
        bottom_left = tl.exp(tl.load(source + below + left).to(tl.float32) - most)
        bottom_right = tl.exp(tl.load(source + below + right).to(tl.float32) - most)
        # Both neighbours always take part, so a NaN spreads as it does in the oracle, even with weight 0.
        at_left = top_left * (1 - down) + bottom_left * down
        at_right = top_right * (1 - down) + bottom_right * down
        total += at_left * (1 - across) + at_right * across

    score = tl.load(offset) - total
    target = anomaly_map + image.to(tl.int64) * height * width + (rows * width)[:, None] + columns[None, :]
    tl.store(target, score, mask=(own_rows < height)[:, None] & (own_columns < width)[None, :])
    # tl.max passes over NaN.
    broken = tl.max(tl.max((score != score).to(tl.int32), axis=1), axis=0)
    largest = tl.max(tl.max(score, axis=1), axis=0)
    tl.store(tile_max + tl.program_id(0), tl.where(broken != 0, float("nan"), largest))


def score_map(
    levels: Sequence[Tensor],  # each [B, h_l, w_l] float32, float16 or bfloat16
    size: tuple[int, int],
    level_max: Tensor,  # [L] float32
    offset: Tensor,  # one float32
    tiles: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The anomaly map [B, H, W] and the image maximum [B], float32; `tiles` overrides the tile sizes chosen."""
    height, width = size
    assert level_max.shape == (len(levels),)
    assert level_max.dtype == offset.dtype == torch.float32
    assert offset.numel() == 1
    assert min(height, width, *(min(lp.shape[1:]) for lp in levels)) > 0
    device, batch = levels[0].device, len(levels[0])
    levels = tuple(lp.contiguous() for lp in levels)
    heights, widths = tuple(lp.shape[1] for lp in levels), tuple(lp.shape[2] for lp in levels)

    chosen = dict(chosen_tiles("score_map", "map", device) if tiles is None else tiles)
    count = triton.cdiv(height, chosen["BH"]) * triton.cdiv(width, chosen["BW"])
    assert batch * count < INT32_LIMIT
    anomaly_map = torch.empty(batch, height, width, device=device)
    tile_max = torch.empty(batch, count, device=device)
    if batch:
        with torch.cuda.device_of(levels[0]):
            score_map_kernel[(batch * count,)](
                levels, heights, widths, level_max.contiguous(), offset, anomaly_map, tile_max, height, width,
                INDEX=_index_type(heights, widths, height, width), **chosen,
            )  # fmt: skip
    return anomaly_map, tile_max.amax(dim=1)


def _index_type(heights: Sequence[int], widths: Sequence[int], height: int, width: int) -> tl.dtype:
    products = [
        height * width,
        *(h * w for h, w in zip(heights, widths, strict=True)),
        *(h * height for h in heights),
        *(w * width for w in widths),
    ]
    return tl.int32 if max(products) < INT32_LIMIT else tl.int64


def variants() -> list[Variant]:
    """The configurations compiled ahead of time: usual sizes, which 16 divides, and sizes that are just any number."""
    shipped = chosen_tiles("score_map", "map", torch.device("cpu"))
    usual = ("heights", "widths", "width")
    found = []
    for levels, dtype, index, multiples in (
        (3, "fp32", tl.int32, usual), (3, "fp16", tl.int32, usual), (3, "bf16", tl.int32, usual),
        (1, "fp32", tl.int32, ()), (4, "fp32", tl.int32, ()), (3, "fp32", tl.int64, ()),
    ):  # fmt: skip
        types = {
            "levels": (f"*{dtype}",) * levels,
            "heights": ("i32",) * levels,
            "widths": ("i32",) * levels,
            "level_max": "*fp32",
            "offset": "*fp32",
            "anomaly_map": "*fp32",
            "tile_max": "*fp32",
            "height": "i32",
            "width": "i32",
        }
        constants = {"INDEX": index, "BH": shipped["BH"], "BW": shipped["BW"]}
        name = f"score_map {levels} levels {dtype} {index}{'' if multiples else ' odd sizes'}"
        found.append(Variant(name, score_map_kernel, types, constants, shipped["num_warps"], multiples_of_16=multiples))
    return found


def tuning_cases() -> list[TuningCase]:
    """The map of a 1024-pixel image from levels of 256, 128 and 64 patches a side; four images."""
    candidates = [
        {"BH": bh, "BW": bw, "num_warps": warps}
        for bh, bw, warps in (
            (1, 256, 4), (1, 512, 4), (2, 128, 4), (2, 256, 4), (4, 64, 4), (4, 128, 4), (4, 256, 8),
            (8, 32, 2), (8, 128, 8), (16, 32, 4), (16, 64, 4), (32, 32, 8),
        )
    ]  # fmt: skip

    def prepare(device: torch.device) -> Callable[[Mapping[str, int]], Sequence[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        levels = [torch.randn(4, side, side, generator=generator).to(device) for side in (256, 128, 64)]
        level_max, offset = torch.ones(3, device=device), torch.full((1,), 3.0, device=device)
        return lambda tiles: score_map(levels, (1024, 1024), level_max, offset, tiles)

    return [TuningCase("score_map", "map", candidates, prepare)]
