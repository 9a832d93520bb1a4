"""A trained model as one file that runs without fastbgad."""

from __future__ import annotations

from .detector import ExportSummary, export_detector
from .formats import ExportFormat

__all__ = [
    "ExportFormat",
    "ExportSummary",
    "export_detector",
]
