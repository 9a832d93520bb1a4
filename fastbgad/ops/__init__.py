"""One dispatcher per operation: check the input, choose the implementation, call it.

`impl="auto"` takes the fastest implementation for the given tensors: "triton", the kernels, for CUDA tensors; else
"native", compiled C++, for the flow if there is a compiler; else "torch", the portable fast path. "reference" is what
the others are tested against. An explicit choice never falls back silently.
"""

from .boundary.dispatcher import Boundary, boundary
from .debug import debug_checks
from .dispatch import Impl, MatmulPrecision, Precision, resolve_impl
from .flow.dispatcher import FlowOutput, flow_forward, flow_inverse
from .flow.kernel_weights import FlowPack, Geometry, pack_flow
from .log_likelihood.dispatcher import log_likelihood
from .native.build import why_not_native
from .positional import PositionalRows
from .score_map.dispatcher import ScoreMap, score_map
from .spp_loss.dispatcher import contrastive_loss, spp_loss
from .spp_loss.options import MlForm, Reduction

__all__ = [
    "Boundary",
    "FlowOutput",
    "FlowPack",
    "Geometry",
    "Impl",
    "MatmulPrecision",
    "MlForm",
    "PositionalRows",
    "Precision",
    "Reduction",
    "ScoreMap",
    "boundary",
    "contrastive_loss",
    "debug_checks",
    "flow_forward",
    "flow_inverse",
    "log_likelihood",
    "pack_flow",
    "resolve_impl",
    "score_map",
    "spp_loss",
    "why_not_native",
]
