"""The door to the flow: features in, log-likelihood per dimension out.

Oracle: `fastbgad.reference.flow_forward`. Portable fast path: `fastbgad.ops.flow_torch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..errors import ConfigError, FeatureError
from ..flow_spec import CouplingWeights, FlowSpec
from . import flow_torch
from .dispatch import Impl, compute_dtype, resolve_impl
from .positional import PositionalRows


class FlowOutput(NamedTuple):
    """What the flow says about N rows."""

    log_likelihood: Tensor  # [N], nats per dimension
    log_det: Tensor  # [N], log|det J|
    z: Tensor | None  # [N, C], the latent, if asked for


def flow_forward(
    x: Tensor,  # [N, C]
    layers: Sequence[CouplingWeights],
    spec: FlowSpec,
    condition: PositionalRows | Tensor | None = None,
    *,
    return_z: bool = False,
    impl: Impl = "auto",
    chunk_rows: int | None = None,
) -> FlowOutput:
    """Carries N patch features through all coupling layers.

    Args:
        x: [N, C] features, any floating-point type. The arithmetic and the results are float64 for float64 input,
            float32 otherwise; autocast does not change that.
        layers: the weights of the coupling layers; gradients flow to all of them but W_perm.
        spec: the shape of the flow.
        condition: `PositionalRows` (the separable fast path), a dense [N, P] tensor, or None for an unconditional flow.
        return_z: also return the latent.
        impl: "auto", "torch" or "reference".
        chunk_rows: rows that go through the layers together (impl "torch"); None chooses by the cache.

    Returns:
        `FlowOutput(log_likelihood [N], log_det [N], z [N, C] or None)`.

    Raises:
        FeatureError: shapes or types that do not fit the spec.
        BackendError, ConfigError: see `fastbgad.ops.dispatch`.

    Source: Yao et al., CVPR 2023; FrEIA's AllInOneBlock.
    """
    kind = resolve_impl(impl)
    _check(x, layers, spec, condition)
    if chunk_rows is not None and chunk_rows < 1:
        raise ConfigError(f"chunk_rows is {chunk_rows}; it must be at least 1")
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(dtype)
        dense = condition.to(dtype) if isinstance(condition, Tensor) else None
        positions = condition if isinstance(condition, PositionalRows) else None
        if kind == "reference":
            if positions is not None:
                dense = positions.dense(len(x), dtype, x.device)
            z, log_det = reference.flow_forward(x, [_cast(layer, dtype) for layer in layers], spec, dense)
            return FlowOutput(reference.log_likelihood(z, log_det), log_det, z if return_z else None)
        weights = [tensor for layer in layers for tensor in layer]
        needs_grad = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (x, *weights, *(() if dense is None else (dense,)))
        )
        if needs_grad:
            step = chunk_rows or flow_torch.TRAINING_CHUNK_ROWS
            lp, log_det, latent = flow_torch.FlowFunction.apply(x, dense, positions, spec, step, *weights)
            return FlowOutput(lp, log_det, latent if return_z else None)
        step = chunk_rows or flow_torch.CHUNK_ROWS
        return FlowOutput(*flow_torch.infer(x, layers, spec, positions, dense, return_z, step))


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
    x: Tensor, layers: Sequence[CouplingWeights], spec: FlowSpec, condition: PositionalRows | Tensor | None
) -> None:
    if x.dim() != 2 or x.shape[1] != spec.channels:
        raise FeatureError(f"features must be [N, {spec.channels}] for this flow, not {tuple(x.shape)}")
    if len(layers) != spec.coupling_layers:
        raise FeatureError(f"{len(layers)} layers of weights for a flow of {spec.coupling_layers} coupling layers")
    if isinstance(condition, PositionalRows):
        condition.check_rows(len(x))
        channels = condition.channels
    elif condition is None:
        channels = 0
    else:
        if condition.dim() != 2 or len(condition) != len(x):
            raise FeatureError(f"the condition must be [{len(x)}, P], not {tuple(condition.shape)}")
        channels = condition.shape[1]
    if channels != spec.condition_channels:
        raise FeatureError(f"the flow takes a condition of {spec.condition_channels} channels, got {channels}")
