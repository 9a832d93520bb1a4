"""Flows, features and tolerances that several test files use."""

from __future__ import annotations

import math

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import numpy as np
import torch
from torch import Tensor, nn

from fastbgad.flow import ConditionalFlow
from fastbgad.flow_spec import CouplingWeights, FlowSpec


def subnet(inputs: int, outputs: int) -> nn.Sequential:
    """The subnet of BGAD and CFLOW-AD."""
    return nn.Sequential(nn.Linear(inputs, 2 * inputs), nn.ReLU(), nn.Linear(2 * inputs, outputs))


def freia_flow(spec: FlowSpec, seed: int = 0) -> Ff.SequenceINN:
    """FrEIA's own flow of this shape in float64, with parameters far from their start so that every term matters."""
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


def lively_flow(spec: FlowSpec, seed: int = 0, dtype: torch.dtype = torch.float32) -> ConditionalFlow:
    """A flow of ours whose parameters are far from their start."""
    flow = ConditionalFlow(spec, seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for layer in flow.module_list:
            layer.global_scale += 0.3 * torch.randn(layer.global_scale.shape, generator=generator)
            layer.global_offset += 0.3 * torch.randn(layer.global_offset.shape, generator=generator)
            for parameter in layer.subnet.parameters():
                parameter *= 2
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
