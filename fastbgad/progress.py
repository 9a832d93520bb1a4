"""Progress of a training run, for progress bars and logs."""

from __future__ import annotations

from dataclasses import dataclass

Record = dict[str, float]
"""Means over a pass by name: loss, violating rows, boundaries, learning rate."""


@dataclass(frozen=True)
class Progress:
    """Progress of a run, handed to the `on_progress` callback after every batch."""

    stage: str  # "statistics", "features", "training" or "calibration"
    done: int  # images so far in this stage
    total: int  # images of this stage
    images_per_second: float
    record: Record  # the latest means of the pass: loss, violating rows, boundaries, learning rate
