"""Times contenders side by side: one call of each in turn, round after round.

A machine that slows down for a second (another job, a lower clock) then slows every contender of that round,
so the ratios of the medians stay honest where timing one contender after the other would not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Times = dict[str, list[float]]


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int = 5,
    warmup: int = 1,
    synchronize: Callable[[], object] | None = None,
) -> Times:
    """Call every contender once per round, in turn.

    Args:
        contenders: name -> function without arguments.
        rounds: number of timed calls of each contender.
        warmup: number of untimed rounds before them.
        synchronize: called before each reading of the clock (`torch.cuda.synchronize` on a GPU).

    Returns:
        name -> seconds of each timed call, [rounds].
    """
    times: Times = {name: [] for name in contenders}
    for round_ in range(-warmup, rounds):
        for name, call in contenders.items():
            if synchronize is not None:
                synchronize()
            start = time.perf_counter()
            call()
            if synchronize is not None:
                synchronize()
            if round_ >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """name -> median seconds per call."""
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def ratios(times: Mapping[str, Sequence[float]], baseline: str) -> dict[str, float]:
    """name -> how many times faster than `baseline` (ratio of the medians; the baseline has 1)."""
    median = medians(times)
    return {name: median[baseline] / seconds for name, seconds in median.items()}
