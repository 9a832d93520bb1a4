"""Tune tile sizes, an item per entry, into the run's output folder and into the package."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from fastbgad.kernels.tile_sizes import CONFIGS, slug
from fastbgad.kernels.tune import Precompiling, collect, describe_machine, graph_stopwatch, store, tune
from fastbgad.kernels.variants import MODULES, TuningCase

from .context import Context, Found, Items
from .stages import TILES

ROUNDS = 10


def items(context: Context) -> Items:
    """Return one item per entry of the tile sizes, the most valuable one first."""
    cases = collect(MODULES)
    if context.launch_only:  # hundreds of candidates; the machine with the GPU has more cores to compile them with
        return {}
    if context.driver != "cuda":
        cases = cases[-1:]
        return {_name(case): partial(_rehearse, context, case) for case in cases}
    compiling = Precompiling(MODULES, min(12, len(os.sched_getaffinity(0))))
    machine = describe_machine(torch.device("cuda", torch.cuda.current_device()))
    return {_name(case): partial(_tune, context, case, compiling, machine) for case in cases}


def _name(case: TuningCase) -> str:
    return f"{case.kernel} / {case.key}"


def _tune(context: Context, case: TuningCase, compiling: Precompiling, machine: Mapping[str, Any]) -> Found:
    device = torch.device("cuda", torch.cuda.current_device())
    lines: list[str] = []
    results = tune([case], device, graph_stopwatch, rounds=ROUNDS, say=lines.append, before=compiling.run)
    if results:
        store(context.out / TILES, results, machine)
        # The folder of the package may not come back from the machine; what runs after this uses it all the same.
        store(CONFIGS / f"{slug(torch.cuda.get_device_name(device))}.json", results, machine)
    return {"outcome": "measured" if results else "failed", "message": lines[0] if lines else "", "lines": lines}


def _rehearse(context: Context, case: TuningCase) -> Found:
    """Walk through tuning without a GPU: two candidates, and a clock that reads the same every time."""
    small = case._replace(candidates=case.candidates[:1])

    def clock(run: Callable[[], object]) -> Callable[[], float]:
        return lambda: (run(), 1.0)[1]

    lines: list[str] = []
    results = tune([small], context.device, clock, rounds=1, say=lines.append)
    if results:
        store(context.out / TILES, results, {"gpu": "none: a rehearsal"})
    return {"outcome": "measured" if results else "failed", "message": lines[0] if lines else "", "lines": lines}
