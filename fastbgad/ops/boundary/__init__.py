"""The explicit boundary."""

from __future__ import annotations

from .dispatcher import Boundary, boundary, check_boundary_options

__all__ = [
    "Boundary",
    "boundary",
    "check_boundary_options",
]
