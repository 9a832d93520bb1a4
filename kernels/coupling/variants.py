"""The coupling kernels in the configurations they ship in: what is compiled ahead of time, and tuned on a GPU.

Between a library's matrix products, for flows too wide to stay on the chip (fastbgad/ops/flow/wide.py):

- coupling_operands.py   what the products read
- coupling_forward.py    from the subnet's last product to the permutation's
- coupling_backward.py   the way back
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..tile_sizes import tiles as chosen_tiles
from ..variant import TuningCase, Variant
from .backward import GROUP_ROWS, coupling_backward, coupling_backward_kernel
from .forward import ABSENT, MOVED, PLAIN, SPLIT, Coupling, coupling_forward, coupling_forward_kernel
from .operands import coupling_clear_kernel, coupling_operand, coupling_operand_kernel, coupling_rows_kernel


def variants() -> list[Variant]:
    """The configurations compiled ahead of time: every form at 512 channels, the common one at an odd and a large C."""
    cpu = torch.device("cpu")
    forward, backward = chosen_tiles("coupling_forward", "rows", cpu), chosen_tiles("coupling_backward", "rows", cpu)
    operand = chosen_tiles("coupling_forward", "operand", cpu)
    layer = {"X": "*fp32", "B2": "*fp32", "G": "*fp32", "OFFSET": "*fp32", "TO": "*i64"}
    layer |= {"rows": "i32", "clamp": "fp32", "inner_clamp": "fp32"}
    found = []
    for channels, name, a, form in (
        (301, "split", "*fp16", SPLIT),
        (512, "split", "*fp16", SPLIT),
        (512, "plain", "*fp32", PLAIN),
        (512, "moved", "*fp16", MOVED),
        (512, "last", "*fp16", ABSENT),
        (2048, "split", "*fp16", SPLIT),
    ):
        last = form == ABSENT
        types = {"A": a, "V": "*fp16" if form == SPLIT else "*fp32", "largest": "fp32"}
        types |= dict.fromkeys(("LOG_DET", "NEW_LOG_DET", "SQUARE"), "*fp32")
        constants = {"C": channels, "FORM": form.value, "WANT_SQUARE": last}
        found.append(
            _variant(
                f"coupling_forward C={channels} {name}", coupling_forward_kernel, layer | types, constants, forward
            )
        )
        types = {"A": a, "DA": a, **dict.fromkeys(("DV", "PULL", "D_LOG_DET", "DX", "SUMS"), "*fp32")}
        # The gradient of v is float32, whatever went into the forward's product.
        back = PLAIN if form == SPLIT else form
        constants = {"C": channels, "FORM": back.value, "LAST": last, "GROUP": GROUP_ROWS}
        found.append(
            _variant(
                f"coupling_backward C={channels} {name}", coupling_backward_kernel, layer | types, constants, backward
            )
        )
    types = {"X": "*fp32", "OUT": "*fp32", "LOST": "*u8", "rows": "i32", "largest": "fp32"}
    found.append(_variant("coupling_rows C=512", coupling_rows_kernel, types, {"C": 512}, forward))
    types = {"DATA": "*fp16", "LOST": "*u8", "rows": "i32", "layer_stride": "i64"}
    found.append(_variant("coupling_clear C=512", coupling_clear_kernel, types, {"WIDTH": 512}, forward))
    for three in (False, True):
        types = {"X": "*fp32", "OUT": "*fp16", "rows": "i32"}
        constants = {"COLUMNS": 512, "X_STRIDE": 512, "OUT_STRIDE": 1536 if three else 640, "THREE": three}
        name = f"coupling_operand C=512 {'split' if three else 'narrow'}"
        found.append(_variant(name, coupling_operand_kernel, types, constants, operand))
    return found


def _variant(
    name: str, kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], tiles: Mapping[str, int]
) -> Variant:
    sizes = {"BR": tiles["BR"], "BC": tiles["BC"]}
    # Launches leave the number of stages to Triton, which takes 3.
    return Variant(name, kernel, types, {**constants, **sizes}, tiles["num_warps"], num_stages=3)


def tuning_cases() -> list[TuningCase]:
    """Tile sizes do not depend on the channels: one training step of 4096 rows at 512 of them."""

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
        return [{"BR": rows, "BC": columns, "num_warps": warps} for rows, columns, warps in sizes]

    one_pass = ((1, 256, 1), (1, 256, 2), (2, 128, 2), (2, 256, 2), (2, 256, 4), (4, 128, 2), (4, 256, 8), (8, 128, 4))
    # BR divides GROUP_ROWS; larger tiles would spill the sums.
    sums = ((2, 64, 1), (2, 128, 2), (2, 128, 4), (4, 64, 2), (4, 64, 4), (4, 128, 8), (8, 64, 4), (8, 128, 8))
    return [
        TuningCase("coupling_forward", "rows", candidates(*one_pass), forward),
        TuningCase("coupling_forward", "operand", candidates(*one_pass, (8, 256, 8)), operand),
        TuningCase("coupling_backward", "rows", candidates(*sums), backward),
    ]
