"""The wide flow, more channels than stay on the chip: a library's matrix products around the fused coupling kernels.

Per layer and chunk of n rows, with u = [x1 | p] and p the condition:

    hidden = relu(u W1^T + b1)                      library, bias and ReLU in its epilogue    [n, H]
    a = hidden W2^T                                 library                                   [n, 2 * C2]
    v = g [x1, x2 exp(s) + a_t] + offset            one pass, fastbgad/kernels/coupling.py    [n, C]
    x = v W_perm^T                                  library; the kernel moves channels for a hard permutation

The positions' codes are gathered once per chunk and take part in the first product. At these widths its P extra columns
should cost less than reading and writing all hidden activations once more to add two table rows, and the gradient of W1
comes from one product too, without sums in an order of their own.

matmul_precision "float16": products of 16-bit operands summed in float32, state and log-determinant in float32. The
permutation would dominate the error, so v and W_perm are split into a high and a low part, see
fastbgad/kernels/coupling_operands.py.
matmul_precision "float32": float32 products. These are the library's, so torch's own switch decides about TF32
(`torch.set_float32_matmul_precision`; off unless switched on).

Lost rows have lp, log_det and z NaN, touch no other row, and are left out of the gradients: rows with a NaN, with a
place outside their map, or with features, condition, hidden units, a or state beyond what the operands can hold (65504
in float16). A weight beyond it makes all rows lost. Not seen is one case: the library may add up parts of hidden and a
in float16 unless `torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction` is switched off, and a part of a
hidden unit below -65504 then switches the unit off.

Training keeps 4 C + 4 C2 + 2 H bytes per row and layer in float16 (4.6 KB at C = 512, 16.9 KB at C = 2048, both with
P = 128; 4 C + 8 C2 + 4 H in float32), or nothing, and its backward then runs each chunk forward again.

Equations: fastbgad/reference/flow.py. The arithmetic: flow_wide_products.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ...errors import BackendError
from ...flow_spec import ClampForm, CouplingWeights, FlowSpec, GlobalAffine
from ..dispatch import MatmulPrecision, interpreting, resolve_matmul_precision
from ..log_likelihood.portable import LOG_2PI
from ..positional import PositionalRows
from . import portable as flow_torch
from .folded import fold_flow
from .gradient_scale import gradient_scale
from .wide_products import Condition, Gradients, Kept, carry, carry_back, fold, operand_type

# Rows that go through the layers together: enough to fill a GPU, with 0.7 GB of scratch at C = 2048. Not yet measured.
CHUNK_ROWS = 16384
# Training keeps what its backward reads up to this many bytes; above, the backward runs each chunk forward again.
LARGEST_KEPT = 8 << 30
NO_TRAINING = 'the wide flow trains on CUDA tensors; on a CPU use impl="torch"'


def forward(
    x: Tensor,  # [N, C]
    layers: Sequence[CouplingWeights],
    spec: FlowSpec,
    condition: PositionalRows | Tensor | None,  # or [N, P]
    return_z: bool,
    matmul_precision: MatmulPrecision,
    *,
    chunk_rows: int = CHUNK_ROWS,
    recompute: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """lp [N], log_det [N] and z [N, C] if asked, float32; differentiable in x, a dense condition and all but W_perm.

    Args:
        x: features of any type up to float32, computed in float32.
        condition: positions, a dense [N, P] tensor, or None.
        matmul_precision: "float16" ("auto") or "float32", see above.
        chunk_rows: rows that go through the layers together where nothing is kept.
        recompute: keep nothing for the backward; None: if it would be more than `LARGEST_KEPT` bytes.
    """
    precision = resolve_matmul_precision(matmul_precision)
    positions = condition if isinstance(condition, PositionalRows) else None
    dense = condition.float().contiguous() if isinstance(condition, Tensor) else None
    index = None if positions is None or positions.index is None else positions.index.to(x.device)
    height, width = (0, 0) if positions is None else (positions.height, positions.width)
    x = x.float().contiguous()
    weights = [tensor.float() for layer in layers for tensor in layer]
    differentiable = (x, *weights) if dense is None else (x, dense, *weights)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    if keep:
        size = operand_type(precision).itemsize
        per_row = 4 * spec.channels + size * (2 * spec.active_channels + weights[0].shape[0])
        keep = not (x.shape[0] * len(layers) * per_row > LARGEST_KEPT if recompute is None else recompute)
    lp, log_det, z, *_ = flow_wide(
        x, dense, index, weights, height, width, spec.clamp, spec.clamp_form, spec.global_affine,
        spec.hard_permutation, precision, chunk_rows, return_z, keep,
    )  # fmt: skip
    return lp, log_det, z if return_z else None


def _spec(weights: Sequence[Tensor], clamp: float, form: str, affine: str, hard: bool) -> FlowSpec:
    channels = weights[6].shape[0]
    return FlowSpec(
        channels,
        condition_channels=weights[0].shape[1] - (channels - channels // 2),
        coupling_layers=len(weights) // len(CouplingWeights._fields),
        clamp=clamp,
        clamp_form=cast(ClampForm, form),
        global_affine=cast(GlobalAffine, affine),
        hard_permutation=hard,
    )


def _flow_wide(
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
    keep: bool,  # what the backward reads; else it runs the chunks forward again
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lp [N], log_det [N], z [N, C] and what is kept: states, a, hidden. What is not asked for is empty."""
    spec = _spec(weights, clamp, clamp_form, global_affine, hard_permutation)
    rows = len(x)
    with torch.autocast(x.device.type, enabled=False):
        folded = fold(weights, spec, operand_type(precision))
        condition = Condition(dense, index, height, width)
        step = max(1, rows if keep else min(rows, chunk_rows))
        kept = Kept.empty(folded, min(step, rows), spec.coupling_layers if keep else None)
        lp, log_det = torch.empty(rows, device=x.device), torch.empty(rows, device=x.device)
        z = torch.empty(rows, spec.channels, device=x.device) if return_z else x.new_empty(0)
        for start in range(0, rows, step):
            here = slice(start, min(start + step, rows))
            clean, u, lost = condition.enter(x, folded.w1.shape[2], start, here.stop, folded.w1.dtype)
            chunk_det, square = carry(clean, u, lost, folded, spec, kept, z[here] if return_z else None)
            # lp = (-C/2 ln(2 pi) - 1/2 |z|^2 + log_det) / C
            chunk_lp = (chunk_det - 0.5 * square) / spec.channels - 0.5 * LOG_2PI
            lost = ~chunk_lp.isfinite()
            lp[here] = chunk_lp.masked_fill_(lost, math.nan)
            log_det[here] = chunk_det.masked_fill_(lost, math.nan)
            if return_z:
                z[here].masked_fill_(lost[:, None], math.nan)
            if keep:
                kept.clear(lost)
    return (lp, log_det, z, *kept) if keep else (lp, log_det, z, x.new_empty(0), x.new_empty(0), x.new_empty(0))


def _flow_wide_backward(
    d_lp: Tensor | None,  # [N]
    d_log_det: Tensor | None,  # [N]
    d_z: Tensor | None,  # [N, C]
    lp: Tensor,  # [N]
    states: Tensor,  # what the forward kept
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
    """The gradients of x, of a dense condition, and of all layers' w1, b1, w2, b2, global_scale, global_offset."""
    spec = _spec(weights, clamp, clamp_form, global_affine, hard_permutation)
    rows = len(x)
    with torch.autocast(x.device.type, enabled=False):
        lost = ~lp.isfinite()
        d_lp = torch.zeros_like(lp) if d_lp is None else d_lp.masked_fill(lost, 0)
        d_log_det = torch.zeros_like(lp) if d_log_det is None else d_log_det.masked_fill(lost, 0)
        d_z = None if d_z is None else d_z.masked_fill(lost[:, None], 0)
        # lp = (const - 1/2 |z|^2 + log_det) / C
        pull = d_lp / spec.channels
        scale = gradient_scale(pull, d_log_det, d_z)
        pull *= scale
        d_det = pull + d_log_det * scale

        folded = fold(weights, spec, operand_type(precision), back=True)
        again = None if keep else fold(weights, spec, operand_type(precision))
        condition = Condition(dense, index, height, width)
        step = max(1, rows if keep else min(rows, chunk_rows))
        kept = Kept(states, a, hidden) if keep else Kept.empty(folded, min(step, rows), spec.coupling_layers)
        gradients = Gradients.zeros(folded)
        d_x = torch.empty_like(x) if need_x else x.new_empty(0)
        d_dense = x.new_zeros(rows, spec.condition_channels) if need_dense else x.new_empty(0)
        for start in range(0, rows, step):
            here = slice(start, min(start + step, rows))
            clean, u, lost_early = condition.enter(x, folded.w1.shape[2], start, here.stop, folded.w1.dtype)
            if again is not None:
                carry(clean, u, lost_early, again, spec, kept, None)
                kept.clear(lost[here])
            d_chunk = carry_back(
                clean, u, folded, spec, kept,
                pull=pull[here],
                d_log_det=d_det[here],
                d_z=None if d_z is None else d_z[here].contiguous() * scale,
                gradients=gradients,
                d_dense=d_dense[here] if need_dense else None,
                need_x=need_x,
            )  # fmt: skip
            if d_chunk is not None:
                d_x[here] = d_chunk
        # log_det adds sum(log g) per row
        gradients.g.add_(d_det.sum() / folded.g).mul_(folded.dg_dp)
        for gradient in (d_x, d_dense, *gradients):
            gradient.div_(scale)
    return d_x, d_dense, *gradients


flow_wide = torch.library.custom_op("fastbgad::flow_wide", _flow_wide, mutates_args=(), device_types="cuda")
flow_wide_backward = torch.library.custom_op(
    "fastbgad::flow_wide_backward", _flow_wide_backward, mutates_args=(), device_types="cuda"
)


@flow_wide.register_kernel("cpu")
def _flow_wide_on_cpu(
    x: Tensor, dense: Tensor | None, index: Tensor | None, weights: list[Tensor], *options: Any
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same under Triton's interpreter; else inference on the portable path, for traced and exported graphs."""
    if interpreting():
        return _flow_wide(x, dense, index, weights, *options)
    height, width, clamp, clamp_form, global_affine, hard_permutation, _, _, return_z, keep = options
    if keep:
        raise BackendError(NO_TRAINING)
    spec = _spec(weights, clamp, clamp_form, global_affine, hard_permutation)
    positions = PositionalRows(height, width, index, spec.condition_channels) if height else None
    with torch.autocast("cpu", enabled=False):
        folded = fold_flow(flow_torch.unflatten(weights), spec, positions, x.dtype)
        lp, log_det, z = flow_torch.infer(x, folded, spec, positions, dense, return_z)
    return lp, log_det, x.new_empty(0) if z is None else z, x.new_empty(0), x.new_empty(0), x.new_empty(0)


@flow_wide_backward.register_kernel("cpu")
def _flow_wide_backward_on_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    if not interpreting():
        raise BackendError(NO_TRAINING)
    return _flow_wide_backward(*arguments)


@flow_wide.register_fake
def _flow_wide_fake(
    x: Tensor, dense: Tensor | None, index: Tensor | None, weights: list[Tensor], *options: Any
) -> tuple[Tensor, ...]:  # fmt: skip
    *_, precision, _, return_z, keep = options
    rows, channels = x.shape
    z = x.new_empty(rows, channels) if return_z else x.new_empty(0)
    kept = [x.new_empty(0), x.new_empty(0), x.new_empty(0)]
    if keep:
        layers, (active, hidden) = len(weights) // len(CouplingWeights._fields), weights[2].shape
        operand = operand_type(precision)
        kept = [
            x.new_empty(layers - 1, rows, channels),
            x.new_empty(layers, rows, active, dtype=operand),
            x.new_empty(layers, rows, hidden, dtype=operand),
        ]
    return x.new_empty(rows), x.new_empty(rows), z, *kept


@flow_wide_backward.register_fake
def _flow_wide_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    x, dense, _, weights = arguments[7:11]
    need_x, need_dense = arguments[-2:]
    size = len(CouplingWeights._fields)
    d_x = torch.empty_like(x) if need_x else x.new_empty(0)
    d_dense = torch.empty_like(dense) if need_dense else x.new_empty(0)
    return d_x, d_dense, *(x.new_empty(len(weights) // size, *weights[i].shape) for i in range(size - 1))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, dense, index, weights, *ctx.options, ctx.return_z, ctx.keep = inputs
    lp, _, _, *kept = output
    ctx.save_for_backward(x, dense, index, lp, *kept, *weights)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _gradients_of(
    ctx: Any, d_lp: Tensor | None, d_log_det: Tensor | None, d_z: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    x, dense, index, lp, states, a, hidden, *weights = ctx.saved_tensors
    need_x, need_dense = ctx.needs_input_grad[:2]
    d_x, d_dense, *stacked = flow_wide_backward(
        d_lp, d_log_det, d_z if ctx.return_z else None, lp, states, a, hidden, x, dense, index, weights,
        *ctx.options, ctx.keep, need_x, need_dense,
    )  # fmt: skip
    # W_perm is fixed.
    d_weights = [gradient for layer in zip(*stacked, strict=True) for gradient in (*layer, None)]
    nothing = [None] * (len(ctx.options) + 2)
    return d_x if need_x else None, d_dense if need_dense else None, None, d_weights, *nothing


flow_wide.register_autograd(_gradients_of, setup_context=_setup_context)
