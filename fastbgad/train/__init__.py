"""Training: features once, a flow per level, resumable to the bit."""

from __future__ import annotations

from ..progress import Progress
from .data_parallel import DataParallel
from .fit import FitResult, InterruptedTraining, fit

__all__ = [
    "DataParallel",
    "FitResult",
    "InterruptedTraining",
    "Progress",
    "fit",
]
