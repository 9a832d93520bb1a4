"""The loss's kernels in the configurations that they ship in."""

from __future__ import annotations

from typing import Any

from ..boundary import SMALL_TILES
from ..spp_loss import (
    FINISH_TILE,
    TILE,
    WARPS,
    spp_loss_backward_kernel,
    spp_loss_finish_kernel,
    spp_loss_partial_kernel,
    spp_loss_small_kernel,
)
from .variant import Variant

ROWS = {"lp_ptr": "*fp32", "anomalous_ptr": "*u8", "rows": "i32", "channels": "i32", "normalizer": "fp32"}
TERMS = dict.fromkeys(("l_total_ptr", "l_ml_ptr", "l_n_ptr", "l_a_ptr"), "*fp32")
BOUNDARY = {"b_n_ptr": "*fp32", "b_a_ptr": "*fp32"}
COUNTS = dict.fromkeys(("n_normal_ptr", "normal_violations_ptr", "anomalous_violations_ptr"), "*i64")
# The official code's options and those of the paper's slides.
OPTIONS = {
    "focal logsigmoid mean": {"NLL": False, "MEAN": True, "FOCAL": True, "PUSH": True},
    "nll sum": {"NLL": True, "MEAN": False, "FOCAL": False, "PUSH": True},
}


def variants() -> list[Variant]:
    """Return the configurations compiled ahead of time: every tile with each set of options."""
    found = []
    for name, options in OPTIONS.items():
        for tile in SMALL_TILES:
            found.append(_small(tile, name, options))
        types = {**ROWS, **BOUNDARY, "partial_ptr": "*fp32"}
        constants: dict[str, Any] = {"NLL": options["NLL"], "FOCAL": options["FOCAL"], "BM": TILE}
        found.append(Variant(f"spp_loss_partial {name}", spp_loss_partial_kernel, types, constants, WARPS))
        types = {**TERMS, **COUNTS, "partial_ptr": "*fp32", "tiles": "i32", "lam": "fp32"}
        constants = {"MEAN": options["MEAN"], "PUSH": options["PUSH"], "BT": FINISH_TILE}
        found.append(Variant(f"spp_loss_finish {name}", spp_loss_finish_kernel, types, constants, WARPS))
        # A training step needs the gradient of the total alone.
        types = {**ROWS, **BOUNDARY, **COUNTS, "g_total_ptr": "*fp32", "d_lp_ptr": "*fp32", "lam": "fp32"}
        constants = {**dict.fromkeys(("g_ml_ptr", "g_n_ptr", "g_a_ptr")), **options, "BM": TILE}
        found.append(Variant(f"spp_loss_backward {name}", spp_loss_backward_kernel, types, constants, WARPS))
    return found


def _small(tile: int, name: str, options: dict[str, bool]) -> Variant:
    types = {**ROWS, **TERMS, **BOUNDARY, **COUNTS, "tau": "fp32", "lam": "fp32"}
    constants = {"BETA": 0.01, **options, "BM": tile}
    return Variant(f"spp_loss_small {tile} {name}", spp_loss_small_kernel, types, constants, SMALL_TILES[tile])
