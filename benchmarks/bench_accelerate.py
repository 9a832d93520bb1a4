"""Code written for FrEIA, the official BGAD and anomalib, as it is and with `fastbgad.accelerate`.

    pytest benchmarks/bench_accelerate.py

- A FrEIA flow, forward: with a finished dense condition on all sides, and with positions from `positional_rows`.
- The official training loop, re-stated in tests/official_loop.py: FrEIA's flow and functions that select rows by
  boolean indices, against the same loop with its import line changed and the flow accelerated.
- anomalib's whole Cflow, encoder and anomaly map included.

Results are compared before anything is timed: with the float64 oracle, the parameters after 20 steps, the maps.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from harness import DEVICE, FREIA, FREIA_COMPILED, Comparison, Contender, SkippedError, compiled, run
from torch import Tensor

import fastbgad
from fastbgad.compat import bgad
from fastbgad.flow_spec import FlowSpec
from tests.flows import freia_flow, relative_error, whole_error
from tests.official_loop import CHUNK_ROWS, plain, train_level

OFFICIAL, ANOMALIB = "official loop", "anomalib Cflow"
DENSE, PLACES = "fastbgad accelerate, dense condition", "fastbgad accelerate, positional_rows"
ACCELERATED = "fastbgad accelerate"
CHECKED_ROWS, CHECKED_STEPS = 2000, 20
# Of z and log_det, relative to their root mean square; of parameters, each as a whole; of maps, to the largest value.
FORWARD_TOLERANCE, PARAMETER_TOLERANCE, MAP_TOLERANCE = 1e-5, 1e-4, 1e-4


class Forward:
    """A flow of FrEIA twice, and the patches of a map."""

    def __init__(self, channels: int, side: int) -> None:
        spec = FlowSpec(channels)
        self.original = freia_flow(spec).float().requires_grad_(False).to(DEVICE).eval()
        self.fast = fastbgad.accelerate(copy.deepcopy(self.original))
        self.where = fastbgad.positional_rows(side, side, device=DEVICE)
        self.dense = self.where.values()
        self.x = torch.randn(side * side, channels, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        exact = copy.deepcopy(self.original).double()
        with torch.no_grad():
            self.exact = exact(self.x[:CHECKED_ROWS].double(), [self.dense[:CHECKED_ROWS].double()])

    def prepare(self, name: str) -> Callable[[], tuple[Tensor, Tensor]]:
        calls: dict[str, Callable[[], Any]] = {
            FREIA: lambda: partial(self.original, self.x, [self.dense]),
            FREIA_COMPILED: lambda: compiled(partial(self.original, self.x, [self.dense])),
            DENSE: lambda: partial(self.fast, self.x, [self.dense]),
            PLACES: lambda: partial(self.fast, self.x, [self.where]),
        }
        return torch.no_grad()(calls[name]())


def forward(channels: int, side: int, **options: Any) -> Comparison:
    case = functools.cache(lambda: Forward(channels, side))

    def prepare(name: str) -> Contender:
        call = case().prepare(name)

        def error() -> float:
            pairs = zip(call(), case().exact, strict=True)
            return max(relative_error(found[:CHECKED_ROWS], exact) for found, exact in pairs)

        return Contender(call, error, FORWARD_TOLERANCE)

    return Comparison(
        f"FrEIA flow accelerated, forward, {side * side} rows of {channels} channels",
        FREIA,
        {name: partial(prepare, name) for name in (FREIA, FREIA_COMPILED, DENSE, PLACES)},
        ours=(DENSE, PLACES),
        sizes={"rows": side * side, "channels": channels},
        **options,
    )


class Loop:
    """A batch of one level: enough patches for two steps; some of them anomalous."""

    def __init__(self, channels: int, side: int) -> None:
        self.batch = 2 * CHUNK_ROWS // side**2
        generator = torch.Generator().manual_seed(channels)
        self.maps = torch.randn(self.batch, channels, side, side, generator=generator).to(DEVICE)
        self.masks = (torch.rand(self.batch, 1, 4 * side, 4 * side, generator=generator) < 0.1).float().to(DEVICE)
        self.first = freia_flow(FlowSpec(channels)).float().to(DEVICE)

    def start(self, name: str) -> tuple[Any, Callable[[], object]]:
        decoder = copy.deepcopy(self.first)
        if name == ACCELERATED:
            fastbgad.accelerate(decoder)
        optimizer = torch.optim.Adam(decoder.parameters(), lr=2e-4)
        functions = bgad if name == ACCELERATED else plain
        return decoder, partial(train_level, functions, decoder, optimizer, self.maps, self.masks)

    def trained(self, name: str) -> list[Tensor]:
        """The parameters after some steps on the same rows."""
        decoder, call = self.start(name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for _ in range(CHECKED_STEPS // 2):
                call()
        return list(decoder.parameters())


def official_loop(channels: int, side: int, **options: Any) -> Comparison:
    case = functools.cache(lambda: Loop(channels, side))

    def prepare(name: str) -> Contender:
        def error() -> float:
            pairs = zip(case().trained(name), case().trained(OFFICIAL), strict=True)
            return max(whole_error(found, expected) for found, expected in pairs)

        _, call = case().start(name)
        return Contender(call, None if name == OFFICIAL else error, PARAMETER_TOLERANCE)

    return Comparison(
        f"official training loop, 2 steps of {CHUNK_ROWS} rows of {channels} channels",
        OFFICIAL,
        {name: partial(prepare, name) for name in (OFFICIAL, ACCELERATED)},
        ours=(ACCELERATED,),
        sizes={"rows": 2 * CHUNK_ROWS, "channels": channels},
        **options,
    )


class Cflow:
    """anomalib's Cflow with random weights, twice, and an image."""

    def __init__(self, backbone: str, size: int) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from anomalib.models.image.cflow.torch_model import CflowModel
        except ImportError as error:
            raise SkippedError(f"anomalib is not installed ({error}); pip install 'fastbgad[peers]'") from error
        torch.manual_seed(0)
        self.original = CflowModel(backbone, ["layer2", "layer3", "layer4"], pre_trained=False).to(DEVICE).eval()
        self.fast = fastbgad.accelerate(copy.deepcopy(self.original))
        self.image = torch.rand(1, 3, size, size).to(DEVICE)

    def prepare(self, name: str) -> Callable[[], Tensor]:
        model = self.fast if name == ACCELERATED else self.original
        return lambda: model(self.image).anomaly_map


def cflow_inference(backbone: str, size: int, **options: Any) -> Comparison:
    case = functools.cache(lambda: Cflow(backbone, size))

    def prepare(name: str) -> Contender:
        call = case().prepare(name)

        def error() -> float:
            truth = case().prepare(ANOMALIB)()
            return float((call() - truth).abs().max() / truth.abs().max())

        return Contender(call, None if name == ANOMALIB else error, MAP_TOLERANCE)

    return Comparison(
        f"image inference against anomalib's Cflow, {backbone}, 1 of {size} pixels",
        ANOMALIB,
        {name: partial(prepare, name) for name in (ANOMALIB, ACCELERATED)},
        ours=(ACCELERATED,),
        sizes={"pixels": size},
        images=1,
        **options,
    )


def comparisons() -> list[Comparison]:
    return [
        forward(40, 256, rounds=9, track=True),
        official_loop(40, 64, rounds=15, warmup=2, track=True),
        official_loop(72, 32, rounds=9, warmup=2),
        official_loop(200, 16, rounds=5),
        cflow_inference("resnet18", 256, rounds=15, warmup=2, track=True),
        cflow_inference("wide_resnet50_2", 256, rounds=5),
    ]


@pytest.mark.parametrize("comparison", comparisons(), ids=lambda comparison: comparison.name)
def test_accelerate(comparison: Comparison, benchmark, capsys) -> None:
    run(comparison, benchmark, capsys)
