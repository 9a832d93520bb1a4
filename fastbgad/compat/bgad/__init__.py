"""The official BGAD code's functions: the same names, arguments and numbers, computed by fastbgad.

Code written for https://github.com/xcyao00/BGAD changes its import lines only. No function waits for a GPU, and
impossible arguments raise a `FastBGADError`; other differences stand in the functions' descriptions.
"""

from __future__ import annotations

from ...flow_spec import FlowSpec
from ...ops import PositionalRows
from ...ops.positional_tensor import PositionalEncoding
from .boundary import get_logp_boundary
from .checkpoint import load_weights, save_weights
from .flow import FlowDecoder, conditional_flow_model, flow_model, get_logp, load_flow_model, positionalencoding2d
from .losses import abnormal_fl_weighting, calculate_bg_spp_loss, calculate_bg_spp_loss_normal, normal_fl_weighting
from .scores import calculate_pro_metric, convert_to_anomaly_scores, t2np

__all__ = [
    "FlowDecoder",
    "FlowSpec",
    "PositionalEncoding",
    "PositionalRows",
    "abnormal_fl_weighting",
    "calculate_bg_spp_loss",
    "calculate_bg_spp_loss_normal",
    "calculate_pro_metric",
    "conditional_flow_model",
    "convert_to_anomaly_scores",
    "flow_model",
    "get_logp",
    "get_logp_boundary",
    "load_flow_model",
    "load_weights",
    "normal_fl_weighting",
    "positionalencoding2d",
    "save_weights",
    "t2np",
]
