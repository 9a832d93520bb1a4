"""One dispatcher per operation, which checks its input and calls a backend; see `dispatch` for `impl`."""

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
