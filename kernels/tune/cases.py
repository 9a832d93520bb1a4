"""The cases to tune, and tuning them one after the other."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence

import torch

from .. import variants
from ..variants import TuningCase
from .measuring import Stopwatch, Tuned, tune_case
from .results import short

VARIANTS = variants.__name__

# The entries with the longest running times, in this order: the finest level has most rows. All others follow.
MOST_VALUABLE = (
    ("flow_forward", "C64 float16 raster"),
    ("flow_backward", "C64 float16"),
    ("flow_forward", "C64 float16"),
    ("flow_forward", "C128 float16 raster"),
    ("flow_weight_gradient", "C64 float16"),
    ("flow_forward", "C256 float16 raster"),
    ("flow_backward", "C128 float16"),
    ("flow_backward", "C256 float16"),
)


def collect(kernels: Sequence[str]) -> list[TuningCase]:
    """Return the tuning cases of these kernel modules, the most valuable ones first."""
    modules = (importlib.import_module(f"{VARIANTS}.{name}") for name in kernels)
    cases = [case for module in modules if hasattr(module, "tuning_cases") for case in module.tuning_cases()]
    order = {entry: i for i, entry in enumerate(MOST_VALUABLE)}
    return sorted(cases, key=lambda case: order.get((case.kernel, case.key), len(order)))  # others stay in their order


def tune(
    cases: Sequence[TuningCase],
    device: torch.device,
    stopwatch: Stopwatch,
    *,
    rounds: int = 20,
    seconds: float = float("inf"),
    say: Callable[[str], object] = print,
    keep: Callable[[Tuned], object] = lambda result: None,
    before: Callable[[TuningCase], object] = lambda case: None,
) -> list[Tuned]:
    """Tune the cases one after the other, each within its share of the time that is left of `seconds`.

    A share bounds the timed rounds, not the compilation. Cases that do not begin in time are left out and reported.
    Each result is passed to `keep` at once: an interruption loses only the current case. `before` is called before each
    case that is not left out.
    """
    end = time.monotonic() + seconds
    results = []
    for i, case in enumerate(cases):
        now, where = time.monotonic(), f"[{i + 1}/{len(cases)}] {case.kernel} / {case.key}"
        if now > end:
            say(f"{where}: left out, {seconds:.0f} seconds have passed")
            continue
        before(case)
        now = time.monotonic()
        with torch.no_grad():
            result = tune_case(case, device, stopwatch, rounds, now + max(0.0, end - now) / (len(cases) - i))
        if result is None:
            say(f"{where}: no candidate runs on this GPU")
            continue
        results.append(result)
        keep(result)
        say(f"{where}: {short(result.chosen)}, {result.microseconds:.1f} us")
        for tiles, obstacle in result.refused:
            say(f"    refused {short(tiles)}: {obstacle}")
    return results
