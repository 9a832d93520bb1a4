"""Flows, features and tolerances that several test files use."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fastbgad import reference
from fastbgad.flow_spec import CouplingWeights, FlowSpec
from fastbgad.model.flow import ConditionalFlow

if TYPE_CHECKING:
    import FrEIA.framework as Ff


def subnet(inputs: int, outputs: int) -> nn.Sequential:
    """The subnet of BGAD and CFLOW-AD."""
    return nn.Sequential(nn.Linear(inputs, 2 * inputs), nn.ReLU(), nn.Linear(2 * inputs, outputs))


def freia_flow(spec: FlowSpec, seed: int = 0) -> Ff.SequenceINN:
    """FrEIA's own flow of this shape in float64, with parameters far from their start so that every term matters."""
    # Here, so that the tests of the kernels also run where FrEIA is not installed.
    import FrEIA.framework as Ff
    import FrEIA.modules as Fm

    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (FrEIA draws its rotation from numpy's global state)
    flow = Ff.SequenceINN(spec.channels)
    condition = {"cond": 0, "cond_shape": (spec.condition_channels,)} if spec.condition_channels else {}
    for _ in range(spec.coupling_layers):
        flow.append(
            Fm.AllInOneBlock,
            subnet_constructor=subnet,
            affine_clamping=spec.clamp,
            global_affine_type=spec.global_affine,
            permute_soft=not spec.hard_permutation,
            **condition,
        )
    flow.double()
    with torch.no_grad():
        for block in flow.module_list:
            block.global_scale += 0.3 * torch.randn_like(block.global_scale)
            block.global_offset += 0.3 * torch.randn_like(block.global_offset)
            for parameter in block.subnet.parameters():
                parameter *= 2
            # FrEIA draws its rotation in float32; an exactly orthogonal one makes forward and inverse exact.
            q, _ = torch.linalg.qr(block.w_perm)
            block.w_perm.copy_(q)
            block.w_perm_inv.copy_(q.T)
    return flow


def lively_flow(
    spec: FlowSpec, seed: int = 0, dtype: torch.dtype = torch.float32, gain: float = 2.0
) -> ConditionalFlow:
    """A flow of ours whose parameters are far from their start; `gain` multiplies those of the subnets."""
    flow = ConditionalFlow(spec, seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for layer in flow.module_list:
            layer.global_scale += 0.3 * torch.randn(layer.global_scale.shape, generator=generator)
            layer.global_offset += 0.3 * torch.randn(layer.global_offset.shape, generator=generator)
            for parameter in layer.subnet.parameters():
                parameter *= gain
    return flow


def double(layers: list[CouplingWeights]) -> list[CouplingWeights]:
    """The same weights as float64 leaves that require gradients (W_perm excepted)."""
    return [
        CouplingWeights(*(t.detach().double().requires_grad_(name != "w_perm") for name, t in layer._asdict().items()))
        for layer in layers
    ]


def budget(dtype: torch.dtype, depth: int) -> float:
    """Relative error allowed after `depth` chained products: each adds about one rounding, with a factor 8 of room."""
    return 8 * math.sqrt(depth) * torch.finfo(dtype).eps


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Largest error in units of the exact values' root mean square."""
    exact = exact.detach().double()
    scale = exact.square().mean().sqrt().clamp(min=1e-30)
    return float((value.detach().double() - exact.detach()).abs().max() / scale) if exact.numel() else 0.0


def whole_error(value: Tensor, exact: Tensor) -> float:
    """Relative error of a whole tensor, |value - exact| / |exact|; NaN never passes a comparison with it."""
    assert value.shape == exact.shape
    value, exact = value.detach().double(), exact.detach().double()
    return float((value - exact).norm() / exact.norm().clamp(min=1e-30))


def reference_with_masks(
    x: Tensor, layers: list[CouplingWeights], spec: FlowSpec, condition: Tensor | None, masks: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The reference's flow with the active hidden units given, one mask [N, H] per layer, instead of the ReLU's own.

    They may differ from the reference's where a unit is within rounding of zero, nowhere else.
    """
    log_det = x.new_zeros(len(x))
    for layer, mask in zip(layers, masks, strict=True):
        x1, x2 = x[:, : spec.passive_channels], x[:, spec.passive_channels :]
        inputs = x1 if condition is None else torch.cat([x1, condition], dim=1)
        before = inputs @ layer.w1.T + layer.b1
        assert not ((mask != (before > 0)) & (before.abs() > 5e-3)).any()
        hidden = mask * before
        a = 0.1 * (hidden @ layer.w2.T + layer.b2)
        s = _log_scale(a[:, : spec.active_channels], spec)
        g = reference.flow.global_affine_scale(layer.global_scale, spec.global_affine)
        y = torch.cat([x1, x2 * torch.exp(s) + a[:, spec.active_channels :]], dim=1)
        x = (g * y + layer.global_offset) @ layer.w_perm.T
        log_det = log_det + s.sum(dim=1) + torch.log(g).sum()
    return x, log_det


@torch.no_grad()
def active_units(
    inputs: Tensor,  # [L, N, C1], what each layer's subnet saw of the features
    layers: list[CouplingWeights],
    condition: Tensor | None,  # [N, P]
    tables: bool,
    precision: str,
) -> list[Tensor]:
    """Which hidden units [N, H] of each layer are active where products have operands of this precision.

    `tables`: the condition enters through two tables of this precision, else as an operand of a product.
    """

    def operand(t: Tensor) -> Tensor:
        return t.half().double() if precision == "float16" else t

    masks = []
    for x1, layer in zip(inputs.double(), layers, strict=True):
        c1 = x1.shape[1]
        bias = layer.b1
        if condition is not None and tables:
            half = condition.shape[1] // 2
            of_column = condition[:, :half] @ layer.w1[:, c1 : c1 + half].T + layer.b1
            bias = operand(of_column) + operand(condition[:, half:] @ layer.w1[:, c1 + half :].T)
        elif condition is not None:
            bias = operand(condition) @ operand(layer.w1[:, c1:]).T + layer.b1
        masks.append(x1 @ operand(layer.w1[:, :c1]).T + bias > 0)
    return masks


def _log_scale(a: Tensor, spec: FlowSpec) -> Tensor:
    if spec.clamp_form == "tanh":
        return spec.clamp * torch.tanh(a)
    return spec.clamp * torch.tanh(a / spec.clamp)
