"""The boundary, an order statistic of the normal log-likelihoods: of 4096 rows, a million and four million.

    pytest benchmarks/bench_boundary.py

The plain form selects normal rows with a boolean index, sorts them and reads their number on the host; it is the oracle
run in float32. Every contender's boundary is compared with the oracle in float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import pytest
import torch
from harness import DEVICE, Comparison, Contender, implementations, run
from torch import Tensor

from fastbgad import reference
from fastbgad.ops import Impl, boundary

PLAIN = "plain, boolean index and sort"
OPTIONS = (0.01, 0.1, 10.0)  # beta, tau and the normalizer, the defaults of the operation
# Every contender picks the same row, and only the division by the normalizer is rounded.
TOLERANCE = 1e-6

Boundary = Callable[[Tensor, Tensor], Tensor]


# One size at a time: the rows of one comparison go when the next one makes its own.
@lru_cache(maxsize=1)
def make_rows(rows: int) -> tuple[Tensor, Tensor, float]:
    """Return lp float32 [rows], anomalous bool [rows] with one row in ten, and the reference's b_n."""
    generator = torch.Generator().manual_seed(rows)
    lp = torch.randn(rows, generator=generator).to(DEVICE)
    anomalous = (torch.rand(rows, generator=generator) < 0.1).to(DEVICE)
    return lp, anomalous, float(reference.boundary(lp.double(), anomalous, *OPTIONS)[0])


def contender(make_boundary: Callable[[], Boundary], rows: int) -> Contender:
    lp, anomalous, exact = make_rows(rows)
    call = partial(make_boundary(), lp, anomalous)
    return Contender(call, lambda: abs(float(call()) - exact) / abs(exact), TOLERANCE)


def plain() -> Boundary:
    return lambda lp, anomalous: reference.boundary(lp, anomalous, *OPTIONS)[0]


def ours(impl: Impl) -> Boundary:
    return lambda lp, anomalous: boundary(lp, anomalous, impl=impl).b_n


def comparisons() -> list[Comparison]:
    boundaries = {PLAIN: plain, **implementations(ours)}
    return [
        Comparison(
            f"boundary, {rows} rows",
            baseline=PLAIN,
            contenders={name: partial(contender, make, rows) for name, make in boundaries.items()},
            sizes={"rows": rows},
            rounds=51 if rows < 100_000 else 11,
            warmup=2,
        )
        for rows in (4096, 1_000_000, 4_000_000)
    ]


@pytest.mark.parametrize("comparison", comparisons(), ids=lambda comparison: comparison.name)
def test_boundary(comparison: Comparison, benchmark, capsys) -> None:
    run(comparison, benchmark, capsys)
