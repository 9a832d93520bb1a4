"""The log-likelihood of a latent and its gradients: a training chunk of 4096 rows, and a million rows.

    pytest benchmarks/bench_log_likelihood.py
    pytest benchmarks/bench_log_likelihood.py --official PATH     with your own checkout of the official code

The plain form is the expression as PyTorch code has it, with autograd's backward. Every contender's values and
gradients are compared with the oracle in float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import pytest
import torch
from harness import DEVICE, Comparison, Contender, implementations, run
from official import OFFICIAL, load
from torch import Tensor

from fastbgad import reference
from fastbgad.ops import Impl, log_likelihood

PLAIN = "plain expression"
CHANNELS = 40
# Of each result as a whole: roundings of sums of 40 float32 terms.
TOLERANCE = 1e-6

Operation = Callable[[Tensor, Tensor], Tensor]


# One size at a time: the rows of one comparison go when the next one makes its own.
@lru_cache(maxsize=1)
def make_rows(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """z [rows, C], log_det [rows] and the gradient that comes from the loss [rows], float32."""
    generator = torch.Generator().manual_seed(rows)
    z = torch.randn(rows, CHANNELS, generator=generator).to(DEVICE).requires_grad_()
    log_det, upstream = (torch.randn(rows, generator=generator).to(DEVICE) for _ in range(2))
    return z, (CHANNELS * log_det).requires_grad_(), upstream


@lru_cache(maxsize=1)
def exact(rows: int) -> tuple[Tensor, ...]:
    """Return the reference's values and gradients, in float64."""
    z, log_det, upstream = (tensor.detach().double() for tensor in make_rows(rows))
    return values_and_gradients(reference.log_likelihood, z.requires_grad_(), log_det.requires_grad_(), upstream)


def values_and_gradients(operation: Operation, z: Tensor, log_det: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    lp = operation(z, log_det)
    return lp.detach(), *torch.autograd.grad(lp, (z, log_det), upstream)


def contender(make_operation: Callable[[], Operation], rows: int) -> Contender:
    call = partial(values_and_gradients, make_operation(), *make_rows(rows))

    def error() -> float:
        pairs = zip(call(), exact(rows), strict=True)
        return float(torch.stack([(value - truth).norm() / truth.norm() for value, truth in pairs]).max())

    return Contender(call, error, TOLERANCE)


def plain() -> Operation:
    return reference.log_likelihood


def ours(impl: Impl) -> Operation:
    return partial(log_likelihood, impl=impl)


def official_operation(path: str) -> Operation:
    code = load(path)
    return lambda z, log_det: code.log_likelihood(CHANNELS, z, log_det) / CHANNELS


def comparisons() -> list[Comparison]:
    operations = {PLAIN: plain, **implementations(ours)}
    return [
        Comparison(
            f"log-likelihood and gradients, {rows} rows of {CHANNELS} channels",
            baseline=PLAIN,
            contenders={name: partial(contender, make, rows) for name, make in operations.items()},
            sizes={"rows": rows, "channels": CHANNELS},
            rounds=101 if rows < 100_000 else 15,
            warmup=3,
        )
        for rows in (4096, 1_000_000)
    ]


@pytest.mark.parametrize("comparison", comparisons(), ids=lambda comparison: comparison.name)
def test_log_likelihood_and_gradients(comparison: Comparison, official: str | None, benchmark, capsys) -> None:
    if official is not None:
        rows = comparison.sizes["rows"]
        comparison.contenders[OFFICIAL] = partial(contender, partial(official_operation, official), rows)
    run(comparison, benchmark, capsys)
