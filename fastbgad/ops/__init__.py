"""One door per operation: check the input, choose the implementation, call it.

`impl="auto"` takes the fastest implementation there is for the tensors given, "torch" the portable fast path,
"reference" the oracle. An explicit choice never falls back silently.
"""

from .boundary import Boundary, boundary
from .dispatch import Impl, resolve_impl
from .flow import FlowOutput, flow_forward, flow_inverse
from .positional import PositionalRows
from .score_map import score_map
from .spp_loss import MlForm, Reduction, contrastive_loss, spp_loss

__all__ = [
    "Boundary",
    "FlowOutput",
    "Impl",
    "MlForm",
    "PositionalRows",
    "Reduction",
    "boundary",
    "contrastive_loss",
    "flow_forward",
    "flow_inverse",
    "resolve_impl",
    "score_map",
    "spp_loss",
]
