"""Standardization of features written as coupling layers, for code whose flows take features as they are.

A coupling layer computes out = W_perm (g * [x1, x2 * exp(s) + a_t] + offset) with g = 0.1 * softplus(global_scale,
beta=0.5). With a subnet of zeros, s = a_t = 0, and out = W_perm (g * x + offset) for any rotation W_perm.

    channel   one layer    W_perm = I, g = 1 / std, offset = -mean / std
    whiten    two layers   W_perm = U^T, g = 1, offset = -mean, and then W_perm = U, g = d, offset = 0,
                           where U diag(d) U^T is the whitening matrix

Their log-determinant is a constant, sum(log g): log-likelihoods move by sum(log g) / C, rankings and the official
calibration, which subtracts a maximum, do not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..flow_spec import FlowSpec
from ..model.flow import CouplingLayer

_LAYERS = "module_list."


def standardizing_layers(kind: str) -> int:
    """Return how many coupling layers a kind of standardization takes."""
    return {"none": 0, "channel": 1, "whiten": 2}[kind]


def with_standardizing_layers(
    flow: Mapping[str, Tensor],  # state dict of a ConditionalFlow
    spec: FlowSpec,
    mean: Tensor,  # [C]
    scale: Tensor,  # [C], what channels are divided by, or [C, C], the whitening matrix
) -> dict[str, Tensor]:
    """Return the state dict of a longer flow that takes features before standardization.

    Args:
        flow: of a flow of this shape.
        spec: its global affine is SOFTPLUS, and its permutations are soft if `scale` is a matrix.
        mean: of each channel.
        scale: positive, or symmetric and positive definite.
    """
    if spec.global_affine != "SOFTPLUS" or (spec.hard_permutation and scale.ndim == 2):
        raise ValueError(f"{spec} cannot express the standardization of its features")
    mean, scale = mean.double(), scale.double()
    if scale.ndim == 1:
        layers = [_affine(spec, 1 / scale, -mean / scale, torch.eye(len(mean)))]
    else:
        values, vectors = torch.linalg.eigh(scale)
        unit = torch.ones_like(mean)
        layers = [_affine(spec, unit, -mean, vectors.T), _affine(spec, values, torch.zeros_like(mean), vectors)]
    state = {f"{_LAYERS}{k}.{name}": tensor for k, layer in enumerate(layers) for name, tensor in layer.items()}
    for name, tensor in flow.items():
        index, _, rest = name.removeprefix(_LAYERS).partition(".")
        state[f"{_LAYERS}{int(index) + len(layers)}.{rest}"] = tensor
    return state


def _affine(spec: FlowSpec, g: Tensor, offset: Tensor, rotation: Tensor) -> dict[str, Tensor]:
    """The state dict of a coupling layer that computes rotation (g * x + offset)."""
    layer = CouplingLayer(spec, None).state_dict()
    x = 5 * g  # g = 0.2 log(1 + exp(global_scale / 2))
    layer["global_scale"].copy_((2 * (x + torch.log(-torch.expm1(-x))))[None])
    layer["global_offset"].copy_(offset[None])
    layer["w_perm"].copy_(rotation)
    layer["w_perm_inv"].copy_(rotation.T)
    return layer
