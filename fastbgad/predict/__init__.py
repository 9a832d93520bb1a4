"""Scores of image files: in this process, or by many workers."""

from __future__ import annotations

from .local import MapFormat, PredictionSummary, find_images, predict_files

__all__ = [
    "MapFormat",
    "PredictionSummary",
    "find_images",
    "predict_files",
]
