"""Methods of other authors, run by anomalib."""

from __future__ import annotations

from .peers import PeerScores, run_peer
from .recipes import Recipe, recipe_of

__all__ = [
    "PeerScores",
    "Recipe",
    "recipe_of",
    "run_peer",
]
