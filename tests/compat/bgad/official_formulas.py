"""Options, tolerances and inputs that the tests of the official code's functions share."""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor

from fastbgad import FlowSpec

ARGS = Namespace(
    coupling_layers=2,
    clamp_alpha=1.9,
    pos_embed_dim=8,
    flow_arch="conditional_flow_model",
    feature_levels=3,
    img_size=(17, 12),
)
DTYPES = [torch.float32, torch.float64]
SPEC = FlowSpec(7, 8, 2)


def exact_boundary(lp: Tensor, mask: Tensor, beta: float, tau: float, normalizer: float) -> tuple[Tensor, Tensor]:
    normal = lp.detach()[mask == 0]
    ordered = normal.sort().values
    edge = ordered[int(torch.tensor(len(normal)) * beta)] / normalizer  # an integer tensor times a float is float32
    return edge, edge - tau


def exact_loss(
    lp: Tensor, mask: Tensor, edges: tuple[Tensor, Tensor], normalizer: float, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    u = lp / normalizer
    pulled = torch.nonzero((mask == 0) & (u <= edges[0]))[:, 0]
    pushed = torch.nonzero((mask == 1) & (u >= edges[1]))[:, 0]
    w = torch.ones_like(lp) if weights is None else weights
    return (w[pulled] * (edges[0] - u[pulled])).mean(), (w[pushed] * (u[pushed] - edges[1])).mean()


def chunk(case: str, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Log-likelihoods, mask and boundaries; "violating" and "calm" say which rows lie on the wrong side."""
    generator = torch.Generator().manual_seed(rows)
    lp = 4 * torch.randn(rows, dtype=dtype, generator=generator) - 3
    share = {"normal": 0.0, "anomalous": 1.0}.get(case, 0.3)
    mask = (torch.rand(rows, generator=generator) < share).to(dtype)
    far = {"violating": 100.0, "calm": -100.0}.get(case)
    edges = (-0.5, -0.6) if far is None else (far, -far)
    return lp.requires_grad_(), mask, (torch.tensor(edges[0], dtype=dtype), torch.tensor(edges[1], dtype=dtype))
