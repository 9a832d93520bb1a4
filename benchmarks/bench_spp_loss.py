"""The loss with its boundary, forward and backward: a training chunk of 4096 rows, and a million rows.

    pytest benchmarks/bench_spp_loss.py

The plain form selects rows with boolean indices and reads counts on the host, as the official code does; it is the
oracle run in float32. Every contender's terms and gradient are compared with the oracle in float64 before anything is
timed. Contenders run on the GPU if there is one; without one the kernels are skipped by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from interleave import interleaved, medians, ratio_table, ratios
from torch import Tensor

from fastbgad import reference
from fastbgad.ops import spp_loss
from fastbgad.ops.dispatch import why_not_triton
from fastbgad.reference import SppLoss

PLAIN, PORTABLE, KERNELS = "plain, boolean indexing", "fastbgad torch", "fastbgad triton"
CHANNELS = 40
OPTIONS = {"beta": 0.01, "tau": 0.1, "focal": True}
# Relative to the largest entry of each: float32 rounding, summed over up to a million rows.
TOLERANCE = 1e-4

Loss = Callable[[Tensor, Tensor], SppLoss]


def make_rows(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Log-likelihoods of a flow in training, one row in ten anomalous."""
    generator = torch.Generator().manual_seed(rows)
    lp = 4 * torch.randn(rows, generator=generator) - 3
    return lp.to(device), (torch.rand(rows, generator=generator) < 0.1).to(device)


def make_contenders(device: torch.device) -> dict[str, Loss]:
    contenders: dict[str, Loss] = {
        PLAIN: partial(reference.spp_loss, channels=CHANNELS, **OPTIONS),
        PORTABLE: partial(spp_loss, channels=CHANNELS, impl="torch", **OPTIONS),
    }
    if device.type == "cuda" and why_not_triton(torch.empty(0, device=device)) is None:
        contenders[KERNELS] = partial(spp_loss, channels=CHANNELS, impl="triton", **OPTIONS)
    return contenders


def run(loss: Loss, lp: Tensor, anomalous: Tensor) -> tuple[SppLoss, Tensor]:
    leaf = lp.detach().requires_grad_()
    terms = loss(leaf, anomalous)
    terms.total.backward()
    assert leaf.grad is not None
    return SppLoss(*(term.detach() for term in terms)), leaf.grad


def require_equal(name: str, loss: Loss, lp: Tensor, anomalous: Tensor) -> float:
    """Largest relative error of the terms and of the gradient; no timing where it is too large."""
    exact, exact_gradient = run(partial(reference.spp_loss, channels=CHANNELS, **OPTIONS), lp.double(), anomalous)
    terms, gradient = run(loss, lp, anomalous)
    pairs = [(gradient, exact_gradient), *zip(terms[:4], exact[:4], strict=True)]
    error = max(float((value.double() - truth).abs().max() / truth.abs().max()) for value, truth in pairs)
    if not error < TOLERANCE:
        pytest.fail(f"{name} differs from the oracle by {error:.1e}; nothing is timed")
    return error


@pytest.mark.parametrize("rows", [4096, 1_000_000])
def test_loss_with_boundary(benchmark, capsys, rows: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lp, anomalous = make_rows(rows, device)
    contenders = make_contenders(device)
    error = max(require_equal(name, loss, lp, anomalous) for name, loss in contenders.items())
    calls = {name: partial(run, loss, lp, anomalous) for name, loss in contenders.items()}
    times = interleaved(
        calls,
        rounds=101 if rows < 100_000 else 15,
        warmup=3,
        synchronize=torch.cuda.synchronize if device.type == "cuda" else None,
    )
    fastest = KERNELS if KERNELS in calls else PORTABLE
    benchmark.pedantic(calls[fastest], rounds=5)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    benchmark.extra_info.update(
        device=where, ratio_to_plain=ratios(times, PLAIN), median_seconds=medians(times), relative_error=error
    )
    with capsys.disabled():
        print(
            f"\nloss with boundary, forward and backward, {rows} rows, {where}; equal to the oracle within {error:.0e}"
        )
        print(ratio_table(times, PLAIN))
        if KERNELS not in contenders:
            print(f"skipped: {KERNELS} (no GPU that it runs on)")
