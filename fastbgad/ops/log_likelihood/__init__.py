"""The log-likelihood of a latent."""

from __future__ import annotations

from .dispatcher import log_likelihood

__all__ = [
    "log_likelihood",
]
