"""BGAD as an anomalib 2.7 model. Importing this package needs anomalib."""

from __future__ import annotations

from .data import KnownAnomalies, with_known_anomalies
from .lightning_model import Bgad
from .torch_model import BgadModel

__all__ = [
    "Bgad",
    "BgadModel",
    "KnownAnomalies",
    "with_known_anomalies",
]
