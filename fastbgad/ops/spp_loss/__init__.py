"""The semi-push-pull loss."""

from __future__ import annotations

from .dispatcher import MlForm, Reduction, contrastive_loss, spp_loss

__all__ = [
    "MlForm",
    "Reduction",
    "contrastive_loss",
    "spp_loss",
]
