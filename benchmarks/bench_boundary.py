"""The boundary, an order statistic of the normal log-likelihoods: of 4096 rows, a million and four million.

    pytest benchmarks/bench_boundary.py

The plain form selects normal rows with a boolean index, sorts them and reads their number on the host; it is the oracle
run in float32. Contenders run on the GPU if there is one; without one the kernel is skipped by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from interleave import interleaved, medians, ratio_table, ratios
from torch import Tensor

from fastbgad import reference
from fastbgad.ops import boundary
from fastbgad.ops.dispatch import why_not_triton

PLAIN, PORTABLE, KERNELS = "plain, boolean index and sort", "fastbgad torch", "fastbgad triton"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_contenders(lp: Tensor, anomalous: Tensor) -> dict[str, Callable[[], Tensor]]:
    """name -> b_n of the rows."""
    contenders: dict[str, Callable[[], Tensor]] = {
        PLAIN: lambda: reference.boundary(lp, anomalous, 0.01, 0.1, 10.0)[0],
        PORTABLE: lambda: boundary(lp, anomalous, impl="torch").b_n,
    }
    if DEVICE.type == "cuda" and why_not_triton(lp) is None:
        contenders[KERNELS] = lambda: boundary(lp, anomalous, impl="triton").b_n
    return contenders


@pytest.mark.parametrize("rows", [4096, 1_000_000, 4_000_000])
def test_boundary(benchmark, capsys, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    lp = torch.randn(rows, generator=generator).to(DEVICE)
    anomalous = (torch.rand(rows, generator=generator) < 0.1).to(DEVICE)
    contenders = make_contenders(lp, anomalous)
    exact = float(reference.boundary(lp.double(), anomalous, 0.01, 0.1, 10.0)[0])
    for name, call in contenders.items():
        if abs(float(call()) - exact) > 1e-6 * abs(exact):
            pytest.fail(f"{name} gives {float(call())} where the oracle gives {exact}; nothing is timed")
    synchronize = partial(torch.cuda.synchronize, DEVICE) if DEVICE.type == "cuda" else None
    times = interleaved(contenders, rounds=51 if rows < 100_000 else 11, warmup=2, synchronize=synchronize)
    fastest = KERNELS if KERNELS in contenders else PORTABLE
    benchmark.pedantic(contenders[fastest], rounds=5)
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    benchmark.extra_info.update(device=where, ratio_to_plain=ratios(times, PLAIN), median_seconds=medians(times))
    with capsys.disabled():
        print(f"\nboundary, {rows} rows, {where}\n{ratio_table(times, PLAIN)}")
        if KERNELS not in contenders:
            print(f"skipped: {KERNELS} (no GPU that it runs on)")
