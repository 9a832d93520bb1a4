"""Models from checkpoints of other code, and back."""

from __future__ import annotations

from .conversion import Conversion, Target, convert
from .model import ReadOptions

__all__ = [
    "Conversion",
    "ReadOptions",
    "Target",
    "convert",
]
