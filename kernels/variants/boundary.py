"""The boundary's kernels in the configurations that they ship in."""

from __future__ import annotations

from ..boundary import (
    SMALL_TILES,
    TILE,
    WARPS,
    boundary_finish_kernel,
    boundary_histogram_kernel,
    boundary_small_kernel,
)
from .variant import Variant


def variants() -> list[Variant]:
    """Return the configurations compiled ahead of time: every tile, every digit."""
    rows = {"lp_ptr": "*fp32", "anomalous_ptr": "*u8", "rows": "i32"}
    scalars = {"b_n_ptr": "*fp32", "b_a_ptr": "*fp32", "n_normal_ptr": "*i64", "tau": "fp32", "normalizer": "fp32"}
    small = [
        Variant(f"boundary_small {tile}", boundary_small_kernel, rows | scalars, {"BETA": 0.01, "BM": tile}, warps)
        for tile, warps in SMALL_TILES.items()
    ]
    histogram = [
        Variant(
            f"boundary_histogram digit {digit}",
            boundary_histogram_kernel,
            {**rows, "hist_ptr": "*i64", "tiles": "i32"},
            {"BETA": 0.01, "DIGIT": digit, "BM": TILE},
            WARPS,
        )
        for digit in range(4)
    ]
    finish = Variant("boundary_finish", boundary_finish_kernel, {"hist_ptr": "*i64", **scalars}, {"BETA": 0.01})
    return [*small, *histogram, finish]
