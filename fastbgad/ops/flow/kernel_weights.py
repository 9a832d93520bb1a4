"""Prepared weights of the kernels, and the operator `fastbgad::flow_pack` that lays them out in one launch.

Preparation stands outside of the operators that compute the flow: a frozen flow does it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ...flow_spec import CouplingWeights, FlowSpec, GlobalAffine
from ...kernels.device_cache import DeviceCache
from ..dispatch import MatmulPrecision, OperandPrecision, resolve_matmul_precision
from ..positional import PositionalRows
from ..registration import register
from .backend import FlowCall
from .folded import global_affine_scale


class Geometry(NamedTuple):
    """Everything that shapes the prepared weights besides the flow itself."""

    height: int  # of the map whose positions condition the flow; 1 without positions
    width: int
    positions: bool  # the condition is `PositionalRows`
    dense: bool  # the condition is a tensor
    matmul_precision: OperandPrecision

    @classmethod
    def of(cls, condition: PositionalRows | Tensor | None, matmul_precision: MatmulPrecision) -> Geometry:
        """Return the geometry of a condition."""
        operands = resolve_matmul_precision(matmul_precision)
        if isinstance(condition, PositionalRows):
            return cls(condition.height, condition.width, True, False, operands)
        return cls(1, 1, False, condition is not None, operands)


class FlowPack(NamedTuple):
    """Prepared weights of the kernels (`fastbgad.kernels.flow.weights.FlowWeights`), for one geometry."""

    tensors: list[Tensor]
    geometry: Geometry


class PackOptions(NamedTuple):
    """Options of the operator, in its order."""

    height: int
    width: int
    channels: int
    hidden: int
    condition_channels: int
    dense: bool
    affine: str
    hard: bool
    half: bool


def prepare(call: FlowCall) -> FlowPack:
    """Return the weights of a call as the kernels read them."""
    return pack_flow(call.layers, call.spec, Geometry.of(call.condition, call.options.matmul_precision))


@torch.no_grad()
def pack_flow(layers: Sequence[CouplingWeights], spec: FlowSpec, geometry: Geometry) -> FlowPack:
    """Prepare a flow's weights, in one launch where they are float32; the cost does not depend on the number of rows.

    Later changes of the weights do not reach the result.
    """
    codes = None
    if geometry.positions:
        codes = stacked_codes(geometry.height, geometry.width, spec.condition_channels, layers[0].w1.device)
    weights = [tensor.detach() for layer in layers for tensor in layer]
    options = PackOptions(
        geometry.height,
        geometry.width,
        spec.channels,
        spec.hidden_channels,
        spec.condition_channels,
        geometry.dense,
        spec.global_affine,
        spec.hard_permutation,
        half=geometry.matmul_precision == "float16",
    )
    plain = spec.hard_permutation or any(t.dtype != torch.float32 or not t.is_contiguous() for t in weights)
    pack = plain_pack if plain else flow_pack
    return FlowPack(list(pack(weights, codes, *options)), geometry)


_codes = DeviceCache[Tensor](64)


def stacked_codes(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Return the codes of a map's lines above those of its columns, float32 [height + width, PP / 2], zero-padded."""
    key = height, width, channels, device
    return _codes.get(key, device, lambda: _stack_codes(*key))


def _stack_codes(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    from ...kernels.flow.weights import tile_condition

    columns, lines = PositionalRows(height, width, channels=channels).codes(torch.float32, device)
    codes = columns.new_zeros(height + width, tile_condition(channels) // 2)
    codes[:, : channels // 2] = torch.cat([lines, columns])
    return codes


def plain_pack(weights: list[Tensor], codes: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """Return what the operator returns, in plain PyTorch, for tensors of any type and for hard permutations."""
    from ...kernels.flow.weights import pack

    options, per_layer = PackOptions(*arguments), len(CouplingWeights._fields)
    stacked = [torch.stack(weights[i::per_layer]).float() for i in range(per_layer)]
    w1, b1, w2, b2, global_scale, offset, w_perm = stacked
    g, slope = global_affine_scale(global_scale, cast(GlobalAffine, options.affine))
    codes_by_axis = None
    if codes is not None:
        used = codes[:, : options.condition_channels // 2]
        codes_by_axis = used[: options.height], used[options.height :]
    operand = torch.float16 if options.half else torch.float32
    return tuple(pack(w1, b1, w2, b2, g, slope, offset, w_perm, codes_by_axis, options.dense, options.hard, operand))


def _launch(
    weights: list[Tensor],
    codes: Tensor | None,
    height: int,
    width: int,
    channels: int,
    hidden: int,
    condition_channels: int,
    dense: bool,
    affine: str,
    hard: bool,
    half: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return `fastbgad.kernels.flow.weights.FlowWeights` of contiguous float32 weights with a soft permutation."""
    from ...kernels.flow.pack import flow_pack

    packed: Any = tuple(
        flow_pack(
            weights,
            codes,
            (height, width),
            channels=channels,
            hidden=hidden,
            condition_channels=condition_channels,
            dense=dense,
            activation=affine,
            operand=torch.float16 if half else torch.float32,
        )
    )
    return packed


def fake_pack(weights: list[Tensor], codes: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """Return empty tensors like the operator's results."""
    options = PackOptions(*arguments)._replace(hard=False)
    return tuple(torch.empty_like(tensor) for tensor in plain_pack(weights, codes, *options))


flow_pack: Any = register("flow_pack", _launch, fake=fake_pack)
