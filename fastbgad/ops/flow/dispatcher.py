"""The door to the flow: features in, log-likelihood per dimension out.

Oracle: `fastbgad.reference.flow_forward`. On a CPU: `flow_native`, compiled C++, where there is a compiler and it
serves the flow; else the portable fast path, `flow_torch`, and `flow_packed` for wide flows whose weights are kept.
Kernels: `flow_triton` for up to 256 channels, whose rows stay on the chip through all layers; `flow_wide` beyond.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ... import reference
from ...errors import BackendError, ConfigError, FeatureError
from ...flow_spec import CouplingWeights, FlowSpec
from ...kernels.flow.weights import MOST_CHANNELS, most_channels_with_gradients
from ..debug import check_values, debugging
from ..dispatch import (
    Impl,
    MatmulPrecision,
    check_matmul_precision,
    compute_dtype,
    renamed_precision,
    resolve_impl,
    resolve_matmul_precision,
)
from ..positional import PositionalRows
from . import (
    compiled as flow_native,
)
from . import (
    onednn as flow_packed,
)
from . import (
    portable as flow_torch,
)
from . import (
    portable_training as flow_torch_training,
)
from . import (
    registered as flow_triton,
)
from . import (
    wide as flow_wide,
)
from .compiled import NativeFlow, pack_native
from .folded import FoldedFlow, fold_flow
from .onednn import PackedFlow
from .registered import FlowPack, Geometry, pack_flow

FlowImpl = Literal["torch", "native", "triton", "reference"]

# A row's whole condition is one operand.
MOST_CONDITION_CHANNELS = 128


class FlowOutput(NamedTuple):
    """What the flow says about N rows."""

    log_likelihood: Tensor  # [N], nats per dimension
    log_det: Tensor  # [N], log|det J|
    z: Tensor | None  # [N, C], the latent, if asked for


def flow_forward(
    x: Tensor,  # [N, C], or [R, C] with rows
    layers: Sequence[CouplingWeights],
    spec: FlowSpec,
    condition: PositionalRows | Tensor | None = None,
    *,
    rows: Tensor | None = None,  # [N] into x
    return_z: bool = False,
    impl: Impl = "auto",
    chunk_rows: int | None = None,
    matmul_precision: MatmulPrecision = "auto",
    recompute: bool | None = None,
    pack: FlowPack | FoldedFlow | PackedFlow | NativeFlow | None = None,
    precision: MatmulPrecision | None = None,
) -> FlowOutput:
    """Carries N patch features through all coupling layers.

    Args:
        x: [N, C] features, any floating-point type. The arithmetic and the results are float64 for float64 input,
            float32 otherwise; autocast does not change that.
        layers: the weights of the coupling layers; gradients flow to all of them but W_perm, which must be orthogonal.
        spec: the shape of the flow.
        condition: `PositionalRows` (the separable fast path), a dense [N, P] tensor, or None for an unconditional flow.
        rows: int32 or int64 [N]: the flow sees x[rows] and the condition of those rows. `condition` then describes all
            R rows of x: whole maps (`PositionalRows` without an index) or [R, P]. The kernels gather by themselves.
        return_z: also return the latent.
        impl: "auto", "torch", "native", "triton" or "reference".
        chunk_rows: rows that go through the layers together (impl "torch"); None chooses by the cache.
        matmul_precision: operands of matrix products. "auto": float16 in the kernels (impl "triton"), with float32
            accumulation and an accurate permutation (log-likelihoods within about 5e-5 of float64), and float32
            elsewhere. "float16": the same as "auto". "float32": everywhere. "bfloat16" is for training on CPUs with
            bfloat16 instructions: the subnets' products of a call that needs gradients take bfloat16 operands there;
            without gradients it means float32.
        recompute: whether the kernels' backward computes activations again instead of keeping them; None does so for
            a million rows, not for a training step.
        pack: the same weights prepared before, by `pack_flow` for inference with the kernels, by `pack_native` for
            compiled C++, by `fold_flow` or `flow_packed.pack_products` for the portable path; see
            `ConditionalFlow.freeze`.
        precision: deprecated name of matmul_precision.

    Returns:
        `FlowOutput(log_likelihood [N], log_det [N], z [N, C] or None)`. A row whose features hold NaN or Inf has NaN
        (or Inf) results and touches no other row. With the kernels so does a row whose index is out of range or whose
        features leave the range of its operands, and in the backward these rows are left out.

    Raises:
        FeatureError: shapes, types or devices that do not fit the spec; inside `debug_checks` also values.
        BackendError, ConfigError: see `fastbgad.ops.dispatch`.

    Source: Yao et al., CVPR 2023; FrEIA's AllInOneBlock.
    """
    kind: FlowImpl = resolve_impl(impl, x)
    _check(x, layers, spec, condition, rows)
    if chunk_rows is not None and chunk_rows < 1:
        raise ConfigError(f"chunk_rows is {chunk_rows}; it must be at least 1")
    matmul_precision = renamed_precision(matmul_precision, precision)
    check_matmul_precision(matmul_precision)
    precision = resolve_matmul_precision(matmul_precision)
    if kind == "triton" and precision == "bfloat16":
        raise ConfigError(
            "the kernels have no bfloat16 (its errors are ten times float16's); "
            'use matmul_precision="float16" or "float32"'
        )
    if impl == "native" and precision == "bfloat16":
        raise ConfigError(
            'compiled C++ computes in float32; use matmul_precision="float32", or impl="torch" with bfloat16'
        )
    if debugging():
        check_values(x, layers, condition, rows)
    dtype = compute_dtype(x)
    weights = [tensor for layer in layers for tensor in layer]
    dense = condition if isinstance(condition, Tensor) else None
    needs_grad = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x, *weights, *(() if dense is None else (dense,)))
    )
    wide = is_wide(spec, precision, needs_grad)
    if kind == "triton" and needs_grad and dense is not None and dense.requires_grad and not wide:
        if impl == "triton":
            raise BackendError(
                'impl="triton" has no gradient for a dense condition; use impl="torch", or detach the condition'
            )
        kind = "torch"
    if kind == "torch" and (impl == "native" or chunk_rows is None) and not (needs_grad and precision == "bfloat16"):
        kind = portable_or_native(impl, x, layers, spec, condition)
    # Kernels and compiled code gather rows by themselves, except where x needs a gradient, and for wide flows.
    gathers = (kind == "triton" and not wide) or (kind == "native" and x.dtype == torch.float32)
    if rows is not None and (not gathers or x.requires_grad):
        x, condition, rows = x.index_select(0, rows), _gathered(condition, rows), None
    with torch.autocast(x.device.type, enabled=False):
        if kind == "triton":
            if wide:
                found = flow_wide.forward(x, layers, spec, condition, return_z, precision, recompute=recompute)
                return FlowOutput(*found)
            if needs_grad:
                options = (return_z, precision, recompute)
                return FlowOutput(*flow_triton.train(x, layers, spec, condition, rows, *options))
            geometry = Geometry.of(condition, precision)
            if not isinstance(pack, FlowPack):
                pack = pack_flow(layers, spec, geometry)
            elif pack.geometry != geometry:
                raise ConfigError(f"the weights were packed for {pack.geometry} but are used for {geometry}")
            return FlowOutput(*flow_triton.infer(x, pack, spec, condition, rows, return_z))
        x = x.to(dtype)
        positions = condition if isinstance(condition, PositionalRows) else None
        if kind == "native":
            if needs_grad:
                return FlowOutput(*flow_native.FlowFunction.apply(x, rows, positions, spec, return_z, *weights))
            if not (isinstance(pack, NativeFlow) and pack.serves(positions, dtype)):
                pack = pack_native(layers, spec, positions)
            return FlowOutput(*flow_native.infer(x, pack, spec, positions, rows, return_z))
        dense = condition.to(dtype) if isinstance(condition, Tensor) else None
        if kind == "reference":
            if positions is not None:
                dense = positions.dense(len(x), dtype, x.device)
            z, log_det = reference.flow_forward(x, [_cast(layer, dtype) for layer in layers], spec, dense)
            return FlowOutput(reference.log_likelihood(z, log_det), log_det, z if return_z else None)
        if needs_grad:
            operands = torch.bfloat16 if precision == "bfloat16" and dtype == torch.float32 else dtype
            lp, log_det, latent = flow_torch_training.FlowFunction.apply(
                x, dense, positions, spec, chunk_rows, operands, *weights
            )
            return FlowOutput(lp, log_det, latent if return_z else None)
        if isinstance(pack, PackedFlow) and pack.serves(positions, dtype) and chunk_rows is None:
            return FlowOutput(*flow_packed.infer(x, pack, spec, positions, dense, return_z))
        if not (isinstance(pack, FoldedFlow) and pack.serves(positions, dtype)):
            pack = fold_flow(layers, spec, positions, dtype)
        return FlowOutput(*flow_torch.infer(x, pack, spec, positions, dense, return_z, chunk_rows))


def portable_or_native(
    impl: Impl, x: Tensor, layers: Sequence[CouplingWeights], spec: FlowSpec, condition: PositionalRows | Tensor | None
) -> Literal["torch", "native"]:
    """Which of the two CPU implementations runs, for an `impl` that `resolve_impl` has given to "torch".

    Raises:
        BackendError: "native" for a call that the compiled code cannot serve.
    """
    if impl == "torch":
        return "torch"
    obstacle = flow_native.why_not(spec, layers, x, condition)
    if obstacle is not None and impl == "native":
        raise BackendError(f'impl="native": {obstacle}; use impl="torch" or "auto"')
    return "torch" if obstacle is not None else "native"


def is_wide(spec: FlowSpec, matmul_precision: MatmulPrecision, needs_grad: bool) -> bool:
    """Whether a flow has too many channels, or its condition has, to keep its rows on the chip through all layers."""
    most = most_channels_with_gradients(resolve_matmul_precision(matmul_precision)) if needs_grad else MOST_CHANNELS
    return spec.channels > most or spec.condition_channels > MOST_CONDITION_CHANNELS


def _gathered(condition: PositionalRows | Tensor | None, rows: Tensor) -> PositionalRows | Tensor | None:
    """The condition of the selected rows alone."""
    if isinstance(condition, PositionalRows):
        position = rows.long() % (condition.height * condition.width)
        return PositionalRows(condition.height, condition.width, position, condition.channels)
    return None if condition is None else condition[rows.long()]


def flow_inverse(
    z: Tensor,  # [N, C]
    layers: Sequence[CouplingWeights],
    spec: FlowSpec,
    condition: PositionalRows | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The inverse of the flow: x [N, C] and the log-determinant of the inverse's Jacobian [N].

    BGAD itself never inverts its flow, so the oracle's arithmetic serves every `impl`.
    """
    _check(z, layers, spec, condition)
    dtype = compute_dtype(z)
    dense = condition.dense(len(z), dtype, z.device) if isinstance(condition, PositionalRows) else condition
    with torch.autocast(z.device.type, enabled=False):
        cast = [_cast(layer, dtype) for layer in layers]
        return reference.flow_inverse(z.to(dtype), cast, spec, None if dense is None else dense.to(dtype))


def _cast(layer: CouplingWeights, dtype: torch.dtype) -> CouplingWeights:
    return CouplingWeights(*(tensor.to(dtype) for tensor in layer))


def _check(
    x: Tensor,
    layers: Sequence[CouplingWeights],
    spec: FlowSpec,
    condition: PositionalRows | Tensor | None,
    rows: Tensor | None = None,
) -> None:
    if x.dim() != 2 or x.shape[1] != spec.channels:
        raise FeatureError(f"features must be [N, {spec.channels}] for this flow, not {tuple(x.shape)}")
    if len(layers) != spec.coupling_layers:
        raise FeatureError(f"{len(layers)} layers of weights for a flow of {spec.coupling_layers} coupling layers")
    if layers[0].w1.device != x.device:
        raise FeatureError(f"the features are on {x.device} but the flow is on {layers[0].w1.device}")
    if rows is not None:
        if rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64):
            raise FeatureError(f"rows must be int32 or int64 [N], not {rows.dtype} {tuple(rows.shape)}")
        if rows.device != x.device:
            raise FeatureError(f"the features are on {x.device} but rows is on {rows.device}")
        if isinstance(condition, PositionalRows) and condition.index is not None:
            raise FeatureError("rows= selects from whole maps: give a PositionalRows without an index")
        if x.device.type == "cpu" and len(rows) and not (rows.min() >= 0 and rows.max() < len(x)):
            raise FeatureError(f"rows must lie in [0, {len(x)}), not in [{int(rows.min())}, {int(rows.max())}]")
    if isinstance(condition, PositionalRows):
        condition.check_rows(len(x))
        channels = condition.channels
    elif condition is None:
        channels = 0
    else:
        if condition.dim() != 2 or len(condition) != len(x):
            raise FeatureError(f"the condition must be [{len(x)}, P], not {tuple(condition.shape)}")
        if condition.device != x.device:
            raise FeatureError(f"the features are on {x.device} but the condition is on {condition.device}")
        channels = condition.shape[1]
    if channels != spec.condition_channels:
        raise FeatureError(f"the flow takes a condition of {spec.condition_channels} channels, got {channels}")
