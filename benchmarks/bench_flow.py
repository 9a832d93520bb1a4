"""The flow against FrEIA: the patches of an image, a training step of 4096 patches, and how both scale.

    pytest benchmarks/bench_flow.py

Levels are those of tf_efficientnet_b6. Every contender's log-likelihoods, and in the training step every gradient, are
compared with the float64 oracle before anything is timed. FrEIA gets its condition as a finished tensor: making it is
not part of its time. Training rows lie on the maps of 256-pixel images, the size of the paper's schedule.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from harness import (
    DEVICE,
    FREIA,
    FREIA_COMPILED,
    KERNELS,
    NATIVE,
    ORACLE,
    PORTABLE,
    PORTABLE_COMPILED,
    Comparison,
    Contender,
    compiled,
    kernels_or_skip,
    native_or_skip,
    run,
)
from roofline import LEVELS
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastbgad import reference
from fastbgad.flow_spec import CouplingWeights, FlowSpec
from fastbgad.model.flow import ConditionalFlow
from fastbgad.ops import Impl, PositionalRows
from tests.flows import double, freia_flow, relative_error

TRAINING_ROWS, TRAINING_PIXELS = 4096, 256
CHECKED_ROWS = 2000
# Of log-likelihoods: largest error relative to the root mean square. Of gradients: relative error of the whole tensor,
# since a hidden unit that rounds to the other side of its ReLU changes single entries by a lot, for FrEIA as for us.
# The kernels' operands are float16: their log-likelihoods have a tolerance of their own, and more units change sides.
TOLERANCE, KERNEL_TOLERANCE = 1e-4, 1e-3
GRADIENT_TOLERANCE, KERNEL_GRADIENT_TOLERANCE = 1e-3, 5e-2


@dataclass(frozen=True)
class Level:
    """One level: the same weights in FrEIA's flow and in ours, and patch features."""

    spec: FlowSpec
    theirs: Any
    ours: ConditionalFlow
    x: Tensor
    positions: PositionalRows
    condition: Tensor

    @staticmethod
    def make(channels: int, side: int, rows: int | None = None, coupling_layers: int = 8) -> Level:
        """Whole maps in raster order, or `rows` rows at random positions as in training."""
        spec = FlowSpec(channels, coupling_layers=coupling_layers)
        theirs = freia_flow(spec).float().to(DEVICE)
        ours = ConditionalFlow(spec).to(DEVICE)
        ours.load_state_dict(theirs.state_dict())
        ours.freeze()
        generator = torch.Generator().manual_seed(channels)
        index = None if rows is None else torch.randint(0, side * side, (rows,), generator=generator).to(DEVICE)
        count = rows or side * side
        positions = PositionalRows(side, side, index)
        x = torch.randn(count, channels, generator=generator).to(DEVICE)
        return Level(spec, theirs, ours, x, positions, positions.dense(count, torch.float32, x.device))

    def freia(self) -> Tensor:
        return reference.log_likelihood(*self.theirs(self.x, [self.condition]))

    def fast(self, impl: Impl) -> Tensor:
        return self.ours(self.x, self.positions, impl=impl).log_likelihood

    def exact(self, rows: int) -> tuple[Tensor, list[CouplingWeights]]:
        """Return the reference's log-likelihood of the first rows, in float64, and the weights that it used."""
        layers = double(self.ours.weights())
        condition = self.positions.dense(len(self.x), torch.float64, self.x.device)[:rows]
        z, log_det = reference.flow_forward(self.x[:rows].double(), layers, self.spec, condition)
        return reference.log_likelihood(z, log_det), layers

    def prepare(self, name: str) -> Callable[[], Tensor]:
        """Return a call that computes the log-likelihoods of all rows; raise `SkippedError` if it cannot run."""
        if name == KERNELS:
            kernels_or_skip()
        if name == NATIVE:
            native_or_skip()
        calls: dict[str, Callable[[], Callable[[], Tensor]]] = {
            FREIA: lambda: self.freia,
            FREIA_COMPILED: lambda: compiled(self.freia),
            ORACLE: lambda: partial(self.fast, "reference"),
            PORTABLE: lambda: partial(self.fast, "torch"),
            PORTABLE_COMPILED: lambda: compiled(partial(self.fast, "torch")),
            NATIVE: lambda: partial(self.fast, "native"),
            KERNELS: lambda: partial(self.fast, "triton"),
        }
        return calls[name]()


def inference(name: str, make: Callable[[], Sequence[Level]], contenders: Sequence[str], **options: Any) -> Comparison:
    """All levels of one image, or one of them."""
    levels = functools.cache(make)

    def prepare(contender: str) -> Contender:
        calls = [level.prepare(contender) for level in levels()]

        def every() -> list[Tensor]:
            with torch.no_grad():
                return [call() for call in calls]

        def error() -> float:
            found = every()
            with torch.no_grad():
                exact = [level.exact(CHECKED_ROWS)[0] for level in levels()]
            return max(relative_error(lp[:CHECKED_ROWS], truth) for lp, truth in zip(found, exact, strict=True))

        return Contender(every, error, KERNEL_TOLERANCE if contender == KERNELS else TOLERANCE)

    return Comparison(name, FREIA, {each: partial(prepare, each) for each in contenders}, **options)


def training_step(name: str, make: Callable[[], Level], contenders: Sequence[str], **options: Any) -> Comparison:
    """Forward, L_ml, backward and Adam on gathered rows; each side with the optimiser it comes with."""
    level = functools.cache(make)

    @functools.cache
    def first_weights() -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in level().theirs.state_dict().items()}

    def prepare(contender: str) -> Contender:
        case = level()
        # Both sides as they were before any earlier measurement trained them.
        case.theirs.load_state_dict(first_weights())
        case.ours.load_state_dict(first_weights())
        call = case.prepare(contender)
        theirs = contender in (FREIA, FREIA_COMPILED)
        flow, fused = (case.theirs, {}) if theirs else (case.ours, {"fused": True})
        optimizer = torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], lr=2e-4, **fused)

        def step() -> None:
            optimizer.zero_grad()
            (-logsigmoid(call())).mean().backward()
            optimizer.step()

        tolerance = KERNEL_GRADIENT_TOLERANCE if contender == KERNELS else GRADIENT_TOLERANCE
        return Contender(step, lambda: gradient_error(case, flow, call), tolerance)

    return Comparison(name, FREIA, {each: partial(prepare, each) for each in contenders}, **options)


def gradient_error(case: Level, flow: Any, call: Callable[[], Tensor]) -> float:
    """Return the largest error of a gradient against the reference's, each parameter as a whole."""
    lp, layers = case.exact(len(case.x))
    (-logsigmoid(lp)).mean().backward()
    flow.zero_grad()
    (-logsigmoid(call())).mean().backward()
    worst = 0.0
    for block, exact in zip(flow.module_list, layers, strict=True):
        first, second = block.subnet[0], block.subnet[2]
        pairs = (
            (first.weight, exact.w1),
            (first.bias, exact.b1),
            (second.weight, exact.w2),
            (second.bias, exact.b2),
            (block.global_scale, exact.global_scale),
            (block.global_offset, exact.global_offset),
        )
        for parameter, truth in pairs:
            assert parameter.grad is not None
            assert truth.grad is not None
            gradient = parameter.grad.double().reshape(truth.grad.shape)
            error = float((gradient - truth.grad).norm() / truth.grad.norm())
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def comparisons() -> list[Comparison]:
    every, quick = (FREIA, FREIA_COMPILED, ORACLE, PORTABLE, NATIVE, KERNELS), (FREIA, PORTABLE, NATIVE, KERNELS)
    found = [
        inference(
            "flow inference, one 1024-pixel image",
            lambda: [Level.make(channels, 1024 // stride) for channels, stride in LEVELS],
            every,
            sizes={"pixels": 1024},
            images=1,
            rounds=7,
            track=True,
            band=0.10,  # of all ratios the steadiest: nearly all of it is matrix products
        )
    ]
    for channels, stride in LEVELS:
        rows = (1024 // stride) ** 2
        found.append(
            inference(
                f"flow inference per level, {rows} rows of {channels} channels",
                lambda c=channels, s=1024 // stride: [Level.make(c, s)],
                every,
                sizes={"rows": rows, "channels": channels},
            )
        )
    for channels, stride in LEVELS:
        found.append(
            training_step(
                f"training step, {TRAINING_ROWS} rows of {channels} channels",
                lambda c=channels, s=TRAINING_PIXELS // stride: Level.make(c, s, TRAINING_ROWS),
                every,
                sizes={"rows": TRAINING_ROWS, "channels": channels},
                rounds=15,
                warmup=3,
                track=True,
            )
        )
    for side in (16, 32, 64, 128, 256):
        contenders = (*quick, PORTABLE_COMPILED) if side == 64 else quick
        found.append(
            inference(
                f"flow inference by rows, {side * side} rows of 40 channels",
                lambda s=side: [Level.make(40, s)],
                contenders,
                sizes={"rows": side * side, "channels": 40},
                memory=True,
            )
        )
    for channels in (24, 40, 72, 136, 200, 256):
        found.append(
            inference(
                f"flow inference by channels, 4096 rows of {channels} channels",
                lambda c=channels: [Level.make(c, 64)],
                quick,
                sizes={"rows": 4096, "channels": channels},
            )
        )
    for layers in (2, 4, 8, 16):
        found.append(
            training_step(
                f"training step by coupling layers, {TRAINING_ROWS} rows of 40 channels, {layers} layers",
                lambda n=layers: Level.make(40, 64, TRAINING_ROWS, n),
                quick,
                sizes={"rows": TRAINING_ROWS, "channels": 40, "coupling_layers": layers},
                memory=True,
            )
        )
    return found


@pytest.mark.parametrize("comparison", comparisons(), ids=lambda comparison: comparison.name)
def test_flow(comparison: Comparison, benchmark, capsys) -> None:
    run(comparison, benchmark, capsys)
