"""Training steps as CUDA graphs: the kernels of a step are recorded once and then repeated by a single call.

A step of the flow is some dozens of short kernels; launched one by one from Python they take longer to launch than to
run. A graph repeats them with the same memory, so the rows of a step are copied to the tensor that the recorded step
reads; everything else that changes (weights, moments, learning rate, sums) is on the device already.

A graph holds addresses, not tensors: tensors that a step reads and does not make itself must keep their memory as long
as the graph is replayed. Weights, moments, learning rate, sums and features belong to the trainer whose method the step
is; tables that are kept for later calls are never freed once a capture has read them (`kernels/device_cache.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_STEPS = 3
"""Steps of a kind that run as usual before one is captured: they compile kernels and allocate memory."""

Step = Callable[[Tensor, bool], None]


class CapturedSteps:
    """A step function that is captured for each number of rows and phase, and replayed.

    The steps before a capture are real ones, and a capture runs nothing, so the results are those of the function. A
    step that cannot be captured runs as usual from then on, with a warning.

    Args:
        step: called with the rows int64 [n] and whether it is the first phase; it must not wait for the device.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self._seen: dict[tuple[int, bool], int] = {}
        self._captured: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._possible = True

    def __call__(self, rows: Tensor, first_phase: bool) -> None:
        """Take one step, on the current stream."""
        key = (len(rows), first_phase)
        if key not in self._captured:
            seen = self._seen[key] = self._seen.get(key, 0) + 1
            if seen <= WARM_UP_STEPS or not self._possible or not self._capture(key, rows):
                self.step(rows, first_phase)
                return
        graph, static_rows = self._captured[key]
        static_rows.copy_(rows, non_blocking=True)
        graph.replay()

    def _capture(self, key: tuple[int, bool], rows: Tensor) -> bool:
        graph, static_rows = torch.cuda.CUDAGraph(), rows.clone()
        try:
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(
                graph, stream=torch.cuda.current_stream(rows.device), capture_error_mode="thread_local"
            ):
                self.step(static_rows, key[1])
        except RuntimeError as error:
            self._possible = False
            warnings.warn(
                f"training steps cannot be captured as a CUDA graph ({error}); they run one by one, more slowly",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        self._captured[key] = graph, static_rows
        return True
