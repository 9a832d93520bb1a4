"""The semi-push-pull loss."""

from __future__ import annotations

from .dispatcher import contrastive_loss, spp_loss
from .options import MlForm, Reduction

__all__ = [
    "MlForm",
    "Reduction",
    "contrastive_loss",
    "spp_loss",
]
