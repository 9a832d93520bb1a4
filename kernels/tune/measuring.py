"""Measuring the candidates of one case: which are right, and which of them is the fastest."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from ..failure import reason
from ..tile_sizes import DEFAULT, TilesError, default_tiles
from ..variants import TuningCase

Tiles = Mapping[str, int]
# Returns, for a function that works on the device, one that measures it: each call returns microseconds of one run.
Stopwatch = Callable[[Callable[[], object]], Callable[[], float]]

# With a gain below this, which is noise, the default stays.
SMALLEST_GAIN = 1.02
# Candidates this many times slower than the best are not measured more than three times.
HOPELESS = 1.3
# Duration of one measurement of a CUDA graph: long against the clock's resolution of about a microsecond.
MEASUREMENT_SECONDS = 2e-3


class Refused(NamedTuple):
    """A candidate that was not timed."""

    tiles: Tiles
    obstacle: str


class Tuned(NamedTuple):
    """The outcome of one case."""

    kernel: str
    key: str
    default: Tiles
    chosen: Tiles
    default_microseconds: float | None  # None where the default cannot run on this GPU
    microseconds: float
    refused: Sequence[Refused]


def tune_case(
    case: TuningCase, device: torch.device, stopwatch: Stopwatch, rounds: int, deadline: float = float("inf")
) -> Tuned | None:
    """Measure one case and return its outcome; None where no candidate runs.

    Args:
        case: what to tune.
        device: the device to measure on.
        stopwatch: how runs are timed.
        rounds: measurements of each candidate, in turn; fewer once `deadline` has passed.
        deadline: reading of `time.monotonic` at which to stop, after at least three rounds.
    """
    default = default_tiles().get(case.kernel, {}).get(case.key)
    if default is None:
        raise TilesError(f"{DEFAULT} has no entry {case.kernel} / {case.key} to start from")
    candidates = [default, *(tiles for tiles in case.candidates if dict(tiles) != dict(default))]
    run = case.prepare(device)
    outcomes = _first_runs(run, candidates, device)
    # Outputs are compared with those of the default; where this GPU cannot run it, with those of the first that runs.
    expected = next((outcome for outcome in outcomes if not isinstance(outcome, str)), None)
    if expected is None:
        return None
    refused: list[Refused] = []
    measure: list[Callable[[], float]] = []
    runnable: list[Tiles] = []
    for tiles, outcome in zip(candidates, outcomes, strict=True):
        obstacle = outcome if isinstance(outcome, str) else _difference(outcome, expected, case.tolerance)
        if obstacle:
            refused.append(Refused(tiles, obstacle))
        else:
            runnable.append(tiles)
            measure.append(stopwatch(functools.partial(run, tiles)))
    del outcomes, expected

    times: list[list[float]] = [[] for _ in measure]
    for round_ in range(rounds):
        if round_ >= 3 and time.monotonic() > deadline:
            break
        best_so_far = min((statistics.median(series) for series in times if series), default=0.0)
        for series, once in zip(times, measure, strict=True):
            # Three rounds are enough to know that a candidate is far behind.
            if round_ < 3 or statistics.median(series) < HOPELESS * best_so_far:
                series.append(once())
    medians = [statistics.median(series) for series in times]
    best = min(range(len(medians)), key=medians.__getitem__)
    default_time = medians[0] if runnable[0] is default else None
    if default_time is not None and default_time < SMALLEST_GAIN * medians[best]:
        best = 0
    return Tuned(case.kernel, case.key, default, runnable[best], default_time, medians[best], refused)


def _first_runs(
    run: Callable[[Tiles], Sequence[Tensor]], candidates: Sequence[Tiles], device: torch.device
) -> list[Sequence[Tensor] | str]:
    """Return the outputs of each candidate, or why there are none. On a GPU the kernels are compiled here."""

    def first_run(tiles: Tiles) -> Sequence[Tensor] | str:
        try:
            with torch.cuda.device(device if device.type == "cuda" else -1):
                return run(tiles)
        except torch.AcceleratorError:
            raise  # nothing can be launched on this device any more
        except Exception as error:  # out of shared memory, no such instruction, ...: a result of these tiles
            return reason(error)

    if device.type != "cuda":  # Triton's interpreter runs one kernel at a time
        return [first_run(tiles) for tiles in candidates]
    with ThreadPoolExecutor(min(len(candidates), len(os.sched_getaffinity(0)))) as pool:
        outcomes = list(pool.map(first_run, candidates))
    torch.cuda.synchronize(device)
    return outcomes


def _difference(outputs: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> str:
    """Return how the outputs differ from the expected ones beyond the tolerance; "" if they do not."""
    for i, (output, default_output) in enumerate(zip(outputs, expected, strict=True)):
        if output.shape != default_output.shape or output.dtype != default_output.dtype:
            return f"output {i} has another shape or type than with the default tiles"
        if not default_output.numel():
            continue
        if not default_output.is_floating_point():
            if not torch.equal(output, default_output):
                return f"output {i} differs from that of the default tiles"
            continue
        values, exact = output.double(), default_output.double()
        scale = float(exact.nan_to_num(0, 0, 0).abs().max())
        if not torch.allclose(values, exact, rtol=0, atol=tolerance * scale, equal_nan=True):
            error = float((values - exact).abs().max()) / (scale or 1)
            return f"output {i} differs from that of the default tiles by {error:.1e}, more than {tolerance:.0e}"
    return ""


def graph_stopwatch(run: Callable[[], object]) -> Callable[[], float]:
    """Time replays of a CUDA graph of several runs: the device's time, without the launches from Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        run()
        start.record()
        run()
        stop.record()
    stop.synchronize()
    repeats = max(1, min(100, int(MEASUREMENT_SECONDS / (1e-3 * start.elapsed_time(stop) + 1e-9))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    graph.replay()

    def measure() -> float:
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return 1e3 * start.elapsed_time(stop) / repeats

    return measure
