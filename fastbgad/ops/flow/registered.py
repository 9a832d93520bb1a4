"""The flow's kernels as registered operators, and the weights as the kernels want them.

Two operators, one registered boundary per hot call:

- `fastbgad::flow_infer`: log-likelihoods without gradients, from packed weights alone;
- `fastbgad::flow_train`: the same with what the backward needs; its gradient is `fastbgad::flow_train_backward`.

Packing is plain PyTorch outside the operators: a compiler may fuse it, and a frozen flow packs once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ...errors import BackendError
from ...flow_spec import CouplingWeights, FlowSpec, GlobalAffine
from ...kernels.device_cache import DeviceCache
from ..dispatch import MatmulPrecision, interpreting, resolve_matmul_precision
from ..positional import PositionalRows
from .folded import global_affine_scale
from .gradient_scale import gradient_scale

# Rows whose activations the backward holds at a time when it makes them again instead of reading them.
RECOMPUTE_ROWS = 65536
# From this many rows on the saved activations would take gigabytes, and `recompute=None` recomputes.
MOST_SAVED_ROWS = 262_144


class Geometry(NamedTuple):
    """Everything that shapes the packed weights besides the flow itself."""

    height: int  # of the map whose positions condition the flow; 1 without positions
    width: int
    positions: bool  # the condition is `PositionalRows`
    dense: bool  # the condition is a tensor
    matmul_precision: MatmulPrecision  # never "auto"

    @classmethod
    def of(cls, condition: PositionalRows | Tensor | None, matmul_precision: MatmulPrecision) -> Geometry:
        """Return the geometry of a condition."""
        operands = resolve_matmul_precision(matmul_precision)
        if isinstance(condition, PositionalRows):
            return cls(condition.height, condition.width, True, False, operands)
        return cls(1, 1, False, condition is not None, operands)


class FlowPack(NamedTuple):
    """A flow's weights as the kernels read them (`fastbgad.kernels.flow.weights.FlowWeights`), for one geometry."""

    tensors: list[Tensor]
    geometry: Geometry


@torch.no_grad()
def pack_flow(layers: Sequence[CouplingWeights], spec: FlowSpec, geometry: Geometry) -> FlowPack:
    """Packs a flow, in one launch where its tensors are float32; the cost does not depend on the number of rows.

    The result is a snapshot: later changes of the weights do not reach it.
    """
    codes = None
    if geometry.positions:
        codes = stacked_codes(geometry.height, geometry.width, spec.condition_channels, layers[0].w1.device)
    weights = [tensor.detach() for layer in layers for tensor in layer]
    plain = spec.hard_permutation or any(t.dtype != torch.float32 or not t.is_contiguous() for t in weights)
    pack = _plain_pack if plain else flow_pack
    shape = (geometry.height, geometry.width, spec.channels, spec.hidden_channels, spec.condition_channels)
    half = geometry.matmul_precision == "float16"
    packed = pack(weights, codes, *shape, geometry.dense, spec.global_affine, spec.hard_permutation, half)
    return FlowPack(list(packed), geometry)


_codes = DeviceCache[Tensor](64)


def stacked_codes(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """The codes of a map's lines and then of its columns, float32 [height + width, PP / 2], padded with zeros."""
    key = height, width, channels, device
    return cast(Tensor, _codes.get(key, device, lambda: _stack_codes(*key)))


def _stack_codes(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    from ...kernels.flow.weights import tile_condition

    columns, lines = PositionalRows(height, width, channels=channels).codes(torch.float32, device)
    codes = columns.new_zeros(height + width, tile_condition(channels) // 2)
    codes[:, : channels // 2] = torch.cat([lines, columns])
    return codes


def infer(
    x: Tensor,  # [R, C]
    pack: FlowPack,
    spec: FlowSpec,
    condition: PositionalRows | Tensor | None,
    rows: Tensor | None,  # [N]
    return_z: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """lp [N], log_det [N] and z [N, C] if asked."""
    lp, log_det, latent = flow_infer(
        _unit_stride(x), pack.tensors, *_where(pack.geometry, condition, rows, x.device), spec.hidden_channels,
        spec.clamp, spec.clamp_form == "scaled_tanh", return_z,
    )  # fmt: skip
    return lp, log_det, latent if return_z else None


def train(
    x: Tensor,  # [R, C]
    layers: Sequence[CouplingWeights],
    spec: FlowSpec,
    condition: PositionalRows | Tensor | None,
    rows: Tensor | None,  # [N]
    return_z: bool,
    matmul_precision: MatmulPrecision,
    recompute: bool | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`infer` with gradients of every weight and of x (which then must not be gathered by `rows`)."""
    pack = pack_flow(layers, spec, Geometry.of(condition, matmul_precision))
    count = len(x) if rows is None else len(rows)
    lp, log_det, z, *_ = flow_train(
        _unit_stride(x), [tensor for layer in layers for tensor in layer], pack.tensors,
        *_where(pack.geometry, condition, rows, x.device), spec.condition_channels, spec.hidden_channels, spec.clamp,
        spec.clamp_form == "scaled_tanh", return_z,
        count > MOST_SAVED_ROWS if recompute is None else recompute,
    )  # fmt: skip
    return lp, log_det, z if return_z else None


def _unit_stride(x: Tensor) -> Tensor:
    """The kernels read rows whose channels lie side by side; the rows themselves may be apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _where(
    geometry: Geometry, condition: PositionalRows | Tensor | None, rows: Tensor | None, device: torch.device
) -> tuple[Tensor | None, bool, Tensor | None, int, int]:
    """index, gather, dense condition, height and width, as the operators take them."""
    index = rows
    if rows is None and isinstance(condition, PositionalRows) and condition.index is not None:
        index = condition.index.to(device)
    dense = condition.contiguous() if isinstance(condition, Tensor) else None
    return index, rows is not None, dense, geometry.height, geometry.width


def _rows(x: Tensor, index: Tensor | None, gather: bool, condition: Tensor | None, height: int, width: int) -> Any:
    from ...kernels.flow.forward import Rows

    return Rows(x, height, width, index, gather, condition)


def _weights(packed: Sequence[Tensor]) -> Any:
    from ...kernels.flow.weights import FlowWeights

    return FlowWeights(*packed)


def _tiles(kernel: str, x: Tensor, packed: Sequence[Tensor], raster: bool = False) -> Mapping[str, int]:
    from ...kernels.flow.forward import tile_key
    from ...kernels.tile_sizes import tiles

    operand = str(packed[0].dtype).removeprefix("torch.")
    return tiles(kernel, tile_key(x.shape[1], operand, raster), x.device)


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _register(name: str, function: Callable[..., Any]) -> Any:
    """Registers an operator for CUDA, and for CPU tensors under the interpreter."""

    def on_cpu(*arguments: Any) -> Any:
        if not interpreting():
            raise BackendError(f"fastbgad::{name} runs on CUDA tensors; trace the model with impl='torch' for a CPU")
        return function(*arguments)

    operator = torch.library.custom_op(f"fastbgad::{name}", function, mutates_args=(), device_types="cuda")
    operator.register_kernel("cpu")(on_cpu)
    return operator


# ---------------------------------------------------------------- packing


def _plain_pack(
    weights: list[Tensor], codes: Tensor | None, height: int, width: int, channels: int, hidden: int,
    condition_channels: int, dense: bool, affine: str, hard: bool, half: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Packing in plain PyTorch, for tensors of any type and for hard permutations."""
    from ...kernels.flow.weights import pack

    per_layer = len(CouplingWeights._fields)
    stacked = [torch.stack(weights[i::per_layer]).float() for i in range(per_layer)]
    w1, b1, w2, b2, global_scale, offset, w_perm = stacked
    g, slope = global_affine_scale(global_scale, cast(GlobalAffine, affine))
    places = None
    if codes is not None:
        used = codes[:, : condition_channels // 2]
        places = used[:height], used[height:]
    operand = torch.float16 if half else torch.float32
    return tuple(pack(w1, b1, w2, b2, g, slope, offset, w_perm, places, dense, hard, operand))


def _flow_pack(
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
    """`fastbgad.kernels.flow.weights.FlowWeights` of contiguous float32 weights with a soft permutation."""
    from ...kernels.flow.pack import flow_pack

    return tuple(
        flow_pack(
            weights, codes, (height, width), channels=channels, hidden=hidden, condition_channels=condition_channels,
            dense=dense, activation=affine, operand=torch.float16 if half else torch.float32,
        )
    )  # fmt: skip


flow_pack = _register("flow_pack", _flow_pack)


@flow_pack.register_fake
def _flow_pack_fake(
    weights: list[Tensor], codes: Tensor | None, height: int, width: int, channels: int, hidden: int,
    condition_channels: int, dense: bool, affine: str, hard: bool, half: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        torch.empty_like(tensor)
        for tensor in _plain_pack(
            weights, codes, height, width, channels, hidden, condition_channels, dense, affine, False, half
        )
    )


# ---------------------------------------------------------------- inference


def _flow_infer(
    x: Tensor,
    packed: list[Tensor],
    index: Tensor | None,
    gather: bool,
    condition: Tensor | None,
    height: int,
    width: int,
    hidden: int,
    clamp: float,
    scaled_tanh: bool,
    want_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """lp [N], log_det [N] and z ([N, C], or [0, C] if not wanted), float32."""
    from ...kernels.flow.forward import flow_forward, is_raster

    rows, weights = _rows(x, index, gather, condition, height, width), _weights(packed)
    result = flow_forward(
        rows, weights, channels=x.shape[1], hidden=hidden, clamp=clamp, scaled_tanh=scaled_tanh, want_z=want_z,
        tiles=_tiles("flow_forward", x, packed, is_raster(rows, weights) and not want_z),
    )  # fmt: skip
    return result.lp, result.log_det, result.z if result.z is not None else result.lp.new_empty(0, x.shape[1])


flow_infer = _register("flow_infer", _flow_infer)


@flow_infer.register_fake
def _flow_infer_fake(
    x: Tensor, packed: list[Tensor], index: Tensor | None, gather: bool, condition: Tensor | None, height: int,
    width: int, hidden: int, clamp: float, scaled_tanh: bool, want_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    count = x.shape[0] if index is None else index.shape[0]
    return _empty(x, count), _empty(x, count), _empty(x, count if want_z else 0, x.shape[1])


# ---------------------------------------------------------------- training


def _flow_train(
    x: Tensor,
    weights: list[Tensor],
    packed: list[Tensor],
    index: Tensor | None,
    gather: bool,
    condition: Tensor | None,
    height: int,
    width: int,
    condition_channels: int,
    hidden: int,
    clamp: float,
    scaled_tanh: bool,
    want_z: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`flow_infer`'s results and `fastbgad.kernels.flow.forward.Saved` (empty if `recompute`).

    `weights` are the tensors that `packed` was made from, seven per layer; they are here for their gradients.
    """
    from ...kernels.flow.forward import flow_forward

    result = flow_forward(
        _rows(x, index, gather, condition, height, width), _weights(packed), channels=x.shape[1], hidden=hidden,
        clamp=clamp, scaled_tanh=scaled_tanh, want_z=want_z, save=not recompute,
        tiles=_tiles("flow_forward", x, packed),
    )  # fmt: skip
    z = result.z if result.z is not None else result.lp.new_empty(0, x.shape[1])
    saved = result.saved if result.saved is not None else [packed[0].new_empty(0) for _ in range(4)]
    return result.lp, result.log_det, z, *saved


flow_train = _register("flow_train", _flow_train)


@flow_train.register_fake
def _flow_train_fake(
    x: Tensor, weights: list[Tensor], packed: list[Tensor], index: Tensor | None, gather: bool,
    condition: Tensor | None, height: int, width: int, condition_channels: int, hidden: int, clamp: float,
    scaled_tanh: bool, want_z: bool, recompute: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    from ...kernels.flow.weights import saved_stride

    count, channels = x.shape[0] if index is None else index.shape[0], x.shape[1]
    layers = len(weights) // len(CouplingWeights._fields)
    operand, stride = packed[0].dtype, saved_stride(channels)
    results = _empty(x, count), _empty(x, count), _empty(x, count if want_z else 0, channels)
    if recompute:
        return *results, *(_empty(x, 0, dtype=operand) for _ in range(4))
    return (
        *results,
        _empty(x, count, channels),
        _empty(x, layers, 2, count, stride, dtype=operand),
        _empty(x, layers, count, stride, dtype=operand),
        _empty(x, layers, count, stride),
    )


def _flow_train_backward(
    x: Tensor,
    packed: list[Tensor],
    saved: list[Tensor],
    lp: Tensor,
    d_lp: Tensor | None,
    d_log_det: Tensor | None,
    d_z: Tensor | None,
    index: Tensor | None,
    gather: bool,
    condition: Tensor | None,
    height: int,
    width: int,
    condition_channels: int,
    hidden: int,
    clamp: float,
    scaled_tanh: bool,
    want_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x ([0] if not wanted) and of w1, b1, w2, b2, global_scale and global_offset, stacked [L, ...]."""
    from ...kernels.flow.backward import FlowGradients, flow_backward
    from ...kernels.flow.forward import Saved, flow_forward

    channels, count, flow_weights = x.shape[1], len(lp), _weights(packed)
    rows = _rows(x, index, gather, condition, height, width)
    usable = torch.isfinite(lp)
    d_lp = torch.zeros_like(lp) if d_lp is None else torch.where(usable, d_lp.float(), 0)
    d_log_det = torch.zeros_like(lp) if d_log_det is None else torch.where(usable, d_log_det.float(), 0)
    d_z = None if d_z is None else torch.where(usable[:, None], d_z.float(), 0).contiguous()
    scale = gradient_scale(d_lp / channels, d_log_det, d_z)
    shape = {"channels": channels, "hidden": hidden, "clamp": clamp, "scaled_tanh": scaled_tanh}
    forward_tiles = _tiles("flow_forward", x, packed)
    tiles = {
        "tiles": _tiles("flow_backward", x, packed),
        "weight_tiles": _tiles("flow_weight_gradient", x, packed),
    }
    recompute = not saved[0].numel()
    step = RECOMPUTE_ROWS if recompute else max(count, 1)
    total: FlowGradients | None = None
    d_x: list[Tensor] = []
    for start in range(0, max(count, 1), step):
        part = slice(start, start + step)
        chunk = rows.slice(start, start + step) if recompute else rows
        kept = Saved(*saved)
        if recompute:
            again = flow_forward(chunk, flow_weights, save=True, tiles=forward_tiles, **shape)
            assert again.saved is not None
            kept = again.saved
        gradients = flow_backward(
            chunk, flow_weights, kept, lp[part], d_lp[part], d_log_det[part], None if d_z is None else d_z[part],
            scale, condition_channels=condition_channels, want_dx=want_dx, **shape, **tiles,
        )  # fmt: skip
        if gradients.x is not None:
            d_x.append(gradients.x)
        total = gradients if total is None else FlowGradients(
            *(a + b for a, b in zip(total[:-1], gradients[:-1], strict=True)), None
        )  # fmt: skip
    assert total is not None
    x_gradient = torch.cat(d_x) if want_dx else lp.new_empty(0)
    return x_gradient, *total[:-1]


flow_train_backward = _register("flow_train_backward", _flow_train_backward)


@flow_train_backward.register_fake
def _flow_train_backward_fake(
    x: Tensor, packed: list[Tensor], saved: list[Tensor], lp: Tensor, d_lp: Tensor | None, d_log_det: Tensor | None,
    d_z: Tensor | None, index: Tensor | None, gather: bool, condition: Tensor | None, height: int, width: int,
    condition_channels: int, hidden: int, clamp: float, scaled_tanh: bool, want_dx: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    layers, channels = packed[0].shape[0], x.shape[1]
    c2 = channels // 2
    shapes = [
        (lp.shape[0], channels) if want_dx else (0,), (layers, hidden, channels - c2 + condition_channels),
        (layers, hidden), (layers, 2 * c2, hidden), (layers, 2 * c2), (layers, channels), (layers, channels),
    ]  # fmt: skip
    return tuple(_empty(x, *shape) for shape in shapes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, packed, index, gather, condition, *options = inputs
    lp, _, _, *saved = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, index, condition, lp, *saved, *weights, *packed)
    ctx.layers, ctx.gather, ctx.options = len(weights) // len(CouplingWeights._fields), gather, options


def _backward(ctx: Any, d_lp: Tensor | None, d_log_det: Tensor | None, d_z: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, index, condition, lp, *rest = ctx.saved_tensors
    per_layer = len(CouplingWeights._fields)
    saved, weights, packed = rest[:4], rest[4 : 4 + per_layer * ctx.layers], rest[4 + per_layer * ctx.layers :]
    height, width, condition_channels, hidden, clamp, scaled_tanh, want_z, _ = ctx.options
    want_dx = ctx.needs_input_grad[0]
    d_x, *stacked = flow_train_backward(
        x, packed, saved, lp, d_lp, d_log_det, d_z if want_z else None, index, ctx.gather, condition,
        height, width, condition_channels, hidden, clamp, scaled_tanh, want_dx,
    )  # fmt: skip
    d_weights: list[Tensor | None] = []
    for layer in range(ctx.layers):
        tensors = weights[layer * per_layer : (layer + 1) * per_layer]
        d_weights += [g[layer].to(t.dtype) for g, t in zip(stacked, tensors[:-1], strict=True)]
        d_weights.append(None)  # W_perm is fixed
    nothing = (None,) * (3 + len(ctx.options))
    return d_x.to(x.dtype) if want_dx else None, d_weights, [None] * len(packed), *nothing


flow_train.register_autograd(_backward, setup_context=_setup_context)
