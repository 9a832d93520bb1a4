"""The former name of `fastbgad.predict`."""

from __future__ import annotations

import warnings

from .predict.local import COLUMNS, CSV_FILE, SCALE_FILE, MapFormat, PredictionSummary, find_images, predict_files

__all__ = ["COLUMNS", "CSV_FILE", "SCALE_FILE", "MapFormat", "PredictionSummary", "find_images", "predict_files"]

warnings.warn("fastbgad.prediction is now called fastbgad.predict", DeprecationWarning, stacklevel=2)
