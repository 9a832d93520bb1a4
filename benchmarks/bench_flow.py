"""The flow against FrEIA eager: inference of one 1024-pixel image's patches, and a training step of 4096 patches.

    pytest benchmarks/bench_flow.py

Contenders run on the GPU if there is one; without one the kernels are skipped by name (`make gpu` has more). Levels are
those of tf_efficientnet_b6 at 1024 pixels. Every contender's log-likelihoods, and in the training step every gradient,
are compared with the float64 oracle before anything is timed; where they differ nothing is reported. FrEIA gets its
condition as a finished tensor: making it is not part of its time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import FrEIA.framework as Ff
import pytest
import torch
from interleave import interleaved, medians, ratio_table, ratios
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastbgad import reference
from fastbgad.flow import ConditionalFlow
from fastbgad.flow_spec import CouplingWeights, FlowSpec
from fastbgad.ops import Impl, PositionalRows
from fastbgad.ops.dispatch import why_not_triton
from tests.flows import double, freia_flow, relative_error

LEVELS = [(40, 256), (72, 128), (200, 64)]  # channels, height = width
FREIA, FAST, KERNELS = "FrEIA eager", "fastbgad torch", "fastbgad triton"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HAS_KERNELS = DEVICE.type == "cuda" and why_not_triton(torch.empty(0, device=DEVICE)) is None
FASTEST = KERNELS if HAS_KERNELS else FAST
TRAINING_ROWS = 4096
# Of log-likelihoods: largest error relative to the root mean square. Of gradients: relative error of the whole tensor,
# since a hidden unit that rounds to the other side of its ReLU changes single entries by a lot, for FrEIA as for us.
# The kernels' operands are float16: their log-likelihoods have a tolerance of their own, and more units change sides.
TOLERANCE = {FREIA: 1e-4, FAST: 1e-4, KERNELS: 1e-3}
GRADIENT_TOLERANCE = {FREIA: 1e-3, FAST: 1e-3, KERNELS: 5e-2}


@dataclass(frozen=True)
class Case:
    """One level: the same weights in FrEIA's flow and in ours, and patch features."""

    spec: FlowSpec
    theirs: Ff.SequenceINN
    ours: ConditionalFlow
    x: Tensor
    positions: PositionalRows
    condition: Tensor

    def freia_log_likelihood(self) -> Tensor:
        z, log_det = self.theirs(self.x, [self.condition])
        channels = self.spec.channels
        return (-channels / 2 * math.log(2 * math.pi) - 0.5 * (z**2).sum(dim=1) + log_det) / channels

    def fast_log_likelihood(self, impl: Impl) -> Tensor:
        return self.ours(self.x, self.positions, impl=impl).log_likelihood

    def contenders(self) -> dict[str, Callable[[], Tensor]]:
        """name -> log-likelihood of all rows."""
        found = {FREIA: self.freia_log_likelihood, FAST: partial(self.fast_log_likelihood, "torch")}
        return found | ({KERNELS: partial(self.fast_log_likelihood, "triton")} if HAS_KERNELS else {})

    def exact(self, rows: int) -> tuple[Tensor, list[CouplingWeights]]:
        """The oracle's log-likelihood of the first rows, in float64, and the weights it used."""
        layers = double(self.ours.weights())
        condition = self.positions.dense(len(self.x), torch.float64, self.x.device)[:rows]
        z, log_det = reference.flow_forward(self.x[:rows].double(), layers, self.spec, condition)
        return reference.log_likelihood(z, log_det), layers


def make_case(channels: int, side: int, rows: int | None) -> Case:
    """Whole maps in raster order, or `rows` rows at random positions as in training."""
    spec = FlowSpec(channels)
    theirs = freia_flow(spec).float().to(DEVICE)
    ours = ConditionalFlow(spec).to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    ours.freeze()
    generator = torch.Generator().manual_seed(channels)
    index = None if rows is None else torch.randint(0, side * side, (rows,), generator=generator).to(DEVICE)
    count = rows or side * side
    positions = PositionalRows(side, side, index)
    x = torch.randn(count, channels, generator=generator).to(DEVICE)
    return Case(spec, theirs, ours, x, positions, positions.dense(count, torch.float32, x.device))


def require_close(name: str, value: Tensor, exact: Tensor) -> float:
    return _require(name, relative_error(value, exact), TOLERANCE[name])


def require_close_gradient(name: str, parameter: str, value: Tensor, exact: Tensor) -> float:
    error = float((value.double() - exact).norm() / exact.norm())
    return _require(f"{name}, gradient of {parameter},", error, GRADIENT_TOLERANCE[name])


def _require(name: str, error: float, tolerance: float) -> float:
    if not error < tolerance:
        pytest.fail(f"{name} differs from the oracle by {error:.1e}; nothing is timed")
    return error


def synchronize() -> Callable[[], object] | None:
    return torch.cuda.synchronize if DEVICE.type == "cuda" else None


def report(benchmark, capsys, title: str, times: dict[str, list[float]], error: float) -> None:
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
        ratio_to_freia=ratios(times, FREIA)[FASTEST],
        median_seconds=medians(times),
        relative_error=error,
        threads=torch.get_num_threads(),
    )
    with capsys.disabled():
        print(f"\n{title}, {torch.get_num_threads()} threads; equal to the oracle within {error:.0e}")
        print(ratio_table(times, FREIA))
        if not HAS_KERNELS:
            print(f"skipped: {KERNELS} (no GPU that it runs on)")


def test_inference_of_a_1024_pixel_image(benchmark, capsys) -> None:
    """All three levels; the ratio of the sums is what an image feels."""
    total: dict[str, list[float]] = {}
    worst = 0.0
    cases = [make_case(channels, side, None) for channels, side in LEVELS]
    with torch.no_grad():
        for case, (channels, side) in zip(cases, LEVELS, strict=True):
            exact, _ = case.exact(2000)
            calls = case.contenders()
            for name, call in calls.items():
                error = require_close(name, call()[:2000], exact)
                worst = max(worst, error if name == FASTEST else 0.0)
            times = interleaved(calls, rounds=5, synchronize=synchronize())
            for name, seconds in times.items():
                total[name] = [a + b for a, b in zip(total.get(name, [0.0] * 5), seconds, strict=True)]
            with capsys.disabled():
                print(f"\ninference, {side * side} rows x {channels} channels\n{ratio_table(times, FREIA)}")
        benchmark.pedantic(lambda: [case.contenders()[FASTEST]() for case in cases], rounds=3)
    report(benchmark, capsys, "inference of one 1024-pixel image, three levels", total, worst)


@pytest.mark.parametrize(("channels", "side"), LEVELS)
def test_training_step(benchmark, capsys, channels: int, side: int) -> None:
    """Forward, L_ml, backward and Adam on 4096 gathered rows; each side with the optimiser it comes with."""
    case = make_case(channels, side, TRAINING_ROWS)
    worst = check_gradients(case)
    contenders: dict[str, Callable[[], object]] = {}
    for name, run in case.contenders().items():
        flow, options = (case.theirs, {}) if name == FREIA else (case.ours, {"fused": True})
        optimizer = torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], lr=2e-4, **options)

        def step(optimizer=optimizer, run=run) -> None:
            optimizer.zero_grad()
            (-logsigmoid(run())).mean().backward()
            optimizer.step()

        contenders[name] = step
    times = interleaved(contenders, rounds=21, warmup=3, synchronize=synchronize())
    benchmark.pedantic(contenders[FASTEST], rounds=5)
    report(benchmark, capsys, f"training step, {TRAINING_ROWS} rows x {channels} channels", times, worst)


def check_gradients(case: Case) -> float:
    """Largest error of a gradient of either side against the oracle's."""
    lp, layers = case.exact(TRAINING_ROWS)
    (-logsigmoid(lp)).mean().backward()
    worst = 0.0
    for name, run in case.contenders().items():
        flow = case.theirs if name == FREIA else case.ours
        flow.zero_grad()
        (-logsigmoid(run())).mean().backward()
        for block, exact in zip(flow.module_list, layers, strict=True):
            pairs = {
                "w1": (block.subnet[0].weight, exact.w1),
                "b1": (block.subnet[0].bias, exact.b1),
                "w2": (block.subnet[2].weight, exact.w2),
                "b2": (block.subnet[2].bias, exact.b2),
                "global_scale": (block.global_scale, exact.global_scale),
                "global_offset": (block.global_offset, exact.global_offset),
            }
            for field, (parameter, truth) in pairs.items():
                assert parameter.grad is not None
                assert truth.grad is not None
                gradient = parameter.grad.reshape(truth.grad.shape)
                worst = max(worst, require_close_gradient(name, field, gradient, truth.grad))
    return worst
