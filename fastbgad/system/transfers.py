"""Copies from the host to a GPU that the host does not wait for.

CUDA copies from ordinary, pageable memory through a buffer of its own, and beyond 64 KB the host waits until that is
done, `non_blocking` or not; from pinned memory the device copies by itself. PyTorch's allocator of pinned memory is the
ring of buffers that this needs: it holds a block that is freed until its pending copies are done, and hands it out
again after that.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Move values to a device, on the current stream; values that are there already are returned as they are."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def select_to_device(
    values: Tensor,  # [R, ...]
    rows: Tensor,  # int64 [n], where the values are
    device: torch.device,
) -> Tensor:
    """Move values[rows] to a device, on the current stream."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values[rows].to(device)
    # Put together in pinned memory at once: indexing would make pageable memory of pinned values.
    selected = torch.empty(len(rows), *values.shape[1:], dtype=values.dtype, pin_memory=True)
    return torch.index_select(values, 0, rows, out=selected).to(device, non_blocking=True)
