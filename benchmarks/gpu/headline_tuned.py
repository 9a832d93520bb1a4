"""The headline's cases again, with the tile sizes that were tuned in this run."""

from __future__ import annotations

from pathlib import Path

from . import headline
from .context import Context, Found, Items


def items(context: Context) -> Items:
    """Return the headline's cases; one item that says why if nothing was tuned."""
    if context.launch_only:
        return {}
    if not Path(context.tiles).exists():
        return {"headline, tuned": _nothing}
    return {f"{name}, tuned": item for name, item in headline.items(context, kernels_only=True).items()}


def _nothing() -> Found:
    return {"outcome": "skipped", "message": "no entry was tuned, so there is nothing to time again"}
