"""Run items of one stage in this process: `python -m benchmarks.gpu.worker MODULE CONTEXT [ITEMS]`, by the supervisor.

MODULE has `items(context)`, names and functions in order; CONTEXT and ITEMS are JSON. ITEMS are names, or {"share": i,
"of": n} for every n-th item from the i-th on.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .events import SPOILED, Events

# Before the imports below: it watches the parent from now on.
EVENTS = Events()

from .context import Context, Found, Items, first_line  # noqa: E402


def main(arguments: Sequence[str]) -> int:
    """Run the items; returns the exit status."""
    module, context = arguments[0], Context.from_json(arguments[1])
    wanted = json.loads(arguments[2]) if len(arguments) > 2 else None
    context.events = EVENTS
    compiled = prepare(context)
    items: Items = importlib.import_module(f"{__package__}.{module}").items(context)
    names = [name for name in items if context.wants(name)]
    if isinstance(wanted, dict):
        names = names[wanted["share"] :: wanted["of"]]
    elif wanted is not None:
        names = [name for name in wanted if name in items]
    EVENTS.items(names)
    for name in names:
        context.item, context.step = name, ""
        EVENTS.begin(name)
        compiled.clear()
        start = time.perf_counter()
        found = run(items[name])
        found["seconds"] = round(time.perf_counter() - start, 3)
        if compiled:
            found["kernels"] = {"hits": sum(compiled), "compiled": len(compiled) - sum(compiled)}
        if found["outcome"] == "failed" and context.spoiled():
            if context.step:
                EVENTS.lost(name, context.step, found)
            else:
                EVENTS.end(name, found)
            return SPOILED
        EVENTS.end(name, found)
    return 0


def prepare(context: Context) -> list[bool]:
    """Install the driver; returns the list that gets an entry for every kernel: whether Triton's cache had it."""
    compiled: list[bool] = []
    if context.driver == "stand-in":
        from . import carried, stand_in_driver

        def note(compilation: stand_in_driver.Compilation) -> None:
            compiled.append(compilation.cache_hit)
            carried.mark_used(compilation.digest)

        stand_in_driver.install(on_compilation=note)
    elif context.driver == "cuda":
        from .stand_in_driver import listen

        listen(lambda compilation: compiled.append(compilation.cache_hit))
    from fastbgad.kernels.tile_sizes import UntunedGPUWarning, use_tiles

    warnings.simplefilter("ignore", UntunedGPUWarning)
    if context.tiles and Path(context.tiles).exists():
        use_tiles(context.tiles)
    return compiled


def run(item: Any) -> Found:
    """Return what an item finds; an exception is a finding."""
    try:
        return dict(item())
    except Exception as error:
        return {"outcome": "failed", "message": first_line(error), "traceback": traceback.format_exc()}


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    # Nothing that hangs on its way out may keep the stage waiting.
    os._exit(status)
