"""Conversion of other code's checkpoints to models, and back."""

from __future__ import annotations

from ..data import Sample
from ..flow_spec import ClampForm
from ..model import BGAD
from .conversion import Conversion, Target, convert
from .model import ReadOptions

__all__ = [
    "BGAD",
    "ClampForm",
    "Conversion",
    "ReadOptions",
    "Sample",
    "Target",
    "convert",
]
