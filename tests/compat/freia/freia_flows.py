"""Flows of FrEIA and anomalib in float64, their inputs, and how far accelerated results are from theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("FrEIA")

from fastbgad.flow_spec import FlowSpec

from ...flows import freia_flow, relative_error

HEIGHT, WIDTH = 3, 5


def flow_of(kind: str, channels: int, condition: int, layers: int = 3, seed: int = 0) -> Any:
    """A flow in float64: 'soft', 'hard' (FrEIA 0.2), 'main soft', 'main hard' (FrEIA's main branch), 'anomalib'."""
    if kind.startswith("main"):
        from ...freia_main import freia_main_flow

        return freia_main_flow(channels, condition, layers, soft=kind == "main soft", seed=seed).double()
    if kind == "anomalib":
        from anomalib.models.image.cflow.utils import cflow_head

        torch.manual_seed(seed)
        return cflow_head(condition, layers, 1.9, channels, permute_soft=False).double()
    flow = freia_flow(FlowSpec(channels, condition, layers), seed=seed)
    if kind == "hard":
        with torch.no_grad():
            for block in flow.module_list:
                block.w_perm.copy_(torch.eye(channels)[torch.randperm(channels)])
                block.w_perm_inv.copy_(block.w_perm.T)
    return flow


def inputs(channels: int, condition: int, rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Any]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, channels, generator=generator, dtype=torch.float64).to(dtype)
    c = [torch.randn(rows, condition, generator=generator, dtype=torch.float64).to(dtype)] if condition else None
    return x, c


def error_of(found: Tensor, exact: Tensor, flow: Any) -> float:
    """Largest error of z, or of log_det in units of the sum that it is: up to clamp per active channel and layer."""
    if exact.dim() == 2:
        return relative_error(found, exact)
    terms = flow.spec.clamp * flow.spec.active_channels * flow.spec.coupling_layers
    return float(
        (found.detach().double() - exact.detach().double()).abs().max() / max(terms, float(exact.detach().abs().max()))
    )


def gradients(flow: nn.Module, x: Tensor, c: Any) -> list[Tensor]:
    """Of x, of a condition and of all parameters, for a loss that depends on z and on log_det row by row."""
    leaves = [x.clone().requires_grad_(), *(t.clone().requires_grad_() for t in c or ())]
    flow.zero_grad()
    z, log_det = flow(leaves[0], leaves[1:] or None)
    weight = torch.linspace(0.5, 1.5, len(x), dtype=x.dtype)
    (weight * (z.square().sum(dim=1) - log_det)).sum().backward()
    return [t.grad for t in (*leaves, *flow.parameters()) if t.grad is not None]
