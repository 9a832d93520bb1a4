"""The anomaly map of a batch of images."""

from __future__ import annotations

from .dispatcher import ScoreMap, score_map

__all__ = [
    "ScoreMap",
    "score_map",
]
