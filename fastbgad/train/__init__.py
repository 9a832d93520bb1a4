"""Training: features once, a flow per level, resumable to the bit."""

from __future__ import annotations

from ..errors import InterruptedTraining
from ..progress import Progress
from .data_parallel import DataParallel
from .fit import FitResult, fit, spare_slots
from .state import LOG_FILE, MODEL_FILE, STATE_FILE

__all__ = [
    "LOG_FILE",
    "MODEL_FILE",
    "STATE_FILE",
    "DataParallel",
    "FitResult",
    "InterruptedTraining",
    "Progress",
    "fit",
    "spare_slots",
]
