"""The flow: features in, log-likelihood per dimension out."""

from __future__ import annotations

from .dispatcher import FlowOutput, flow_forward, flow_inverse
from .kernel_weights import FlowPack, Geometry, pack_flow

__all__ = [
    "FlowOutput",
    "FlowPack",
    "Geometry",
    "flow_forward",
    "flow_inverse",
    "pack_flow",
]
