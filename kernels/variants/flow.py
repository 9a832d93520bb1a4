"""The flow's kernels in the configurations that they ship in and that are tried on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..flow.backward import flow_backward, flow_backward_kernel
from ..flow.condition import DENSE, RASTER, TABLES
from ..flow.forward import ForwardResult, flow_forward, flow_forward_kernel
from ..flow.pack import BLOCK, flow_pack_kernel
from ..flow.rows import Rows, raster_tile, tile_key
from ..flow.unpack import PARTIAL_TILES, flow_unpack_kernel
from ..flow.weight_gradient import flow_weight_gradient_kernel
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
# Types of the kernels' arguments: pointers to operands, to integers, to float32 (all others), and numbers.
OPERANDS = (
    *("w1x_ptr", "w1p_ptr", "table_ptr", "codes_ptr", "w2_ptr", "perm_ptr", "stage_ptr"),
    *("saved_x_ptr", "saved_y2_ptr", "d_pre_ptr"),
)
INTEGERS = {"index_ptr": "*i64", "perm_index_ptr": "*i32", "addresses_ptr": "*i64"}
NUMBERS = {"clamp": "fp32", "inner_clamp": "fp32"}


def variants() -> list[Variant]:
    """Return the configurations compiled ahead of time, for every size of tile and both types of operands.

    They are inference on maps, training on gathered rows, and a dense condition. For two sizes there are also the modes
    that drop-in users need: the latent, gradients of it and of the features, and a hard permutation.
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
        "WANT_Z": latent,
        "SAVE": kind == TABLES,
        "TW": block[1],
        "KT": max(16, triton.next_power_of_2(sum(block))),
        "HARD": hard,
    }
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
    """Return a kernel's variant on a flow as in BGAD: P = 128, H = 2 (C1 + P); rows with tables are gathered."""
    hidden = hidden_channels(channels)
    values = {
        "C": channels,
        "K": tile_channels(channels),
        "H": hidden,
        "HP": -(-hidden // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE,
        "P": CONDITION_CHANNELS if kind == DENSE else 0,
        "PP": CONDITION_CHANNELS,
        "COND": kind,
        "HAS_INDEX": kind == TABLES,
        "GATHER": kind == TABLES,
        "HARD": False,
        "CS": saved_stride(channels),
        "NS": sizes["num_stages"],
        **sizes,
        **constants,
    }
    operand = {"float16": "*fp16", "float32": "*fp32"}[precision]
    types, used = {}, {}
    for argument in kernel.arg_names:
        if argument in values:
            used[argument] = values[argument]
        elif argument.endswith("_ptr"):
            types[argument] = INTEGERS.get(argument, operand if argument in OPERANDS else "*fp32")
        else:
            types[argument] = NUMBERS.get(argument, "i32")
    title = f"{name} C={channels} {KINDS[kind]} {precision}"
    return Variant(title, kernel, types, used, sizes["num_warps"], sizes["num_stages"])


def _pack_variants(channels: int, kind: int) -> list[Variant]:
    """Return the variants that prepare float16 operands from float32 weights, and that unpack their gradients."""
    sizes = {"BH": BLOCK, "BT": PARTIAL_TILES, "num_warps": 8, "num_stages": 2}
    constants = {"ACTIVATION": 0, "P": CONDITION_CHANNELS}
    found = []
    for name, kernel in (("flow_pack", flow_pack_kernel), ("flow_unpack", flow_unpack_kernel)):
        variant = _variant(kernel, name, channels, "float16", kind, sizes, constants)
        # These kernels read the codes as they are, before they become operands.
        codes = {"codes_ptr": "*fp32"} if "codes_ptr" in variant.types else {}
        found.append(variant._replace(types={**variant.types, **codes}))
    return found


def hidden_channels(channels: int) -> int:
    """Return H of a conditional flow as in BGAD and CFLOW-AD."""
    return 2 * (channels - channels // 2 + CONDITION_CHANNELS)


def tuning_cases() -> list[TuningCase]:
    """Return the cases: maps of a 1024-pixel image, and training on 4096 gathered rows, with float16 operands.

    float32 operands are for checking; they keep their default tile sizes.
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
    """Return tile sizes to try: those whose share fits in a thread's registers, few enough for a few minutes.

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
    """Return weights of the size that a new flow starts with, for maps of side x side and float16 operands."""
    generator = torch.Generator().manual_seed(channels)
    hidden, c2 = hidden_channels(channels), channels // 2
    inputs = channels - c2 + CONDITION_CHANNELS

    def draw(*shape: int, bound: float) -> Tensor:
        return ((2 * torch.rand(layers, *shape, generator=generator) - 1) * bound).to(device)

    rotation = torch.linalg.qr(torch.randn(layers, channels, channels, generator=generator)).Q.to(device)
    codes = torch.randn(2, side, CONDITION_CHANNELS // 2, generator=generator).clamp(-1, 1).to(device)
    return pack(
        w1=draw(hidden, inputs, bound=inputs**-0.5),
        b1=draw(hidden, bound=inputs**-0.5),
        w2=draw(2 * c2, hidden, bound=hidden**-0.5),
        b2=draw(2 * c2, bound=hidden**-0.5),
        g=1 + draw(channels, bound=0.1),
        slope=0.1 + draw(channels, bound=0.01),
        offset=draw(channels, bound=0.1),
        w_perm=rotation,
        codes=(codes[0], codes[1]),
        dense=False,
        hard=False,
        dtype=torch.float16,
    )


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
                rows,
                weights,
                saved,
                forward.lp,
                d_lp,
                d_log_det=torch.zeros_like(d_lp),
                d_z=None,
                scale=torch.full((1,), 16.0 * channels, device=device),
                channels=channels,
                hidden=hidden_channels(channels),
                condition_channels=CONDITION_CHANNELS,
                clamp=CLAMP,
                scaled_tanh=False,
                tiles=chosen["flow_backward"],
                weight_tiles=chosen["flow_weight_gradient"],
            )
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
        rows,
        weights,
        channels=channels,
        hidden=hidden_channels(channels),
        clamp=CLAMP,
        scaled_tanh=False,
        save=save,
        tiles=tiles,
    )
