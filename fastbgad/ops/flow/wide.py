"""The flow for more channels than stay on the chip: a library's matrix products around fused coupling kernels.

Per layer and chunk of n rows, with u = [x1 | p] and p the condition:

    hidden = relu(u W1^T + b1)                      library, bias and ReLU in its epilogue    [n, H]
    a = hidden W2^T                                 library                                   [n, 2 * C2]
    v = g [x1, x2 exp(s) + a_t] + offset            one pass, kernels/coupling/forward.py     [n, C]
    x = v W_perm^T                                  library; the kernel moves channels for a hard permutation

The codes of the positions are gathered once per chunk and take part in the first product. At these widths its P extra
columns should cost less than reading and writing all hidden activations once more to add two table rows, and the
gradient of W1 comes from one product too, without sums in an order of their own.

matmul_precision "float16": products of 16-bit operands summed in float32, state and log-determinant in float32. The
permutation would dominate the error, so v and W_perm are split into a high and a low part, see
kernels/coupling/operands.py.
matmul_precision "float32": float32 products. These are the library's, so torch's own switch decides about TF32
(`torch.set_float32_matmul_precision`; off unless switched on).

Lost rows have lp, log_det and z NaN, touch no other row, and are left out of the gradients: rows with a NaN, with a
position outside their map, or with features, condition, hidden units, a or state beyond what the operands can hold
(65504 in float16). A weight beyond it makes all rows lost. One case is not detected: the library may add up parts of
hidden and a in float16 unless `torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction` is switched off, and
a part of a hidden unit below -65504 then switches the unit off.

Training saves 4 C + 4 C2 + 2 H bytes per row and layer in float16 (4.6 KB at C = 512, 16.9 KB at C = 2048, both with
P = 128; 4 C + 8 C2 + 4 H in float32), or nothing, and its backward then runs each chunk forward again.

Equations: fastbgad/reference/flow.py. The arithmetic: wide_products.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ...errors import BackendError
from ...flow_spec import ClampForm, CouplingWeights, FlowSpec, GlobalAffine
from ..log_likelihood.portable import log_likelihood_of_norm
from ..positional import PositionalRows
from ..registration import register
from . import portable
from .backend import FlowCall, FlowOptions, FlowResult, unflatten
from .gradient_scale import gradient_scale
from .wide_products import Condition, Gradients, Saved, Upstream, carry, carry_back, operand_type, stack_weights

# Rows that go through the layers together: enough to fill a GPU, with 0.7 GB of scratch at C = 2048. Not yet measured.
CHUNK_ROWS = 16384
# Training saves activations up to this many bytes; above, the backward runs each chunk forward again.
MOST_SAVED_BYTES = 8 << 30
NO_TRAINING = 'the wide flow trains on CUDA tensors; on a CPU use impl="torch"'


def train(call: FlowCall, *, chunk_rows: int = CHUNK_ROWS) -> FlowResult:
    """Return lp [N], log_det [N] and z [N, C] if asked, float32.

    Differentiable in x, a dense condition and all but W_perm. Activations are saved for the backward up to
    `MOST_SAVED_BYTES`, unless the option `recompute` decides.

    Args:
        call: with features of any type up to float32, and matmul precision "float16" or "float32", see above.
        chunk_rows: rows that go through the layers together where nothing is saved.
    """
    call = call.gathered()
    spec, options, positions = call.spec, call.options, call.positions
    dense = None if call.dense is None else call.dense.float().contiguous()
    index = None if positions is None or positions.index is None else positions.index.to(call.x.device)
    height, width = (0, 0) if positions is None else (positions.height, positions.width)
    x = call.x.float().contiguous()
    weights = [tensor.float() for tensor in call.weights]
    save = False
    if torch.is_grad_enabled():
        differentiable = (x, *weights) if dense is None else (x, dense, *weights)
        save = any(tensor.requires_grad for tensor in differentiable) and not _recomputes(call, x, weights)
    form = WideOptions(
        height,
        width,
        spec.clamp,
        spec.clamp_form,
        spec.global_affine,
        spec.hard_permutation,
        options.matmul_precision,
        chunk_rows,
    )
    lp, log_det, z, *_ = flow_wide(x, dense, index, weights, *form, options.return_z, save)
    return lp, log_det, z if options.return_z else None


def infer(call: FlowCall, prepared: object = None) -> FlowResult:
    """Return the same for a call without gradients; there is nothing to prepare."""
    return train(call)


def _recomputes(call: FlowCall, x: Tensor, weights: Sequence[Tensor]) -> bool:
    if call.options.recompute is not None:
        return call.options.recompute
    size = operand_type(call.options.matmul_precision).itemsize
    per_row = 4 * call.spec.channels + size * (2 * call.spec.active_channels + weights[0].shape[0])
    return x.shape[0] * len(call.layers) * per_row > MOST_SAVED_BYTES


class WideOptions(NamedTuple):
    """Options of both operators, in their order."""

    height: int  # of the map; 0 without positions
    width: int
    clamp: float
    clamp_form: str
    global_affine: str
    hard_permutation: bool
    precision: str  # matmul precision
    chunk_rows: int

    def spec(self, weights: Sequence[Tensor]) -> FlowSpec:
        """Return the shape of a flow with these weights."""
        channels = weights[6].shape[0]
        return FlowSpec(
            channels,
            condition_channels=weights[0].shape[1] - (channels - channels // 2),
            coupling_layers=len(weights) // len(CouplingWeights._fields),
            clamp=self.clamp,
            clamp_form=cast(ClampForm, self.clamp_form),
            global_affine=cast(GlobalAffine, self.global_affine),
            hard_permutation=self.hard_permutation,
        )

    @property
    def operand(self) -> torch.dtype:
        """Type of the operands of products."""
        return operand_type(self.precision)


def _launch(
    x: Tensor,  # [N, C] float32, like all that follow
    dense: Tensor | None,  # [N, P]
    index: Tensor | None,  # [N] int64
    weights: list[Tensor],  # of every layer, in the order of CouplingWeights
    height: int,  # of the map; 0 without positions
    width: int,
    clamp: float,
    clamp_form: str,
    global_affine: str,
    hard_permutation: bool,
    precision: str,
    chunk_rows: int,
    return_z: bool,
    keep: bool,  # save activations; else the backward runs the chunks forward again
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return lp [N], log_det [N], z [N, C] and saved activations: states, a, hidden. What is not asked for is empty."""
    options = WideOptions(height, width, clamp, clamp_form, global_affine, hard_permutation, precision, chunk_rows)
    spec, rows = options.spec(weights), len(x)
    with torch.autocast(x.device.type, enabled=False):
        stacked = stack_weights(weights, spec, options.operand)
        condition = Condition(dense, index, height, width)
        step = max(1, rows if keep else min(rows, chunk_rows))
        saved = Saved.empty(stacked, min(step, rows), spec.coupling_layers if keep else None)
        lp, log_det = torch.empty(rows, device=x.device), torch.empty(rows, device=x.device)
        z = torch.empty(rows, spec.channels, device=x.device) if return_z else x.new_empty(0)
        for start in range(0, rows, step):
            here = slice(start, min(start + step, rows))
            chunk = condition.enter(x, stacked.w1.shape[2], here, options.operand)
            chunk_det, square = carry(chunk, stacked, spec, saved, z[here] if return_z else None)
            chunk_lp = log_likelihood_of_norm(square, chunk_det, spec.channels)
            lost = ~chunk_lp.isfinite()
            lp[here] = chunk_lp.masked_fill_(lost, math.nan)
            log_det[here] = chunk_det.masked_fill_(lost, math.nan)
            if return_z:
                z[here].masked_fill_(lost[:, None], math.nan)
            if keep:
                saved.clear(lost)
    return (lp, log_det, z, *saved) if keep else (lp, log_det, z, x.new_empty(0), x.new_empty(0), x.new_empty(0))


def _portable(
    x: Tensor, dense: Tensor | None, index: Tensor | None, weights: list[Tensor], *arguments: Any
) -> tuple[Tensor, ...]:
    """Infer on the portable path, for traced and exported graphs."""
    *values, return_z, keep = arguments
    if keep:
        raise BackendError(NO_TRAINING)
    options = WideOptions(*values)
    spec = options.spec(weights)
    condition: PositionalRows | Tensor | None = dense
    if options.height:
        condition = PositionalRows(options.height, options.width, index, spec.condition_channels)
    layers = unflatten(weights)
    call = FlowCall(x, layers, spec, condition, None, x.dtype, needs_grad=False, options=FlowOptions(return_z))
    with torch.autocast("cpu", enabled=False):
        lp, log_det, z = portable.infer(call)
    return lp, log_det, x.new_empty(0) if z is None else z, x.new_empty(0), x.new_empty(0), x.new_empty(0)


def _fake(
    x: Tensor, dense: Tensor | None, index: Tensor | None, weights: list[Tensor], *arguments: Any
) -> tuple[Tensor, ...]:
    *values, return_z, keep = arguments
    rows, channels = x.shape
    z = x.new_empty(rows, channels) if return_z else x.new_empty(0)
    saved = [x.new_empty(0), x.new_empty(0), x.new_empty(0)]
    if keep:
        layers, (active, hidden) = len(weights) // len(CouplingWeights._fields), weights[2].shape
        operand = WideOptions(*values).operand
        saved = [
            x.new_empty(layers - 1, rows, channels),
            x.new_empty(layers, rows, active, dtype=operand),
            x.new_empty(layers, rows, hidden, dtype=operand),
        ]
    return x.new_empty(rows), x.new_empty(rows), z, *saved


def _launch_backward(
    d_lp: Tensor | None,  # [N]
    d_log_det: Tensor | None,  # [N]
    d_z: Tensor | None,  # [N, C]
    lp: Tensor,  # [N]
    states: Tensor,  # saved activations
    a: Tensor,
    hidden: Tensor,
    x: Tensor,
    dense: Tensor | None,
    index: Tensor | None,
    weights: list[Tensor],
    height: int,
    width: int,
    clamp: float,
    clamp_form: str,
    global_affine: str,
    hard_permutation: bool,
    precision: str,
    chunk_rows: int,
    keep: bool,
    need_x: bool,
    need_dense: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, of a dense condition, and of all layers' tensors but W_perm, stacked."""
    options = WideOptions(height, width, clamp, clamp_form, global_affine, hard_permutation, precision, chunk_rows)
    spec, rows = options.spec(weights), len(x)
    with torch.autocast(x.device.type, enabled=False):
        lost = ~lp.isfinite()
        upstream, scale = _scaled_upstream(lost, d_lp, d_log_det, d_z, spec.channels)
        stacked = stack_weights(weights, spec, options.operand, back=True)
        again = None if keep else stack_weights(weights, spec, options.operand)
        condition = Condition(dense, index, height, width)
        step = max(1, rows if keep else min(rows, chunk_rows))
        saved = Saved(states, a, hidden) if keep else Saved.empty(stacked, min(step, rows), spec.coupling_layers)
        gradients = Gradients.zeros(stacked)
        d_x = torch.empty_like(x) if need_x else x.new_empty(0)
        d_dense = x.new_zeros(rows, spec.condition_channels) if need_dense else x.new_empty(0)
        for start in range(0, rows, step):
            here = slice(start, min(start + step, rows))
            chunk = condition.enter(x, stacked.w1.shape[2], here, options.operand)
            if again is not None:
                carry(chunk, again, spec, saved, None)
                saved.clear(lost[here])
            part, d_condition = upstream.part(here, scale), d_dense[here] if need_dense else None
            d_chunk = carry_back(chunk, stacked, spec, saved, part, gradients, d_condition, need_x)
            if d_chunk is not None:
                d_x[here] = d_chunk
        # log_det adds sum(log g) per row
        gradients.g.add_(upstream.d_log_det.sum() / stacked.g).mul_(stacked.dg_dp)
        for gradient in (d_x, d_dense, *gradients):
            gradient.div_(scale)
    return d_x, d_dense, *gradients


def _scaled_upstream(
    lost: Tensor,  # [N] bool
    d_lp: Tensor | None,
    d_log_det: Tensor | None,
    d_z: Tensor | None,
    channels: int,
) -> tuple[Upstream, Tensor]:
    """Return upstream gradients without those of lost rows, all but d_z scaled, and the scale."""
    zeros = torch.zeros(lost.shape, device=lost.device)
    d_lp = zeros if d_lp is None else d_lp.masked_fill(lost, 0)
    d_log_det = zeros if d_log_det is None else d_log_det.masked_fill(lost, 0)
    d_z = None if d_z is None else d_z.masked_fill(lost[:, None], 0)
    # lp = (const - 1/2 |z|^2 + log_det) / C
    pull = d_lp / channels
    scale = gradient_scale(pull, d_log_det, d_z)
    pull *= scale
    return Upstream(pull, pull + d_log_det * scale, d_z), scale


def _portable_backward(*_: Any) -> tuple[Tensor, ...]:
    raise BackendError(NO_TRAINING)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    x, dense, _, weights = arguments[7:11]
    need_x, need_dense = arguments[-2:]
    size = len(CouplingWeights._fields)
    d_x = torch.empty_like(x) if need_x else x.new_empty(0)
    d_dense = torch.empty_like(dense) if need_dense else x.new_empty(0)
    return d_x, d_dense, *(x.new_empty(len(weights) // size, *weights[i].shape) for i in range(size - 1))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, dense, index, weights, *ctx.options, ctx.return_z, ctx.keep = inputs
    lp, _, _, *saved = output
    ctx.save_for_backward(x, dense, index, lp, *saved, *weights)
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_lp: Tensor | None, d_log_det: Tensor | None, d_z: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, dense, index, lp, states, a, hidden, *weights = ctx.saved_tensors
    need_x, need_dense = ctx.needs_input_grad[:2]
    upstream = d_lp, d_log_det, d_z if ctx.return_z else None
    d_x, d_dense, *stacked = flow_wide_backward(
        *upstream, lp, states, a, hidden, x, dense, index, weights, *ctx.options, ctx.keep, need_x, need_dense
    )
    # W_perm is fixed.
    d_weights = [gradient for layer in zip(*stacked, strict=True) for gradient in (*layer, None)]
    nothing = [None] * (len(ctx.options) + 2)
    return d_x if need_x else None, d_dense if need_dense else None, None, d_weights, *nothing


flow_wide: Any = register(
    "flow_wide", _launch, portable=_portable, fake=_fake, setup_context=_setup_context, backward=_backward
)
flow_wide_backward: Any = register(
    "flow_wide_backward", _launch_backward, portable=_portable_backward, fake=_fake_backward
)
