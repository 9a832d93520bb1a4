"""The detector: backbone, a conditional flow per level, calibration and decisions."""

from __future__ import annotations

from .calibration import calibrate_model
from .detector import BGAD, Prediction
from .flow import ConditionalFlow, CouplingLayer
from .scoring import Calibration

__all__ = [
    "BGAD",
    "Calibration",
    "ConditionalFlow",
    "CouplingLayer",
    "Prediction",
    "calibrate_model",
]
