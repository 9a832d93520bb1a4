"""The conditional normalizing flow, coupling layer by coupling layer.

Sources: Yao et al., CVPR 2023 (BGAD); Dinh et al., 2017 (affine coupling); FrEIA's AllInOneBlock (global affine,
fixed permutation, soft clamping). Written to be read beside the equations, for any floating-point type.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..flow_spec import CouplingWeights, FlowSpec


def global_affine_scale(global_scale: Tensor, kind: str) -> Tensor:
    """Return g > 0 from its parameter, [C]: one of FrEIA's three activations."""
    if kind == "SOFTPLUS":  # g = 0.1 * softplus(global_scale, beta = 0.5) = 0.1 * 2 ln(1 + e^(global_scale / 2))
        return 0.1 * torch.nn.functional.softplus(global_scale, beta=0.5)
    if kind == "SIGMOID":  # g = 10 / (1 + e^(2 - global_scale))
        return 10 * torch.sigmoid(global_scale - 2)
    if kind == "EXP":  # g = e^global_scale
        return torch.exp(global_scale)
    raise ValueError(f"unknown global affine activation {kind!r}")


def log_scale_and_shift(
    x1: Tensor, weights: CouplingWeights, spec: FlowSpec, condition: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Apply the subnet: return s and a_t, each [N, C2], from the passive half x1 [N, C1] and the condition [N, P]."""
    hidden_input = x1 if condition is None else torch.cat([x1, condition], dim=1)
    hidden = torch.relu(hidden_input @ weights.w1.T + weights.b1)
    a = 0.1 * (hidden @ weights.w2.T + weights.b2)  # a = 0.1 (W2 relu(W1 [x1; p] + b1) + b2)
    a_s, a_t = a[:, : spec.active_channels], a[:, spec.active_channels :]
    if spec.clamp_form == "tanh":
        s = spec.clamp * torch.tanh(a_s)  # s = clamp * tanh(a_s)
    else:
        s = spec.clamp * torch.tanh(a_s / spec.clamp)  # s = clamp * tanh(a_s / clamp)
    return s, a_t


def coupling_forward(
    x: Tensor,  # [N, C]
    weights: CouplingWeights,
    spec: FlowSpec,
    condition: Tensor | None = None,  # [N, P]
) -> tuple[Tensor, Tensor]:
    """Apply one coupling layer; return its output [N, C] and the log-determinant of its Jacobian [N]."""
    x1, x2 = x[:, : spec.passive_channels], x[:, spec.passive_channels :]
    s, a_t = log_scale_and_shift(x1, weights, spec, condition)
    y = torch.cat([x1, x2 * torch.exp(s) + a_t], dim=1)  # y = [x1, x2 * exp(s) + a_t]
    g = global_affine_scale(weights.global_scale, spec.global_affine)
    out = (g * y + weights.global_offset) @ weights.w_perm.T  # out = W_perm (g * y + offset)
    log_det = s.sum(dim=1) + torch.log(g).sum()  # log|det J| = sum(s) + sum(log g); |det W_perm| = 1
    return out, log_det


def coupling_inverse(
    out: Tensor,  # [N, C]
    weights: CouplingWeights,
    spec: FlowSpec,
    condition: Tensor | None = None,  # [N, P]
) -> tuple[Tensor, Tensor]:
    """Invert `coupling_forward`; return x [N, C] and the log-determinant of the inverse's Jacobian [N]."""
    g = global_affine_scale(weights.global_scale, spec.global_affine)
    y = (out @ weights.w_perm - weights.global_offset) / g  # W_perm^-1 = W_perm^T
    x1, y2 = y[:, : spec.passive_channels], y[:, spec.passive_channels :]
    s, a_t = log_scale_and_shift(x1, weights, spec, condition)
    x2 = (y2 - a_t) * torch.exp(-s)
    return torch.cat([x1, x2], dim=1), -s.sum(dim=1) - torch.log(g).sum()


def flow_forward(
    x: Tensor,  # [N, C]
    layers: Sequence[CouplingWeights],
    spec: FlowSpec,
    condition: Tensor | None = None,  # [N, P]
) -> tuple[Tensor, Tensor]:
    """Apply all coupling layers in turn; return the latent z [N, C] and the log-determinant [N]."""
    log_det = x.new_zeros(x.shape[0])
    for weights in layers:
        x, layer_log_det = coupling_forward(x, weights, spec, condition)
        log_det = log_det + layer_log_det
    return x, log_det


def flow_inverse(
    z: Tensor,  # [N, C]
    layers: Sequence[CouplingWeights],
    spec: FlowSpec,
    condition: Tensor | None = None,  # [N, P]
) -> tuple[Tensor, Tensor]:
    """Invert `flow_forward`; return x [N, C] and the log-determinant of the inverse's Jacobian [N]."""
    log_det = z.new_zeros(z.shape[0])
    for weights in reversed(layers):
        z, layer_log_det = coupling_inverse(z, weights, spec, condition)
        log_det = log_det + layer_log_det
    return z, log_det
