"""The anomaly map against three interpolate calls, at 256 and 1024 pixels.

    pytest benchmarks/bench_score_map.py

The baseline does what the official code does, one full-size map per level, summed and reduced afterwards, in float32
and on the device (the official code goes through float64 and NumPy on the host, which would flatter us). On a CUDA GPU
everything runs there and the kernel joins in. Every contender is compared with the float64 oracle before anything is
timed; where one differs nothing is reported.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from interleave import interleaved, medians, ratio_table, ratios
from torch import Tensor
from torch.nn.functional import interpolate

from fastbgad import reference
from fastbgad.ops import score_map

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OFFICIAL, FAST, KERNEL = "three interpolate calls", "fastbgad torch", "fastbgad triton"
# Of map and image score, relative to the largest value of the map.
TOLERANCE = 1e-5
OFFSET = 3.0


def official(levels: list[Tensor], size: int, level_max: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The anomaly map and the image score, level by level as the official BGAD makes them."""
    maps = []
    for lp, most in zip(levels, level_max, strict=True):
        likelihood = torch.exp(lp - most)
        upsampled = interpolate(likelihood.unsqueeze(1), size=(size, size), mode="bilinear", align_corners=True)
        maps.append(upsampled.squeeze(1))
    total = torch.zeros_like(maps[0])
    for level in maps:
        total += level
    anomaly_map = offset - total
    return anomaly_map, anomaly_map.flatten(1).max(dim=1).values


def require_close(name: str, found: tuple[Tensor, Tensor], exact: Tensor) -> float:
    scale = float(exact.abs().max())
    errors = [(found[0].double() - exact).abs().max(), (found[1].double() - exact.amax(dim=(1, 2))).abs().max()]
    error = max(float(error) for error in errors) / scale
    if not error < TOLERANCE:
        pytest.fail(f"{name} differs from the oracle by {error:.1e}; nothing is timed")
    return error


@pytest.mark.parametrize(("size", "batch"), [(256, 32), (1024, 4)])
def test_score_map(benchmark, capsys, size: int, batch: int) -> None:
    """Three levels of an EfficientNet: a quarter, an eighth and a sixteenth of the image's side."""
    generator = torch.Generator().manual_seed(size)
    sides = (size // 4, size // 8, size // 16)
    levels = [(torch.randn(batch, side, side, generator=generator) - 2).to(DEVICE) for side in sides]
    level_max = torch.stack([lp.max() for lp in levels])
    offset = torch.tensor(OFFSET, device=DEVICE)

    contenders: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        OFFICIAL: lambda: official(levels, size, level_max, offset),
        FAST: lambda: score_map(levels, (size, size), level_max, offset, impl="torch"),
    }
    if DEVICE.type == "cuda":
        contenders[KERNEL] = lambda: score_map(levels, (size, size), level_max, offset, impl="triton")

    exact = reference.score_map([lp.double() for lp in levels], (size, size), level_max.double(), OFFSET)
    worst = max(require_close(name, call(), exact) for name, call in contenders.items())
    synchronize = torch.cuda.synchronize if DEVICE.type == "cuda" else None
    times = interleaved(contenders, rounds=21, warmup=3, synchronize=synchronize)

    def timed() -> None:
        list(contenders.values())[-1]()
        if synchronize is not None:
            synchronize()

    benchmark.pedantic(timed, rounds=5)
    where = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else f"{torch.get_num_threads()} threads"
    benchmark.extra_info.update(
        ratios=ratios(times, OFFICIAL), median_seconds=medians(times), relative_error=worst, where=where
    )
    with capsys.disabled():
        print(f"\nanomaly map, {batch} x {size} x {size}, {where}; equal to the oracle within {worst:.0e}")
        print(ratio_table(times, OFFICIAL))
        if KERNEL not in contenders:
            print(f"{KERNEL!r} skipped: it needs a CUDA GPU")
