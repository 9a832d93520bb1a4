"""The coupling kernels in the configurations that they ship in and that are tried on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..coupling.backward import GROUP_ROWS, coupling_backward, coupling_backward_kernel
from ..coupling.forward import ABSENT, MOVED, PLAIN, SPLIT, Coupling, coupling_forward, coupling_forward_kernel
from ..coupling.operands import coupling_clear_kernel, coupling_operand, coupling_operand_kernel, coupling_rows_kernel
from ..tile_sizes import tiles as chosen_tiles
from .variant import TuningCase, Variant

# Channels, the form's name, the type of a, and the form.
CONFIGURATIONS = (
    (301, "split", "*fp16", SPLIT),
    (512, "split", "*fp16", SPLIT),
    (512, "plain", "*fp32", PLAIN),
    (512, "moved", "*fp16", MOVED),
    (512, "last", "*fp16", ABSENT),
    (2048, "split", "*fp16", SPLIT),
)
LAYER = {
    **dict.fromkeys(("x_ptr", "b2_ptr", "g_ptr", "offset_ptr"), "*fp32"),
    "to_ptr": "*i64",
    "rows": "i32",
    "clamp": "fp32",
    "inner_clamp": "fp32",
}
# BM, BK and warps to try.
ONE_PASS = ((1, 256, 1), (1, 256, 2), (2, 128, 2), (2, 256, 2), (2, 256, 4), (4, 128, 2), (4, 256, 8), (8, 128, 4))
# BM divides GROUP_ROWS; larger tiles would spill the sums.
SUMS = ((2, 64, 1), (2, 128, 2), (2, 128, 4), (4, 64, 2), (4, 64, 4), (4, 128, 8), (8, 64, 4), (8, 128, 8))


def variants() -> list[Variant]:
    """Return the configurations compiled ahead of time: every form at C = 512, the common one also at others."""
    return [*_layer_variants(), *_row_variants(), *_operand_variants()]


def _layer_variants() -> list[Variant]:
    """Return the variants of the forward and the backward."""
    found = []
    for channels, name, a, form in CONFIGURATIONS:
        last = form == ABSENT
        types = {**LAYER, "a_ptr": a, "v_ptr": "*fp16" if form == SPLIT else "*fp32", "largest": "fp32"}
        types |= dict.fromkeys(("log_det_ptr", "new_log_det_ptr", "square_ptr"), "*fp32")
        constants = {"C": channels, "FORM": form.value, "WANT_SQUARE": last}
        title = f"coupling_forward C={channels} {name}"
        found.append(_variant(title, coupling_forward_kernel, types, constants, "coupling_forward"))
        types = {**LAYER, "a_ptr": a, "da_ptr": a}
        types |= dict.fromkeys(("dv_ptr", "pull_ptr", "d_log_det_ptr", "dx_ptr", "sums_ptr"), "*fp32")
        # The gradient of v is float32, whatever the forward's product read.
        backward_form = PLAIN if form == SPLIT else form
        constants = {"C": channels, "FORM": backward_form.value, "LAST": last, "GROUP": GROUP_ROWS}
        title = f"coupling_backward C={channels} {name}"
        found.append(_variant(title, coupling_backward_kernel, types, constants, "coupling_backward"))
    return found


def _row_variants() -> list[Variant]:
    """Return the variants of the kernels that find and clear lost rows."""
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "lost_ptr": "*u8", "rows": "i32", "largest": "fp32"}
    rows = _variant("coupling_rows C=512", coupling_rows_kernel, types, {"C": 512}, "coupling_forward")
    types = {"data_ptr": "*fp16", "lost_ptr": "*u8", "rows": "i32", "layer_stride": "i64"}
    return [rows, _variant("coupling_clear C=512", coupling_clear_kernel, types, {"C": 512}, "coupling_forward")]


def _operand_variants() -> list[Variant]:
    """Return the variants of the kernel that copies operands."""
    found = []
    types = {"x_ptr": "*fp32", "out_ptr": "*fp16", "rows": "i32"}
    for three in (False, True):
        constants = {"C": 512, "X_STRIDE": 512, "OUT_STRIDE": 1536 if three else 640, "THREE": three}
        name = f"coupling_operand C=512 {'split' if three else 'narrow'}"
        found.append(_variant(name, coupling_operand_kernel, types, constants, "coupling_forward", "operand"))
    return found


def _variant(
    name: str, kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], entry: str, key: str = "rows"
) -> Variant:
    """Return a variant with the default tile sizes of an entry and key."""
    tiles = chosen_tiles(entry, key, torch.device("cpu"))
    sizes = {"BM": tiles["BM"], "BK": tiles["BK"]}
    # Launches leave the number of stages to Triton, which takes 3.
    return Variant(name, kernel, types, {**constants, **sizes}, tiles["num_warps"], num_stages=3)


def tuning_cases() -> list[TuningCase]:
    """Return one case per entry: 4096 rows of 512 channels. The tile sizes do not depend on the channels."""
    rows, channels = 4096, 512

    def problem(device: torch.device) -> tuple[Tensor, Tensor, Coupling, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, a = (torch.randn(rows, channels, generator=generator).to(device) for _ in range(2))
        ones = torch.ones(channels, device=device)
        return x, a.half(), Coupling(ones, ones, ones, None, 1.9, False), torch.zeros(rows, device=device)

    def forward(device: torch.device) -> Callable[[Mapping[str, int]], Sequence[Tensor]]:
        x, a, layer, log_det = problem(device)
        return lambda tiles: coupling_forward(x, a, layer, log_det, tiles=tiles)[:2]

    def backward(device: torch.device) -> Callable[[Mapping[str, int]], Sequence[Tensor]]:
        x, a, layer, d_log_det = problem(device)
        return lambda tiles: coupling_backward(x, a, layer, x, None, d_log_det, tiles=tiles)

    def operand(device: torch.device) -> Callable[[Mapping[str, int]], Sequence[Tensor]]:
        x = problem(device)[0]

        def run(tiles: Mapping[str, int]) -> Sequence[Tensor]:
            out = torch.empty(rows, 3 * channels, dtype=torch.float16, device=device)
            coupling_operand(x, out, three=True, tiles=tiles)
            return (out,)

        return run

    def candidates(*sizes: tuple[int, int, int]) -> list[dict[str, int]]:
        return [{"BM": bm, "BK": bk, "num_warps": warps} for bm, bk, warps in sizes]

    return [
        TuningCase("coupling_forward", "rows", candidates(*ONE_PASS), forward),
        TuningCase("coupling_forward", "operand", candidates(*ONE_PASS, (8, 256, 8)), operand),
        TuningCase("coupling_backward", "rows", candidates(*SUMS), backward),
    ]
