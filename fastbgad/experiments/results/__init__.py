"""Results of cells: summaries, tables, charts, pictures and the page."""

from __future__ import annotations

from .outputs import print_plans, write_outputs

__all__ = [
    "print_plans",
    "write_outputs",
]
