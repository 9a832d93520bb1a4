"""Arithmetic and memory traffic that the flow needs with any implementation, and the ceilings of a GPU for both.

Measured times are compared with these counts: bytes and operations per second, as fractions of the rates of the device
in a plain copy and a plain matrix product.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

# Larger than the level-two cache of any GPU so far, so that a copy measures the memory.
_COPY_BYTES = 512 << 20
_PRODUCT_SIDE = 8192
_ROUNDS = 9


def flow_flops(rows: int, channels: int, coupling_layers: int = 8, condition_channels: int = 128) -> int:
    """Return the operations of the flow's matrix products with a separable condition, 2 per multiply-add.

    Per row and layer: W1x [H, C1] and W2 [2 C2, H] of the subnet, W_perm [C, C]; the condition comes from tables. The
    last permutation is not needed for a log-likelihood.
    """
    c2 = channels // 2
    c1 = channels - c2
    hidden = 2 * (c1 + condition_channels)
    subnets = coupling_layers * (c1 * hidden + hidden * 2 * c2)
    permutations = (coupling_layers - 1) * channels * channels
    return 2 * rows * (subnets + permutations)


def flow_bytes(rows: int, channels: int, bytes_per_feature: int = 4) -> int:
    """Return the bytes that must cross the device memory: features in, log-likelihood out. Weights fit in the cache."""
    return rows * (channels * bytes_per_feature + 4)


class Ceilings(NamedTuple):
    """Highest rates of a GPU, measured."""

    copy_bytes_per_second: float  # read and written
    matrix_flops_per_second: float  # of a float16 product


def measure_ceilings(device: torch.device) -> Ceilings:
    """Time a large copy and a large float16 product on a GPU. This needs about 1 GiB of its memory for a moment."""
    return Ceilings(2 * _COPY_BYTES / _copy_seconds(device), 2 * _PRODUCT_SIDE**3 / _product_seconds(device))


def _copy_seconds(device: torch.device) -> float:
    # Random, like real data: data that the memory system can compress would raise the ceiling.
    source = torch.randint(-128, 128, (_COPY_BYTES,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return _median_seconds(lambda: target.copy_(source), device)


def _product_seconds(device: torch.device) -> float:
    a, b = (torch.randn(_PRODUCT_SIDE, _PRODUCT_SIDE, device=device, dtype=torch.float16) for _ in range(2))
    return _median_seconds(lambda: a @ b, device)


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median by the device's own clock, after two calls that are not timed."""
    seconds = []
    with torch.cuda.device(device):
        for round_ in range(-2, _ROUNDS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            if round_ >= 0:
                seconds.append(1e-3 * start.elapsed_time(stop))
    return statistics.median(seconds)
