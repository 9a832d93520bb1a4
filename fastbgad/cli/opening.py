"""A category opened by a command, while a bar shows how far its check is."""

from __future__ import annotations

from pathlib import Path

from ..data import Category, open_category
from ..render import console
from .options import Check, FileOptions, Layout


def open_with_bar(data: Path, category: str | None, layout: Layout, check: Check, files: FileOptions) -> Category:
    """Open a category; see `open_category`."""
    with console.check_bar(category or data.name or "data") as on_files:
        return open_category(data, category, layout, check, files, on_files)
