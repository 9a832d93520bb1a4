"""Memory for activations that a training step saves for its backward, reused by later steps.

The C library hands blocks of tens of megabytes back to the operating system as soon as they are freed, and then each
page of a new block is a page fault: in a 4096-row step of the flow at C = 40 they cost a quarter of the time.
"""

from __future__ import annotations

import math
import threading
import weakref

import torch
from torch import Tensor

# Idle blocks beyond that are freed: a training step needs some 50 to 130 MB, a whole data set at once gigabytes.
MOST_IDLE_BYTES = 512 * 2**20

_idle: list[Tensor] = []
_lock = threading.Lock()


class Block:
    """Flat tensor of at least `numel` elements whose memory is reused once this object is gone."""

    def __init__(self, numel: int, like: Tensor, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or like.dtype
        reused = like.device.type == "cpu" and type(like) is Tensor and not torch.compiler.is_compiling()
        idle = _take(numel, dtype) if reused else None
        with torch.inference_mode(False):  # reused memory must be writable outside of inference mode too
            self.tensor: Tensor = like.new_empty(numel, dtype=dtype) if idle is None else idle
        if reused:
            weakref.finalize(self, _give_back, self.tensor).atexit = False

    def view(self, *shape: int) -> Tensor:
        """Return the first elements in a shape; valid as long as this object exists."""
        return self.tensor[: math.prod(shape)].view(shape)


def _take(numel: int, dtype: torch.dtype) -> Tensor | None:
    """Return the smallest idle block that holds `numel` elements and is not more than twice as large."""
    with _lock:
        fitting = [t for t in _idle if t.dtype == dtype and numel <= t.numel() <= 2 * numel]
        if not fitting:
            return None
        block = min(fitting, key=Tensor.numel)
        _idle[:] = [t for t in _idle if t is not block]
        return block


def _give_back(block: Tensor) -> None:
    with _lock:
        _idle.append(block)
        # the oldest go first
        while sum(t.nbytes for t in _idle) > MOST_IDLE_BYTES:
            del _idle[0]


def release() -> None:
    """Free all idle blocks; those in use become idle once their objects are gone."""
    with _lock:
        _idle.clear()
