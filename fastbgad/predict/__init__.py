"""Scores of image files: in this process, or by many workers."""

from __future__ import annotations

from .local import find_images, predict_files

__all__ = [
    "find_images",
    "predict_files",
]
