"""Standardization of features written as one more coupling layer, for code whose flows take features as they are.

A coupling layer computes out = W_perm (g * [x1, x2 * exp(s) + a_t] + offset) with g = 0.1 * softplus(global_scale,
beta=0.5). With a subnet of zeros, s = a_t = 0, and with W_perm the identity

    out = g * x + offset = (x - mean) / std    for    g = 1 / std, offset = -mean / std.

Its log-determinant is a constant, sum(log g): log-likelihoods move by sum(log g) / C, rankings and the official
calibration, which subtracts a maximum, do not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .flow import CouplingLayer
from .flow_spec import FlowSpec

_LAYERS = "module_list."


def with_standardizing_layer(
    flow: Mapping[str, Tensor],  # state dict of a ConditionalFlow
    spec: FlowSpec,
    mean: Tensor,  # [C]
    std: Tensor,  # [C]
) -> dict[str, Tensor]:
    """Return the state dict of a flow with one coupling layer more that takes features before standardization.

    Args:
        flow: of a flow of this shape.
        spec: its global affine is SOFTPLUS.
        mean: of each channel.
        std: of each channel, positive.
    """
    if spec.global_affine != "SOFTPLUS":
        raise ValueError(f"the global affine is {spec.global_affine}: only SOFTPLUS reaches every scale")
    first = CouplingLayer(spec, None).state_dict()
    mean, x = mean.double(), 5 / std.double()  # g = 0.2 log(1 + exp(global_scale / 2)) = 1 / std
    scale = 2 * (x + torch.log(-torch.expm1(-x)))
    first["global_scale"].copy_(scale[None])
    first["global_offset"].copy_((-mean / std.double())[None])
    state = {f"{_LAYERS}0.{name}": tensor for name, tensor in first.items()}
    for name, tensor in flow.items():
        index, _, rest = name.removeprefix(_LAYERS).partition(".")
        state[f"{_LAYERS}{int(index) + 1}.{rest}"] = tensor
    return state
