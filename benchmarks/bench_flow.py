"""The flow against FrEIA eager: inference of one 1024-pixel image's patches, and a training step of 4096 patches.

    pytest benchmarks/bench_flow.py

Levels are those of tf_efficientnet_b6 at 1024 pixels. Every contender's log-likelihoods (and, for the training step,
every gradient) are compared with the float64 oracle before anything is timed; where they differ nothing is reported.
FrEIA gets its condition as a finished tensor: making it is not part of its time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import FrEIA.framework as Ff
import pytest
import torch
from interleave import interleaved, medians, ratio_table, ratios
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastbgad import reference
from fastbgad.flow import ConditionalFlow
from fastbgad.flow_spec import CouplingWeights, FlowSpec
from fastbgad.ops import PositionalRows
from tests.flows import double, freia_flow, relative_error

LEVELS = [(40, 256), (72, 128), (200, 64)]  # channels, height = width
FREIA, FAST = "FrEIA eager", "fastbgad torch"
TRAINING_ROWS = 4096
# Of log-likelihoods: largest error relative to the root mean square. Of gradients: relative error of the whole tensor,
# since a hidden unit that rounds to the other side of its ReLU changes single entries by a lot, for FrEIA as for us.
TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3


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

    def fast_log_likelihood(self) -> Tensor:
        return self.ours(self.x, self.positions, impl="torch").log_likelihood

    def exact(self, rows: int) -> tuple[Tensor, list[CouplingWeights]]:
        """The oracle's log-likelihood of the first rows, in float64, and the weights it used."""
        layers = double(self.ours.weights())
        condition = self.positions.dense(len(self.x), torch.float64, self.x.device)[:rows]
        z, log_det = reference.flow_forward(self.x[:rows].double(), layers, self.spec, condition)
        return reference.log_likelihood(z, log_det), layers


def make_case(channels: int, side: int, rows: int | None) -> Case:
    """Whole maps in raster order, or `rows` rows at random positions as in training."""
    spec = FlowSpec(channels)
    theirs = freia_flow(spec).float()
    ours = ConditionalFlow(spec)
    ours.load_state_dict(theirs.state_dict())
    generator = torch.Generator().manual_seed(channels)
    index = None if rows is None else torch.randint(0, side * side, (rows,), generator=generator)
    count = rows or side * side
    positions = PositionalRows(side, side, index)
    x = torch.randn(count, channels, generator=generator)
    return Case(spec, theirs, ours, x, positions, positions.dense(count, torch.float32, x.device))


def require_close(name: str, value: Tensor, exact: Tensor) -> float:
    return _require(name, relative_error(value, exact), TOLERANCE)


def require_close_gradient(name: str, value: Tensor, exact: Tensor) -> float:
    error = float((value.double() - exact).norm() / exact.norm())
    return _require(f"the gradient of {name}", error, GRADIENT_TOLERANCE)


def _require(name: str, error: float, tolerance: float) -> float:
    if not error < tolerance:
        pytest.fail(f"{name} differs from the oracle by {error:.1e}; nothing is timed")
    return error


def report(benchmark, capsys, title: str, times: dict[str, list[float]], error: float) -> None:
    benchmark.extra_info.update(
        ratio_to_freia=ratios(times, FREIA)[FAST],
        median_seconds=medians(times),
        relative_error=error,
        threads=torch.get_num_threads(),
    )
    with capsys.disabled():
        print(f"\n{title}, {torch.get_num_threads()} threads; equal to the oracle within {error:.0e}")
        print(ratio_table(times, FREIA))


def test_inference_of_a_1024_pixel_image(benchmark, capsys) -> None:
    """All three levels; the ratio of the sums is what an image feels."""
    total: dict[str, list[float]] = {FREIA: [0.0] * 5, FAST: [0.0] * 5}
    worst = 0.0
    cases = [make_case(channels, side, None) for channels, side in LEVELS]
    with torch.no_grad():
        for case, (channels, side) in zip(cases, LEVELS, strict=True):
            exact, _ = case.exact(2000)
            require_close("FrEIA", case.freia_log_likelihood()[:2000], exact)
            error = require_close("fastbgad", case.fast_log_likelihood()[:2000], exact)
            times = interleaved({FREIA: case.freia_log_likelihood, FAST: case.fast_log_likelihood}, rounds=5)
            for name, seconds in times.items():
                total[name] = [a + b for a, b in zip(total[name], seconds, strict=True)]
            with capsys.disabled():
                print(f"\ninference, {side * side} rows x {channels} channels\n{ratio_table(times, FREIA)}")
            worst = max(worst, error)
        benchmark.pedantic(lambda: [case.fast_log_likelihood() for case in cases], rounds=3)
    report(benchmark, capsys, "inference of one 1024-pixel image, three levels", total, worst)


@pytest.mark.parametrize(("channels", "side"), LEVELS)
def test_training_step(benchmark, capsys, channels: int, side: int) -> None:
    """Forward, L_ml, backward and Adam on 4096 gathered rows; each side with the optimiser it comes with."""
    case = make_case(channels, side, TRAINING_ROWS)
    worst = check_gradients(case)
    contenders: dict[str, Callable[[], object]] = {}
    for name, flow, run, options in (
        (FREIA, case.theirs, case.freia_log_likelihood, {}),
        (FAST, case.ours, case.fast_log_likelihood, {"fused": True}),
    ):
        optimizer = torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], lr=2e-4, **options)

        def step(optimizer=optimizer, run=run) -> None:
            optimizer.zero_grad()
            (-logsigmoid(run())).mean().backward()
            optimizer.step()

        contenders[name] = step
    times = interleaved(contenders, rounds=21, warmup=3)
    benchmark.pedantic(contenders[FAST], rounds=5)
    report(benchmark, capsys, f"training step, {TRAINING_ROWS} rows x {channels} channels", times, worst)


def check_gradients(case: Case) -> float:
    """Largest error of a gradient of either side against the oracle's."""
    lp, layers = case.exact(TRAINING_ROWS)
    (-logsigmoid(lp)).mean().backward()
    worst = 0.0
    for flow, run in ((case.theirs, case.freia_log_likelihood), (case.ours, case.fast_log_likelihood)):
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
            for name, (parameter, truth) in pairs.items():
                assert parameter.grad is not None
                assert truth.grad is not None
                gradient = parameter.grad.reshape(truth.grad.shape)
                worst = max(worst, require_close_gradient(name, gradient, truth.grad))
    return worst
