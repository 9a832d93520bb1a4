"""Training: features once, a flow per level, resumable to the bit."""

from __future__ import annotations

from .data_parallel import DataParallel
from .fit import FitResult, InterruptedTraining, Progress, fit

__all__ = [
    "DataParallel",
    "FitResult",
    "InterruptedTraining",
    "Progress",
    "fit",
]
