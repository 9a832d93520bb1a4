"""Features of images, extracted once and stored."""

from __future__ import annotations

from .image_features import ImageFeatures, ImageReading
from .store import FeatureStore, Placement, StoreOptions, cell_mask

__all__ = [
    "FeatureStore",
    "ImageFeatures",
    "ImageReading",
    "Placement",
    "StoreOptions",
    "cell_mask",
]
