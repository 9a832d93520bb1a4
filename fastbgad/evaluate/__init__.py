"""A model measured: exact metrics, decisions, and the report."""

from __future__ import annotations

from .evaluation import CalibrationName, Evaluation, evaluate_model
from .metrics import Metrics, PixelMetrics, aupro, auroc, official_pro, pixel_metrics
from .report import ImageRow, LevelHistogram, RunReport, write_report

__all__ = [
    "CalibrationName",
    "Evaluation",
    "ImageRow",
    "LevelHistogram",
    "Metrics",
    "PixelMetrics",
    "RunReport",
    "aupro",
    "auroc",
    "evaluate_model",
    "official_pro",
    "pixel_metrics",
    "write_report",
]
