"""The loss with its boundary, forward and backward: a training chunk of 4096 rows, and a million rows.

    pytest benchmarks/bench_spp_loss.py
    pytest benchmarks/bench_spp_loss.py --official PATH     with your own checkout of the official code as a contender

The plain form selects rows with boolean indices and reads counts on the host, as the official code does; it is the
oracle run in float32. Every contender's terms and gradient are compared with the oracle in float64 before it is timed.
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
from fastbgad.ops import Impl, spp_loss

PLAIN = "plain, boolean indexing"
CHANNELS = 40
OPTIONS = {"beta": 0.01, "tau": 0.1, "focal": True}
# Relative to the largest entry of each: float32 rounding, summed over up to a million rows.
TOLERANCE = 1e-4

# What every contender returns: total, L_ml, L_n and L_a, and perhaps more.
Terms = tuple[Tensor, ...]
Loss = Callable[[Tensor, Tensor], Terms]


# One size at a time: the rows of one comparison go when the next one makes its own.
@lru_cache(maxsize=1)
def make_rows(rows: int) -> tuple[Tensor, Tensor]:
    """lp float32 [rows] as of a flow in training, and anomalous bool [rows], one row in ten."""
    generator = torch.Generator().manual_seed(rows)
    lp = 4 * torch.randn(rows, generator=generator) - 3
    return lp.to(DEVICE), (torch.rand(rows, generator=generator) < 0.1).to(DEVICE)


@lru_cache(maxsize=1)
def exact(rows: int) -> tuple[Tensor, ...]:
    """Return the reference's gradient and terms, in float64."""
    lp, anomalous = make_rows(rows)
    return forward_backward(plain(), lp.double(), anomalous)


def forward_backward(loss: Loss, lp: Tensor, anomalous: Tensor) -> tuple[Tensor, ...]:
    """The gradient [N], then the first four terms."""
    leaf = lp.detach().requires_grad_()
    terms = loss(leaf, anomalous)
    terms[0].backward()
    assert leaf.grad is not None
    return leaf.grad, *(term.detach() for term in terms[:4])


def contender(make_loss: Callable[[], Loss], rows: int) -> Contender:
    lp, anomalous = make_rows(rows)
    call = partial(forward_backward, make_loss(), lp, anomalous)

    def error() -> float:
        pairs = zip(call(), exact(rows), strict=True)
        return float(torch.stack([(value - truth).abs().max() / truth.abs().max() for value, truth in pairs]).max())

    return Contender(call, error, TOLERANCE)


def plain() -> Loss:
    return partial(reference.spp_loss, channels=CHANNELS, **OPTIONS)


def ours(impl: Impl) -> Loss:
    return partial(spp_loss, channels=CHANNELS, impl=impl, **OPTIONS)


def official_loss(path: str) -> Loss:
    """The functions of the checkout at `path`, put together as one step of its training with focal weights does."""
    code = load(path)

    def loss(lp: Tensor, anomalous: Tensor) -> Terms:
        mask = anomalous.to(lp.dtype)  # its masks are images of 0 and 1
        normal, defective = mask == 0, mask == 1
        weights = torch.zeros_like(lp)
        weights[normal] = code.normal_weights(lp.detach()[normal])
        weights[defective] = code.anomalous_weights(lp.detach()[defective])
        ml = (weights[normal] * -torch.nn.functional.logsigmoid(lp[normal])).mean()
        boundaries = code.boundary(lp, mask, OPTIONS["beta"], OPTIONS["tau"], 10)
        pull, push = code.spp_loss(lp, mask, boundaries, 10, weights=weights)
        return ml + pull + push, ml, pull, push

    return loss


def comparisons() -> list[Comparison]:
    losses = {PLAIN: plain, **implementations(ours)}
    return [
        Comparison(
            f"loss with boundary, forward and backward, {rows} rows",
            baseline=PLAIN,
            contenders={name: partial(contender, loss, rows) for name, loss in losses.items()},
            sizes={"rows": rows, "channels": CHANNELS},
            rounds=101 if rows < 100_000 else 9,
            warmup=3,
            memory=rows >= 100_000,
            track=True,
        )
        for rows in (4096, 1_000_000)
    ]


@pytest.mark.parametrize("comparison", comparisons(), ids=lambda comparison: comparison.name)
def test_loss_with_boundary(comparison: Comparison, official: str | None, benchmark, capsys) -> None:
    if official is not None:
        rows = comparison.sizes["rows"]
        comparison.contenders[OFFICIAL] = partial(contender, partial(official_loss, official), rows)
    run(comparison, benchmark, capsys)
