"""Throughput, latency and memory of a model by stage: `fastbgad bench`."""

from __future__ import annotations

from .chart import check_chart_path, write_throughput_chart
from .images import BenchImages, generate_images, open_images
from .memory import peak_bytes
from .meter import ThroughputConfig, ThroughputMeter
from .rows import Mode, Row, Stage

__all__ = [
    "BenchImages",
    "Mode",
    "Row",
    "Stage",
    "ThroughputConfig",
    "ThroughputMeter",
    "check_chart_path",
    "generate_images",
    "open_images",
    "peak_bytes",
    "write_throughput_chart",
]
