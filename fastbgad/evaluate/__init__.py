"""A model measured: exact metrics, decisions, and the report."""

from __future__ import annotations

from .evaluation import CalibrationName, Evaluation, evaluate_model, false_alarms, metrics_dict, not_measured
from .metrics import Metrics, PixelMetrics, aupro, auroc, official_pro, pixel_metrics
from .report import ImageRow, LevelHistogram, RunReport, image_rows, level_histograms, run_report, write_report

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
    "false_alarms",
    "image_rows",
    "level_histograms",
    "metrics_dict",
    "not_measured",
    "official_pro",
    "pixel_metrics",
    "run_report",
    "write_report",
]
