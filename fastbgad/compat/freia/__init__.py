"""FrEIA's flows, and anomalib's on top of them, computed by the operations of fastbgad."""

from __future__ import annotations

from .accelerate import accelerate, restore

__all__ = [
    "accelerate",
    "restore",
]
