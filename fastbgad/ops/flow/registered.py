"""The flow's kernels as registered operators, for flows whose rows stay on the chip through all layers.

Two operators, one registered boundary per hot call:

- `fastbgad::flow_infer`: log-likelihoods without gradients, from prepared weights alone;
- `fastbgad::flow_train`: the same with what the backward needs; its gradient is `fastbgad::flow_train_backward`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError
from ...flow_spec import CouplingWeights
from ..registration import empty, register
from .backend import FlowCall, FlowResult
from .gradient_scale import gradient_scale
from .kernel_weights import FlowPack, Geometry, prepare

# Rows whose activations the backward holds at a time when it recomputes them instead of reading saved ones.
RECOMPUTE_ROWS = 65536
# From this many rows on the saved activations would take gigabytes, and `recompute=None` recomputes.
MOST_SAVED_ROWS = 262_144


def infer(call: FlowCall, prepared: object = None) -> FlowResult:
    """Return lp [N], log_det [N] and z [N, C] if asked.

    Raises:
        ConfigError: the weights were prepared for another geometry.
    """
    call, spec, return_z = _gathered_for_gradient(call), call.spec, call.options.return_z
    geometry = Geometry.of(call.condition, call.options.matmul_precision)
    if not isinstance(prepared, FlowPack):
        prepared = prepare(call)
    elif prepared.geometry != geometry:
        raise ConfigError(f"the weights were prepared for {prepared.geometry} but are used for {geometry}")
    shape = spec.hidden_channels, spec.clamp, spec.clamp_form == "scaled_tanh"
    lp, log_det, z = flow_infer(_unit_stride(call.x), prepared.tensors, *Rows.of(call), *shape, return_z)
    return lp, log_det, z if return_z else None


def train(call: FlowCall) -> FlowResult:
    """Return the same with gradients of every weight and of x."""
    call, spec, options = _gathered_for_gradient(call), call.spec, call.options
    count = len(call.x) if call.rows is None else len(call.rows)
    recompute = count > MOST_SAVED_ROWS if options.recompute is None else options.recompute
    shape = spec.condition_channels, spec.hidden_channels, spec.clamp, spec.clamp_form == "scaled_tanh"
    tensors = prepare(call).tensors
    lp, log_det, z, *_ = flow_train(
        _unit_stride(call.x), call.weights, tensors, *Rows.of(call), *shape, options.return_z, recompute
    )
    return lp, log_det, z if options.return_z else None


def _gathered_for_gradient(call: FlowCall) -> FlowCall:
    """Return the call with its rows gathered where x has a gradient; else the kernels gather them."""
    return call.gathered() if call.x.requires_grad else call


def _unit_stride(x: Tensor) -> Tensor:
    """Return rows whose channels lie side by side, as the kernels read them; the rows themselves may be apart."""
    return x if x.stride(1) == 1 else x.contiguous()


class Rows(NamedTuple):
    """The rows of x and their condition, in the order of the operators' arguments."""

    indices: Tensor | None  # [N], positions, or rows of x with `gather`
    gather: bool
    condition: Tensor | None  # [N, P]
    height: int  # of the map; 1 without positions
    width: int

    @staticmethod
    def of(call: FlowCall) -> Rows:
        """Return the rows of a call."""
        indices, positions = call.rows, call.positions
        if indices is None and positions is not None and positions.index is not None:
            indices = positions.index.to(call.x.device)
        dense = None if call.dense is None else call.dense.contiguous()
        height, width = (1, 1) if positions is None else (positions.height, positions.width)
        return Rows(indices, call.rows is not None, dense, height, width)

    def for_kernels(self, x: Tensor) -> Any:
        """Return what the kernels' launchers take."""
        from ...kernels.flow import forward

        return forward.Rows(x, self.height, self.width, self.indices, self.gather, self.condition)


def _weights(packed: Sequence[Tensor]) -> Any:
    from ...kernels.flow.weights import FlowWeights

    return FlowWeights(*packed)


def _tiles(kernel: str, x: Tensor, packed: Sequence[Tensor], raster: bool = False) -> Mapping[str, int]:
    from ...kernels.flow.forward import tile_key
    from ...kernels.tile_sizes import tiles

    operand = str(packed[0].dtype).removeprefix("torch.")
    return tiles(kernel, tile_key(x.shape[1], operand, raster), x.device)


def _launch_infer(
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
    """Return lp [N], log_det [N] and z ([N, C], or [0, C] if not wanted), float32."""
    from ...kernels.flow.forward import flow_forward, is_raster

    rows, weights = Rows(index, gather, condition, height, width).for_kernels(x), _weights(packed)
    result = flow_forward(
        rows,
        weights,
        channels=x.shape[1],
        hidden=hidden,
        clamp=clamp,
        scaled_tanh=scaled_tanh,
        want_z=want_z,
        tiles=_tiles("flow_forward", x, packed, is_raster(rows, weights) and not want_z),
    )
    return result.lp, result.log_det, result.z if result.z is not None else result.lp.new_empty(0, x.shape[1])


def _fake_infer(x: Tensor, packed: list[Tensor], index: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    count, want_z = x.shape[0] if index is None else index.shape[0], arguments[-1]
    return empty(x, count), empty(x, count), empty(x, count if want_z else 0, x.shape[1])


flow_infer: Any = register("flow_infer", _launch_infer, fake=_fake_infer)


def _launch_train(
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
    """Return the results of `flow_infer` and `fastbgad.kernels.flow.forward.Saved` (empty if `recompute`).

    `weights` are the tensors that `packed` was made from, seven per layer; they are here for their gradients.
    """
    from ...kernels.flow.forward import flow_forward

    result = flow_forward(
        Rows(index, gather, condition, height, width).for_kernels(x),
        _weights(packed),
        channels=x.shape[1],
        hidden=hidden,
        clamp=clamp,
        scaled_tanh=scaled_tanh,
        want_z=want_z,
        save=not recompute,
        tiles=_tiles("flow_forward", x, packed),
    )
    z = result.z if result.z is not None else result.lp.new_empty(0, x.shape[1])
    saved = result.saved if result.saved is not None else [packed[0].new_empty(0) for _ in range(4)]
    return result.lp, result.log_det, z, *saved


def _fake_train(
    x: Tensor, weights: list[Tensor], packed: list[Tensor], index: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    from ...kernels.flow.weights import saved_stride

    *_, want_z, recompute = arguments
    count, channels = x.shape[0] if index is None else index.shape[0], x.shape[1]
    layers = len(weights) // len(CouplingWeights._fields)
    operand, stride = packed[0].dtype, saved_stride(channels)
    results = empty(x, count), empty(x, count), empty(x, count if want_z else 0, channels)
    if recompute:
        return *results, *(empty(x, 0, dtype=operand) for _ in range(4))
    return (
        *results,
        empty(x, count, channels),
        empty(x, layers, 2, count, stride, dtype=operand),
        empty(x, layers, count, stride, dtype=operand),
        empty(x, layers, count, stride),
    )


class Upstream(NamedTuple):
    """Upstream gradients without those of lost rows, float32."""

    d_lp: Tensor  # [N]
    d_log_det: Tensor  # [N]
    d_z: Tensor | None  # [N, C]

    @staticmethod
    def of(lp: Tensor, d_lp: Tensor | None, d_log_det: Tensor | None, d_z: Tensor | None) -> Upstream:
        """Return the gradients with zeros in place of what is not given or belongs to a lost row."""
        usable = torch.isfinite(lp)
        return Upstream(
            torch.zeros_like(lp) if d_lp is None else torch.where(usable, d_lp.float(), 0),
            torch.zeros_like(lp) if d_log_det is None else torch.where(usable, d_log_det.float(), 0),
            None if d_z is None else torch.where(usable[:, None], d_z.float(), 0).contiguous(),
        )

    def part(self, rows: slice) -> Upstream:
        """Return the gradients of some of the rows."""
        return Upstream(self.d_lp[rows], self.d_log_det[rows], None if self.d_z is None else self.d_z[rows])


def _launch_train_backward(
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
    """Return gradients of x ([0] if not wanted) and of all tensors of the layers but W_perm, stacked [L, ...]."""
    from ...kernels.flow.backward import FlowGradients, flow_backward

    channels, weights = x.shape[1], _weights(packed)
    rows = Rows(index, gather, condition, height, width).for_kernels(x)
    upstream = Upstream.of(lp, d_lp, d_log_det, d_z)
    scale = gradient_scale(upstream.d_lp / channels, upstream.d_log_det, upstream.d_z)
    shape: dict[str, Any] = {"channels": channels, "hidden": hidden, "clamp": clamp, "scaled_tanh": scaled_tanh}
    tiles: dict[str, Any] = {
        "tiles": _tiles("flow_backward", x, packed),
        "weight_tiles": _tiles("flow_weight_gradient", x, packed),
    }
    total: FlowGradients | None = None
    d_x: list[Tensor] = []
    for part, chunk, activations in _chunks_with_activations(rows, weights, saved, len(lp), x, packed, shape):
        share = upstream.part(part)
        gradients = flow_backward(
            chunk,
            weights,
            activations,
            lp[part],
            share.d_lp,
            share.d_log_det,
            share.d_z,
            scale,
            condition_channels=condition_channels,
            want_dx=want_dx,
            **shape,
            **tiles,
        )
        if gradients.x is not None:
            d_x.append(gradients.x)
        if total is None:
            total = gradients
        else:
            sums = (a + b for a, b in zip(total[:-1], gradients[:-1], strict=True))
            total = FlowGradients._make([*sums, None])
    assert total is not None
    return torch.cat(d_x) if want_dx else lp.new_empty(0), *total[:-1]


def _chunks_with_activations(
    rows: Any,
    weights: Any,
    saved: list[Tensor],
    count: int,
    x: Tensor,
    packed: Sequence[Tensor],
    shape: Mapping[str, Any],
) -> Iterator[tuple[slice, Any, Any]]:
    """Yield all rows with their saved activations, or, if none were saved, chunks of rows with recomputed ones."""
    from ...kernels.flow.forward import Saved, flow_forward

    if saved[0].numel():
        yield slice(0, max(count, 1)), rows, Saved(*saved)
        return
    tiles = _tiles("flow_forward", x, packed)
    for start in range(0, max(count, 1), RECOMPUTE_ROWS):
        part = slice(start, start + RECOMPUTE_ROWS)
        chunk = rows.slice(part.start, part.stop)
        recomputed = flow_forward(chunk, weights, save=True, tiles=tiles, **shape).saved
        assert recomputed is not None
        yield part, chunk, recomputed


def _fake_train_backward(
    x: Tensor, packed: list[Tensor], saved: list[Tensor], lp: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    condition_channels, hidden, _, _, want_dx = arguments[-5:]
    layers, channels = packed[0].shape[0], x.shape[1]
    c2 = channels // 2
    return (
        empty(x, *((lp.shape[0], channels) if want_dx else (0,))),
        empty(x, layers, hidden, channels - c2 + condition_channels),
        empty(x, layers, hidden),
        empty(x, layers, 2 * c2, hidden),
        empty(x, layers, 2 * c2),
        empty(x, layers, channels),
        empty(x, layers, channels),
    )


flow_train_backward: Any = register("flow_train_backward", _launch_train_backward, fake=_fake_train_backward)


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
    height, width, *shape, want_z, _ = ctx.options
    want_dx = ctx.needs_input_grad[0]
    upstream = d_lp, d_log_det, d_z if want_z else None
    rows = Rows(index, ctx.gather, condition, height, width)
    d_x, *stacked = flow_train_backward(x, packed, saved, lp, *upstream, *rows, *shape, want_dx)
    d_weights: list[Tensor | None] = []
    for layer in range(ctx.layers):
        tensors = weights[layer * per_layer : (layer + 1) * per_layer]
        d_weights += [g[layer].to(t.dtype) for g, t in zip(stacked, tensors[:-1], strict=True)]
        d_weights.append(None)  # W_perm is fixed
    nothing = (None,) * (3 + len(ctx.options))
    return d_x.to(x.dtype) if want_dx else None, d_weights, [None] * len(packed), *nothing


flow_train: Any = register(
    "flow_train", _launch_train, fake=_fake_train, setup_context=_setup_context, backward=_backward
)
