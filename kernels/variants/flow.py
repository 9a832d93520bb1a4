"""The flow's kernels in the configurations they ship in: what is compiled ahead of time, and what is tuned on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..flow.backward import flow_backward, flow_backward_kernel, flow_weight_gradient_kernel
from ..flow.forward import ForwardResult, Rows, flow_forward, flow_forward_kernel, raster_tile, tile_key
from ..flow.pack import BLOCK, PARTIAL_ROWS, flow_pack_kernel, flow_unpack_kernel
from ..flow.shared import DENSE, RASTER, TABLES
from ..flow.weights import HIDDEN_MULTIPLE, FlowWeights, most_channels_with_gradients, pack, saved_stride, tile_channels
from ..tile_sizes import default_tiles
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
    """Inference on maps, training on gathered rows, and a dense condition, for every size of tile and both types.

    For two sizes also the modes that drop-in users ask for: the latent, gradients of it and of the features, and a hard
    permutation.
    """
    found = []
    for channels, _ in LEVELS:
        for precision in PRECISIONS:
            for kind in (RASTER, TABLES, DENSE) if precision == "float16" else (RASTER, TABLES):
                found.append(_forward_variant(channels, precision, int(kind)))
            if channels <= most_channels_with_gradients(precision):
                for kind in (TABLES, DENSE) if precision == "float16" else (TABLES,):
                    found.append(_backward_variant(channels, precision, int(kind)))
                    sizes = default_tiles()["flow_weight_gradient"][tile_key(channels, precision)]
                    kernel = flow_weight_gradient_kernel
                    found.append(_variant(kernel, "flow_weight_gradient", channels, precision, int(kind), sizes, {}))
    for channels in (40, 200):
        for kind in (TABLES, DENSE):
            found.extend(_pack_variants(channels, int(kind)))
        found.append(_forward_variant(channels, "float16", int(RASTER), latent=True))
        found.append(_forward_variant(channels, "float16", int(RASTER), hard=True))
        found.append(_backward_variant(channels, "float16", int(TABLES), latent=True))
        found.append(_backward_variant(channels, "float16", int(TABLES), hard=True))
    return found


def _forward_variant(channels: int, precision: str, kind: int, latent: bool = False, hard: bool = False) -> Variant:
    # With the latent a tile of 128 rows would not fit on every chip.
    sizes = default_tiles()["flow_forward"][tile_key(channels, precision, raster=kind == RASTER and not latent)]
    block = raster_tile(sizes["BM"])
    constants = {
        "WANT_Z": latent, "SAVE": kind == TABLES, "TW": block[1], "KT": max(16, triton.next_power_of_2(sum(block))),
        "HARD": hard,
    }  # fmt: skip
    name = "flow_forward" + " latent" * latent + " hard" * hard
    return _variant(flow_forward_kernel, name, channels, precision, kind, sizes, constants)


def _backward_variant(channels: int, precision: str, kind: int, latent: bool = False, hard: bool = False) -> Variant:
    sizes = default_tiles()["flow_backward"][tile_key(channels, precision)]
    constants = {"HAS_DZ": latent, "WANT_DX": latent, "HARD": hard}
    name = "flow_backward" + " latent" * latent + " hard" * hard
    return _variant(flow_backward_kernel, name, channels, precision, kind, sizes, constants)


def _variant(
    kernel: Any,
    name: str,
    channels: int,
    precision: str,
    kind: int,
    sizes: Mapping[str, int],
    constants: Mapping[str, Any],
) -> Variant:
    """A kernel on a flow as BGAD has it: P = 128, H = 2 (C1 + P); rows with tables are gathered."""
    hidden = hidden_channels(channels)
    values = {
        "C": channels, "K": tile_channels(channels), "H": hidden, "HP": -(-hidden // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE,
        "P": CONDITION_CHANNELS if kind == DENSE else 0, "PP": CONDITION_CHANNELS, "COND": kind,
        "HAS_INDEX": kind == TABLES, "GATHER": kind == TABLES, "HARD": False, "SPLIT": precision == "float16",
        "CS": saved_stride(channels), "NS": sizes["num_stages"], **sizes, **constants,
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


def _pack_variants(channels: int, kind: int) -> list[Variant]:
    """Packing float16 operands from float32 weights, and unpacking their gradients."""
    sizes = {"BU": BLOCK, "BB": PARTIAL_ROWS, "num_warps": 8, "num_stages": 2}
    constants = {"ACTIVATION": 0, "P": CONDITION_CHANNELS}
    found = []
    for name, kernel in (("flow_pack", flow_pack_kernel), ("flow_unpack", flow_unpack_kernel)):
        variant = _variant(kernel, name, channels, "float16", kind, sizes, constants)
        types = {**variant.types, "ADDRESSES": "*i64", "CODES": "*fp32", "places": "i32"}
        found.append(variant._replace(types={key: types[key] for key in types if key in kernel.arg_names}))
    return found


def hidden_channels(channels: int) -> int:
    """H of a conditional flow as BGAD and CFLOW-AD have it."""
    return 2 * (channels - channels // 2 + CONDITION_CHANNELS)


# ---------------------------------------------------------------- tuning


def tuning_cases() -> list[TuningCase]:
    """Inference on the maps of a 1024-pixel image and training on 4096 gathered rows, with float16 operands.

    float32 operands are for checking; they keep their default tiles.
    """
    cases = []
    for channels, side in LEVELS[1:]:
        key, tolerance = tile_key(channels, "float16"), 1e-3
        staged = _candidates(channels)
        for raster in (True, False):
            problem = _forward_problem(channels, side, raster)
            cases.append(TuningCase("flow_forward", tile_key(channels, "float16", raster), staged, problem, tolerance))
        plain = [{name: value for name, value in sizes.items() if name != "BK"} for sizes in staged]
        distinct = list({tuple(sizes.items()): sizes for sizes in plain}.values())
        for kernel, candidates in (("flow_backward", staged), ("flow_weight_gradient", distinct)):
            cases.append(TuningCase(kernel, key, candidates, _backward_problem(channels, side, kernel), tolerance))
    return cases


def _candidates(channels: int) -> list[dict[str, int]]:
    """Tiles to try: those of which a thread's registers hold its share, in few enough combinations for a few minutes.

    Narrow rows may stay in registers (BK 0); wide ones would spill.
    """
    k = tile_channels(channels)
    others = ((32, 32, 2), (64, 32, 2), (64, 64, 2), (32, 32, 3))
    if k <= 32:
        others = ((32, 0, 2), (64, 0, 2), (64, 0, 3), (32, 32, 2))
    found = []
    for bm, warps in ((16, 8), (32, 4), (32, 8), (64, 4), (64, 8), (128, 8)):
        # Values of a half's tile in a thread: its sums, its state and its operands take a multiple of that.
        if bm * k <= 32 * warps * (32 if k <= 64 else 64):
            for bh, bk, stages in others:
                found.append({"BM": bm, "BH": bh, "BK": bk, "num_warps": warps, "num_stages": stages})
    return found


def random_weights(channels: int, side: int, device: torch.device, layers: int = 8) -> FlowWeights:
    """Weights of the size that a new flow starts with, for maps of side x side and float16 operands."""
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
        1 + draw(channels, bound=0.1), 0.1 + draw(channels, bound=0.01), draw(channels, bound=0.1), rotation,
        (codes[0], codes[1]), False, False, torch.float16,
    )  # fmt: skip


Problem = Callable[[torch.device], Callable[[Mapping[str, int]], Sequence[Tensor]]]


def _forward_problem(channels: int, side: int, raster: bool) -> Problem:
    def prepare(device: torch.device) -> Callable[[Mapping[str, int]], Sequence[Tensor]]:
        weights = random_weights(channels, side, device)
        rows = _rows(channels, side, raster, device)

        def run(tiles: Mapping[str, int]) -> Sequence[Tensor]:
            result = _forward(rows, weights, channels, tiles, save=not raster)
            return result.lp, result.log_det

        return run

    return prepare


def _backward_problem(channels: int, side: int, kernel: str) -> Problem:
    key = tile_key(channels, "float16")

    def prepare(device: torch.device) -> Callable[[Mapping[str, int]], Sequence[Tensor]]:
        weights = random_weights(channels, side, device)
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
            return gradients.w1, gradients.w2, gradients.b1, gradients.global_scale

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
