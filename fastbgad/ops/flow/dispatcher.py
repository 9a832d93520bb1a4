"""Dispatcher of the flow: features in, log-likelihood per dimension out.

Reference: `fastbgad.reference.flow_forward`. Which backend serves a call is decided in `choice`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError, FeatureError
from ...flow_spec import CouplingWeights, FlowSpec
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
from . import reference_backend
from .backend import FlowCall, FlowOptions
from .choice import PreparedFlow, choose


class FlowOutput(NamedTuple):
    """Results of the flow for N rows."""

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
    pack: PreparedFlow | None = None,
    precision: MatmulPrecision | None = None,
) -> FlowOutput:
    """Carry N patch features through all coupling layers.

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
        recompute: the kernels' backward computes activations again instead of saving them; None does so for a million
            rows, not for a training step.
        pack: prepared weights of the same layers for inference, as `pack_flow` returns them for the kernels; see
            `ConditionalFlow.freeze`, which prepares them for every backend. Those of another backend are ignored.
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
    family = resolve_impl(impl, x)
    _check(x, layers, spec, condition, rows)
    matmul_precision = renamed_precision(matmul_precision, precision)
    _check_options(impl, family, chunk_rows, matmul_precision)
    options = FlowOptions(return_z, resolve_matmul_precision(matmul_precision), chunk_rows, recompute)
    if debugging():
        check_values(x, layers, condition, rows)
    needs_grad = _needs_grad(x, layers, condition)
    call = FlowCall(x, layers, spec, condition, rows, compute_dtype(x), needs_grad, options)
    backend = choose(impl, call, pack)
    with torch.autocast(x.device.type, enabled=False):
        return FlowOutput(*(backend.train(call) if needs_grad else backend.infer(call, pack)))


def flow_inverse(
    z: Tensor,  # [N, C]
    layers: Sequence[CouplingWeights],
    spec: FlowSpec,
    condition: PositionalRows | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the inverse of the flow: x [N, C] and the log-determinant of the inverse's Jacobian [N].

    BGAD itself never inverts its flow, so the reference's arithmetic serves every `impl`.
    """
    _check(z, layers, spec, condition)
    dtype = compute_dtype(z)
    with torch.autocast(z.device.type, enabled=False):
        return reference_backend.inverse(z, layers, spec, condition, dtype)


def _needs_grad(x: Tensor, layers: Sequence[CouplingWeights], condition: PositionalRows | Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    dense = (condition,) if isinstance(condition, Tensor) else ()
    return any(tensor.requires_grad for tensors in ((x,), *layers, dense) for tensor in tensors)


def _check_options(impl: Impl, family: str, chunk_rows: int | None, matmul_precision: MatmulPrecision) -> None:
    if chunk_rows is not None and chunk_rows < 1:
        raise ConfigError(f"chunk_rows is {chunk_rows}; it must be at least 1")
    check_matmul_precision(matmul_precision)
    if matmul_precision != "bfloat16":
        return
    if family == "triton":
        raise ConfigError(
            "the kernels have no bfloat16 (its errors are ten times float16's); "
            'use matmul_precision="float16" or "float32"'
        )
    if impl == "native":
        raise ConfigError(
            'compiled C++ computes in float32; use matmul_precision="float32", or impl="torch" with bfloat16'
        )


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
        _check_rows(rows, x, condition)
    channels = _check_condition(condition, x)
    if channels != spec.condition_channels:
        raise FeatureError(f"the flow takes a condition of {spec.condition_channels} channels, got {channels}")


def _check_rows(rows: Tensor, x: Tensor, condition: PositionalRows | Tensor | None) -> None:
    if rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64):
        raise FeatureError(f"rows must be int32 or int64 [N], not {rows.dtype} {tuple(rows.shape)}")
    if rows.device != x.device:
        raise FeatureError(f"the features are on {x.device} but rows is on {rows.device}")
    if isinstance(condition, PositionalRows) and condition.index is not None:
        raise FeatureError("rows= selects from whole maps: give a PositionalRows without an index")
    if x.device.type == "cpu" and len(rows) and not (rows.min() >= 0 and rows.max() < len(x)):
        raise FeatureError(f"rows must lie in [0, {len(x)}), not in [{int(rows.min())}, {int(rows.max())}]")


def _check_condition(condition: PositionalRows | Tensor | None, x: Tensor) -> int:
    """Return the number of channels of a condition."""
    if condition is None:
        return 0
    if isinstance(condition, PositionalRows):
        condition.check_rows(len(x))
        return condition.channels
    if condition.dim() != 2 or len(condition) != len(x):
        raise FeatureError(f"the condition must be [{len(x)}, P], not {tuple(condition.shape)}")
    if condition.device != x.device:
        raise FeatureError(f"the features are on {x.device} but the condition is on {condition.device}")
    return condition.shape[1]
