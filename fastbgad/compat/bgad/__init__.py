"""The official BGAD code's functions under their names, with the same arguments and numbers."""

from __future__ import annotations

from .checkpoint import load_weights, save_weights
from .flow import FlowDecoder, conditional_flow_model, flow_model, load_flow_model
from .functions import (
    abnormal_fl_weighting,
    calculate_bg_spp_loss,
    calculate_bg_spp_loss_normal,
    calculate_pro_metric,
    convert_to_anomaly_scores,
    get_logp,
    get_logp_boundary,
    normal_fl_weighting,
    positionalencoding2d,
    t2np,
)

__all__ = [
    "FlowDecoder",
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
