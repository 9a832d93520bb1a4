"""Export of a trained model to one file that runs without fastbgad."""

from __future__ import annotations

from ..model import BGAD
from .check import Difference
from .detector import ExportSummary, export_detector
from .formats import ExportFormat

__all__ = [
    "BGAD",
    "Difference",
    "ExportFormat",
    "ExportSummary",
    "export_detector",
]
