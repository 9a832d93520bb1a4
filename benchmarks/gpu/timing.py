"""Time calls on a GPU: contenders take turns, the cache is emptied before each call, events read the device's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

# More than the level-two cache of any GPU so far; writing it pushes out what the call before left there.
FLUSH_BYTES = 256 << 20


class Timer:
    """Time functions on a device; on a CPU with the host's clock, for rehearsals."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.flush = torch.empty(FLUSH_BYTES if self.cuda else 1, dtype=torch.int8, device=device)

    def once(self, call: Callable[[], object]) -> float:
        """Return the seconds of one call with a cold cache."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return 1e-3 * start.elapsed_time(stop)

    def interleaved(self, calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, Any]:
        """Return name -> {"median_us", "low_us", "high_us" (quartiles), "rounds"}, one call of each in turn."""
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for round_ in range(-warmup, rounds):
            for name, call in calls.items():
                elapsed = self.once(call)
                if round_ >= 0:
                    seconds[name].append(elapsed)
        return {name: summary(values) for name, values in seconds.items()}

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Return the device memory that a call takes at its peak, beyond what is allocated before it."""
        if not self.cuda:
            return None
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def summary(seconds: list[float]) -> dict[str, float | int]:
    """Return the median and the quartiles in microseconds."""
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {"median_us": 1e6 * median, "low_us": 1e6 * low, "high_us": 1e6 * high, "rounds": len(seconds)}


def as_graph(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return the same work as one CUDA graph: no Python and no launches between its kernels.

    Calling the result replays the graph; it returns what `call` returned while it was recorded, with new values.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = call()

    def replay() -> Any:
        graph.replay()
        return recorded

    # The graph holds the addresses of what the call read; the call holds the tensors.
    replay.call = call  # type: ignore[attr-defined]
    return replay
