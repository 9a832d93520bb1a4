"""FrEIA's flows, and anomalib's Cflow that contains them, computed by the operations of fastbgad."""

from __future__ import annotations

from .acceleration import accelerate, restore

__all__ = [
    "accelerate",
    "restore",
]
