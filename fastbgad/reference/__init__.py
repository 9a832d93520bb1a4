"""Reference: every operation in plain PyTorch, equation by equation, in any floating-point type, slow and obvious.

Nothing here is fast and nothing here may be made fast: the fast paths are tested against it in float64, and it is
itself tested against FrEIA to 1e-12.
"""

from .boundary import boundary
from .flow import coupling_forward, coupling_inverse, flow_forward, flow_inverse, global_affine_scale
from .log_likelihood import log_likelihood
from .positional import positional_encoding
from .score_map import score_map, upsample_bilinear
from .spp_loss import SppLoss, contrastive_loss, focal_weights, ml_loss, semi_push_pull, spp_loss

__all__ = [
    "SppLoss",
    "boundary",
    "contrastive_loss",
    "coupling_forward",
    "coupling_inverse",
    "flow_forward",
    "flow_inverse",
    "focal_weights",
    "global_affine_scale",
    "log_likelihood",
    "ml_loss",
    "positional_encoding",
    "score_map",
    "semi_push_pull",
    "spp_loss",
    "upsample_bilinear",
]
