"""Throughput, latency and memory of a model by stage: `fastbgad bench`."""

from __future__ import annotations

from .memory import peak_bytes
from .meter import ThroughputConfig, ThroughputMeter
from .rows import Mode, Row, Stage

__all__ = [
    "Mode",
    "Row",
    "Stage",
    "ThroughputConfig",
    "ThroughputMeter",
    "peak_bytes",
]
