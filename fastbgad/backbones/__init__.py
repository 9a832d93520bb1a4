"""Frozen feature extractors: any timm model, truncated, and a Gabor filter bank that needs no download."""

from __future__ import annotations

from .base import Backbone
from .create import create_backbone
from .gabor import GaborBackbone
from .standardization import Standardize

__all__ = ["Backbone", "GaborBackbone", "Standardize", "create_backbone"]
