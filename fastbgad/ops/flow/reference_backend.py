"""The reference as a backend of the flow, and the inverse, which has no other implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import reference
from ...flow_spec import CouplingWeights, FlowSpec
from ..positional import PositionalRows
from .backend import FlowCall, FlowResult


def train(call: FlowCall) -> FlowResult:
    """Return lp [N], log_det [N] and z [N, C] if asked, by autograd through the equations."""
    call = call.gathered()
    x, layers, dense = _cast(call.x, call.layers, call.condition, call.dtype)
    z, log_det = reference.flow_forward(x, layers, call.spec, dense)
    return reference.log_likelihood(z, log_det), log_det, z if call.options.return_z else None


def infer(call: FlowCall, prepared: object = None) -> FlowResult:
    """Return the same; there is nothing to prepare."""
    return train(call)


def inverse(
    z: Tensor,  # [N, C]
    layers: Sequence[CouplingWeights],
    spec: FlowSpec,
    condition: PositionalRows | Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return x [N, C] and the log-determinant of the inverse's Jacobian [N]."""
    z, layers, dense = _cast(z, layers, condition, dtype)
    return reference.flow_inverse(z, layers, spec, dense)


def _cast(
    x: Tensor, layers: Sequence[CouplingWeights], condition: PositionalRows | Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, list[CouplingWeights], Tensor | None]:
    """Return rows, weights and the condition as a tensor, all of one type."""
    dense = condition
    if isinstance(condition, PositionalRows):
        dense = condition.dense(len(x), dtype, x.device)
    assert not isinstance(dense, PositionalRows)
    cast = [CouplingWeights(*(tensor.to(dtype) for tensor in layer)) for layer in layers]
    return x.to(dtype), cast, None if dense is None else dense.to(dtype)
