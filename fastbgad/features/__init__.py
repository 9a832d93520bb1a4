"""Features of images, extracted once and kept."""

from __future__ import annotations

from .image_features import ImageFeatures
from .store import FeatureStore, Placement, cell_mask

__all__ = [
    "FeatureStore",
    "ImageFeatures",
    "Placement",
    "cell_mask",
]
