"""The flow's kernels in the configurations they ship in: what is compiled ahead of time, and what is tuned on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .flow_backward import (
    flow_backward,
    flow_backward_kernel,
    flow_weight_gradient_kernel,
    most_channels_with_gradients,
)
from .flow_forward import ForwardResult, Rows, flow_forward, flow_forward_kernel, raster_tile, saved_stride
from .flow_tiles import DENSE, RASTER, TABLES
from .flow_weights import HIDDEN_MULTIPLE, FlowWeights, pack, tile_channels
from .tiles import default_tiles
from .variant import TuningCase, Variant

# Channels of a level, and patches a side at 1024 pixels: a small backbone's first, then tf_efficientnet_b6's three.
LEVELS = ((24, 256), (40, 256), (72, 128), (200, 64))
PRECISIONS = ("float16", "float32")
CONDITION_CHANNELS = 128
TRAINING_ROWS = 4096
CLAMP = 1.9

KINDS = {int(RASTER): "raster", int(TABLES): "gathered", int(DENSE): "dense"}
OPERANDS = ("W1X", "W1P", "TABLE", "CODES", "W2", "PERM", "STAGE", "SAVED_X", "SAVED_Y2", "D_PRE")
WHOLE_NUMBERS = ("rows", "sources", "row_stride", "height", "width", "tiles", "blocks", "layers", "splits")
NUMBERS = ("clamp", "inner_clamp")


def variants() -> list[Variant]:
    """Inference on maps, training on gathered rows, and a dense condition, for every size of tile and both types."""
    found = []
    for channels, _ in LEVELS:
        for precision in PRECISIONS:
            key = f"C{2 * tile_channels(channels)} {precision}"
            for kind in (RASTER, TABLES, DENSE) if precision == "float16" else (RASTER, TABLES):
                sizes = default_tiles()["flow_forward"][key + (" raster" if kind == RASTER else "")]
                block = raster_tile(sizes["BM"])
                constants = {
                    "WANT_Z": False, "SAVE": kind == TABLES, "TW": block[1],
                    "KT": max(16, triton.next_power_of_2(sum(block))),
                }  # fmt: skip
                found.append(
                    _variant(flow_forward_kernel, "flow_forward", channels, precision, int(kind), sizes, constants)
                )
            if channels > most_channels_with_gradients(precision):
                continue
            for kind in (TABLES, DENSE) if precision == "float16" else (TABLES,):
                sizes = default_tiles()["flow_backward"][key]
                constants = {"HAS_DZ": False, "WANT_DX": False}
                found.append(
                    _variant(flow_backward_kernel, "flow_backward", channels, precision, int(kind), sizes, constants)
                )
                sizes = default_tiles()["flow_weight_gradient"][key]
                found.append(
                    _variant(
                        flow_weight_gradient_kernel, "flow_weight_gradient", channels, precision, int(kind), sizes, {}
                    )
                )
    return found


def _variant(
    kernel: Any,
    name: str,
    channels: int,
    precision: str,
    kind: int,
    sizes: Mapping[str, int],
    constants: Mapping[str, Any],
) -> Variant:
    """A kernel on a flow as BGAD has it: P = 128, H = 2 (C1 + P), a soft permutation; rows with tables are gathered."""
    hidden = hidden_channels(channels)
    values = {
        "C": channels, "K": tile_channels(channels), "H": hidden, "HP": -(-hidden // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE,
        "P": CONDITION_CHANNELS if kind == DENSE else 0, "PP": CONDITION_CHANNELS, "COND": kind,
        "HAS_INDEX": kind == TABLES, "GATHER": kind == TABLES, "HARD": False, "SPLIT": precision == "float16",
        "CS": saved_stride(channels), **sizes, **constants,
    }  # fmt: skip
    operand = {"float16": "*fp16", "float32": "*fp32"}[precision]
    types, used = {}, {}
    for argument in kernel.arg_names:
        if argument in values:
            used[argument] = values[argument]
        elif argument in WHOLE_NUMBERS:
            types[argument] = "i32"
        elif argument in NUMBERS:
            types[argument] = "fp32"
        else:
            types[argument] = {"INDEX": "*i64", "PERM_INDEX": "*i32"}.get(
                argument, operand if argument in OPERANDS else "*fp32"
            )
    title = f"{name} C={channels} {KINDS[kind]} {precision}"
    return Variant(title, kernel, types, used, sizes["num_warps"], sizes["num_stages"])


def hidden_channels(channels: int) -> int:
    """H of a conditional flow as BGAD and CFLOW-AD have it."""
    return 2 * (channels - channels // 2 + CONDITION_CHANNELS)


# ---------------------------------------------------------------- tuning


def tuning_cases() -> list[TuningCase]:
    """Inference on the maps of a 1024-pixel image and training on 4096 gathered rows, per size of tile and type."""
    cases = []
    for channels, side in LEVELS:
        for precision in PRECISIONS:
            key = f"C{2 * tile_channels(channels)} {precision}"
            tolerance = 1e-3 if precision == "float16" else 1e-4
            staged = _staged(channels)
            for raster in (True, False):
                cases.append(
                    TuningCase(
                        "flow_forward", key + (" raster" if raster else ""), staged,
                        _forward_problem(channels, side, precision, raster), tolerance,
                    )
                )  # fmt: skip
            if channels > most_channels_with_gradients(precision):
                continue
            plain = [{k: v for k, v in sizes.items() if k != "BK"} for sizes in staged]
            distinct = list({tuple(sizes.items()): sizes for sizes in plain}.values())
            for kernel, candidates in (("flow_backward", staged), ("flow_weight_gradient", distinct)):
                problem = _backward_problem(channels, side, precision, key, kernel)
                cases.append(TuningCase(kernel, key, candidates, problem, tolerance))
    return cases


def _staged(channels: int) -> list[dict[str, int]]:
    """Tiles to try. Narrow rows may stay in registers (BK 0); wide ones would spill."""
    k = tile_channels(channels)
    found = []
    for bm, warps in ((16, 4), (16, 8), (32, 4), (32, 8), (64, 4), (64, 8), (128, 4), (128, 8)):
        for bh in (32, 64):
            for bk in (0, 32) if k <= 32 else (32, 64):
                for stages in (1, 2, 3):
                    # About 64 values of each half's tile in a thread is what its registers hold.
                    if 4 * bm * k <= 32 * warps * 256 and bk <= 2 * k and not (stages == 3 and bm < 64):
                        found.append({"BM": bm, "BH": bh, "BK": bk, "num_warps": warps, "num_stages": stages})
    return found


def random_weights(channels: int, side: int, precision: str, device: torch.device, layers: int = 8) -> FlowWeights:
    """Weights of the size that a new flow starts with, for maps of side x side."""
    generator = torch.Generator().manual_seed(channels)
    hidden, c2 = hidden_channels(channels), channels // 2
    inputs = channels - c2 + CONDITION_CHANNELS

    def draw(*shape: int, bound: float) -> Tensor:
        return ((2 * torch.rand(layers, *shape, generator=generator) - 1) * bound).to(device)

    rotation = torch.linalg.qr(torch.randn(layers, channels, channels, generator=generator)).Q.to(device)
    codes = torch.randn(2, side, CONDITION_CHANNELS // 2, generator=generator).clamp(-1, 1).to(device)
    return pack(
        draw(hidden, inputs, bound=inputs**-0.5), draw(hidden, bound=inputs**-0.5),
        draw(2 * c2, hidden, bound=hidden**-0.5), draw(2 * c2, bound=hidden**-0.5),
        1 + draw(channels, bound=0.1), draw(channels, bound=0.1), rotation, (codes[0], codes[1]), False, False,
        {"float16": torch.float16, "float32": torch.float32}[precision],
    )  # fmt: skip


Problem = Callable[[torch.device], Callable[[Mapping[str, int]], Sequence[Tensor]]]


def _forward_problem(channels: int, side: int, precision: str, raster: bool) -> Problem:
    def prepare(device: torch.device) -> Callable[[Mapping[str, int]], Sequence[Tensor]]:
        weights = random_weights(channels, side, precision, device)
        rows = _rows(channels, side, raster, device)

        def run(tiles: Mapping[str, int]) -> Sequence[Tensor]:
            result = _forward(rows, weights, channels, tiles, save=not raster)
            return result.lp, result.log_det

        return run

    return prepare


def _backward_problem(channels: int, side: int, precision: str, key: str, kernel: str) -> Problem:
    def prepare(device: torch.device) -> Callable[[Mapping[str, int]], Sequence[Tensor]]:
        weights = random_weights(channels, side, precision, device)
        rows = _rows(channels, side, False, device)
        forward = _forward(rows, weights, channels, default_tiles()["flow_forward"][key], save=True)
        saved = forward.saved
        assert saved is not None
        d_lp = torch.rand(rows.count, generator=torch.Generator().manual_seed(1)).to(device)
        others = {name: default_tiles()[name][key] for name in ("flow_backward", "flow_weight_gradient")}

        def run(tiles: Mapping[str, int]) -> Sequence[Tensor]:
            # Both launches are timed; only the tiles of one change.
            chosen = {**others, kernel: tiles}
            gradients = flow_backward(
                rows, weights, saved, forward.lp, d_lp, torch.zeros_like(d_lp), None,
                torch.full((1,), 16.0 * channels, device=device), channels=channels, hidden=hidden_channels(channels),
                condition_channels=CONDITION_CHANNELS, clamp=CLAMP, scaled_tanh=False,
                tiles=chosen["flow_backward"], weight_tiles=chosen["flow_weight_gradient"],
            )  # fmt: skip
            return gradients.w1, gradients.w2, gradients.b1, gradients.v_dot_y

        return run

    return prepare


def _rows(channels: int, side: int, raster: bool, device: torch.device) -> Rows:
    generator = torch.Generator().manual_seed(side)
    x = torch.randn(side * side, channels, generator=generator).to(device)
    if raster:
        return Rows(x, side, side)
    index = torch.randint(0, side * side, (TRAINING_ROWS,), generator=generator).to(device)
    return Rows(x, side, side, index, gather=True)


def _forward(rows: Rows, weights: FlowWeights, channels: int, tiles: Mapping[str, int], save: bool) -> ForwardResult:
    return flow_forward(
        rows, weights, channels=channels, hidden=hidden_channels(channels), clamp=CLAMP, scaled_tanh=False, save=save,
        tiles=tiles,
    )  # fmt: skip
