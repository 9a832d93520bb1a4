"""The log-likelihood of a latent and its gradients: a training chunk of 4096 rows, and a million rows.

    pytest benchmarks/bench_log_likelihood.py

The plain form is the expression as PyTorch code has it, with autograd's backward. Every contender's values and
gradients are compared with the oracle in float64 before anything is timed. Contenders run on the GPU if there is one;
without one the kernels are skipped by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from interleave import interleaved, medians, ratio_table, ratios
from torch import Tensor

from fastbgad import reference
from fastbgad.ops import log_likelihood
from fastbgad.ops.dispatch import why_not_triton

PLAIN, PORTABLE, KERNELS = "plain expression", "fastbgad torch", "fastbgad triton"
CHANNELS = 40
# Of each result as a whole: roundings of sums of 40 float32 terms.
TOLERANCE = 1e-6

Operation = Callable[[Tensor, Tensor], Tensor]


def make_rows(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """z, log_det and the gradient that comes from the loss."""
    generator = torch.Generator().manual_seed(rows)
    z = torch.randn(rows, CHANNELS, generator=generator).to(device).requires_grad_()
    log_det, upstream = (torch.randn(rows, generator=generator).to(device) for _ in range(2))
    return z, (CHANNELS * log_det).requires_grad_(), upstream


def make_contenders(device: torch.device) -> dict[str, Operation]:
    contenders: dict[str, Operation] = {
        PLAIN: reference.log_likelihood,
        PORTABLE: partial(log_likelihood, impl="torch"),
    }
    if device.type == "cuda" and why_not_triton(torch.empty(0, device=device)) is None:
        contenders[KERNELS] = partial(log_likelihood, impl="triton")
    return contenders


def run(operation: Operation, z: Tensor, log_det: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    lp = operation(z, log_det)
    return lp.detach(), *torch.autograd.grad(lp, (z, log_det), upstream)


def require_equal(name: str, operation: Operation, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Largest relative error of the values and of either gradient; no timing where it is too large."""
    z, log_det, upstream = (tensor.detach().double() for tensor in inputs)
    exact = run(reference.log_likelihood, z.requires_grad_(), log_det.requires_grad_(), upstream)
    pairs = zip(run(operation, *inputs), exact, strict=True)
    error = max(float((value.double() - truth).norm() / truth.norm()) for value, truth in pairs)
    if not error < TOLERANCE:
        pytest.fail(f"{name} differs from the oracle by {error:.1e}; nothing is timed")
    return error


@pytest.mark.parametrize("rows", [4096, 1_000_000])
def test_log_likelihood_and_gradients(benchmark, capsys, rows: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = make_rows(rows, device)
    contenders = make_contenders(device)
    error = max(require_equal(name, operation, inputs) for name, operation in contenders.items())
    calls = {name: partial(run, operation, *inputs) for name, operation in contenders.items()}
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
            f"\nlog-likelihood and gradients, {rows} rows of {CHANNELS} channels, {where}; equal to the oracle within "
            f"{error:.0e}"
        )
        print(ratio_table(times, PLAIN))
        if KERNELS not in contenders:
            print(f"skipped: {KERNELS} (no GPU that it runs on)")
