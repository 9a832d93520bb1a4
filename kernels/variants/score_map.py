"""The score map's kernel in the configurations that it ships in and that are tried on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import triton.language as tl
from torch import Tensor

from ..score_map import score_map, score_map_kernel
from ..tile_sizes import tiles as chosen_tiles
from .variant import TuningCase, Variant

# Sizes that 16 divides in the usual case.
USUAL_MULTIPLES = ("heights", "widths", "width")
# Number of levels, their type, INDEX_TYPE, and the sizes that 16 divides.
CONFIGURATIONS = (
    (3, "fp32", tl.int32, USUAL_MULTIPLES),
    (3, "fp16", tl.int32, USUAL_MULTIPLES),
    (3, "bf16", tl.int32, USUAL_MULTIPLES),
    (1, "fp32", tl.int32, ()),
    (4, "fp32", tl.int32, ()),
    (3, "fp32", tl.int64, ()),
)
# TH, TW and warps to try.
CANDIDATES = (
    *((1, 256, 4), (1, 512, 4)),
    *((2, 128, 4), (2, 256, 4)),
    *((4, 64, 4), (4, 128, 4), (4, 256, 8)),
    *((8, 32, 2), (8, 128, 8)),
    *((16, 32, 4), (16, 64, 4)),
    *((32, 32, 8),),
)


def variants() -> list[Variant]:
    """Return the configurations compiled ahead of time: usual sizes, which 16 divides, and any others."""
    shipped = chosen_tiles("score_map", "map", torch.device("cpu"))
    found = []
    for levels, dtype, index_type, multiples in CONFIGURATIONS:
        types = {
            "level_ptrs": (f"*{dtype}",) * levels,
            "heights": ("i32",) * levels,
            "widths": ("i32",) * levels,
            "level_max_ptr": "*fp32",
            "offset_ptr": "*fp32",
            "anomaly_map_ptr": "*fp32",
            "tile_max_ptr": "*fp32",
            "height": "i32",
            "width": "i32",
        }
        constants = {"INDEX_TYPE": index_type, "TH": shipped["TH"], "TW": shipped["TW"]}
        name = f"score_map {levels} levels {dtype} {index_type}{'' if multiples else ' odd sizes'}"
        found.append(Variant(name, score_map_kernel, types, constants, shipped["num_warps"], multiples_of_16=multiples))
    return found


def tuning_cases() -> list[TuningCase]:
    """Return one case: the maps of four 1024-pixel images from levels of 256, 128 and 64 patches a side."""
    candidates = [{"TH": height, "TW": width, "num_warps": warps} for height, width, warps in CANDIDATES]

    def prepare(device: torch.device) -> Callable[[Mapping[str, int]], Sequence[Tensor]]:
        generator = torch.Generator().manual_seed(0)
        levels = [torch.randn(4, side, side, generator=generator).to(device) for side in (256, 128, 64)]
        level_max, offset = torch.ones(3, device=device), torch.full((1,), 3.0, device=device)
        return lambda tiles: score_map(levels, (1024, 1024), level_max, offset, tiles)

    return [TuningCase("score_map", "map", candidates, prepare)]
