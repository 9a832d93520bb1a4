"""BGAD as an anomalib 2.7 model. Importing this package needs anomalib."""

from __future__ import annotations

from ...model import BGAD
from .data import KnownAnomalies, with_known_anomalies
from .lightning_model import Bgad
from .torch_model import BgadModel, BoundaryPostProcessor

__all__ = [
    "BGAD",
    "Bgad",
    "BgadModel",
    "BoundaryPostProcessor",
    "KnownAnomalies",
    "with_known_anomalies",
]
