"""The log-likelihood's kernels in the configurations that they ship in."""

from __future__ import annotations

from ..log_likelihood import log_likelihood_backward_kernel, log_likelihood_forward_kernel, tile_of
from .variant import Variant


def variants() -> list[Variant]:
    """Return the configurations compiled ahead of time: few, many and an odd number of channels; a 16-bit latent."""
    found = []
    for channels, dtype in ((40, "fp32"), (40, "fp16"), (41, "fp32"), (200, "fp32"), (512, "fp32")):
        tile = tile_of(channels, channels)
        sizes = dict.fromkeys(("rows", "units", "stride_units"), "i32")
        constants = {"UNIT": tile.unit, "BM": tile.rows, "BK": tile.columns}
        name = f"C={channels} {dtype}"
        found.append(
            Variant(
                f"log_likelihood_forward {name}",
                log_likelihood_forward_kernel,
                {"z_ptr": f"*{dtype}", "log_det_ptr": "*fp32", "lp_ptr": "*fp32", **sizes},
                {**constants, "log_det_stride": 1},
                tile.warps,
            )
        )
        found.append(
            Variant(
                f"log_likelihood_backward {name}",
                log_likelihood_backward_kernel,
                {"z_ptr": f"*{dtype}", "d_lp_ptr": "*fp32", "d_z_ptr": f"*{dtype}", "d_log_det_ptr": "*fp32", **sizes},
                {**constants, "d_lp_stride": 1},
                tile.warps,
            )
        )
    return found
