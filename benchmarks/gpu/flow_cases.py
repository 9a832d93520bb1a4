"""Contenders for the flow's inference on whole feature maps: ours against FrEIA's.

"eager FrEIA" is FrEIA's AllInOneBlock operation by operation, re-stated by the reference in float32, so that there is a
comparison where FrEIA is not installed; where it is, FrEIA itself takes part too. TF32 is off, as it is by default.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbgad import accelerate, positional_rows, reference
from fastbgad.bench.roofline import flow_bytes, flow_flops
from fastbgad.flow_spec import FlowSpec
from fastbgad.model.flow import ConditionalFlow
from fastbgad.ops import PositionalRows
from tests.flows import double, freia_flow

from .case import COMPILED, EAGER, FREIA, GRAPH, KERNELS, PORTABLE, Case, Contender, SkippedError, graph_of

STREAMS = f"{KERNELS}, levels on streams of one CUDA graph"
DENSE, POSITIONS = "fastbgad accelerate, dense condition", "fastbgad accelerate, positional_rows"


@dataclass
class Level:
    """One level's flow, whole maps of features and the finished encoding that FrEIA wants."""

    flow: ConditionalFlow
    x: Tensor
    positions: PositionalRows
    encoding: Tensor

    @classmethod
    def make(cls, channels: int, side: int, depth: int, device: torch.device) -> Level:
        spec = FlowSpec(channels, coupling_layers=depth)
        flow = ConditionalFlow(spec, seed=channels).to(device).requires_grad_(False).freeze()
        generator = torch.Generator().manual_seed(channels)
        x = torch.randn(side * side, channels, generator=generator).to(device)
        positions = PositionalRows(side, side)
        return cls(flow, x, positions, positions.dense(len(x), torch.float32, device))

    def eager(self) -> Tensor:
        z, log_det = reference.flow_forward(self.x, self.flow.weights(), self.flow.spec, self.encoding)
        return reference.log_likelihood(z, log_det)

    def exact(self) -> Tensor:
        return torch.cat(
            [
                reference.log_likelihood(
                    *reference.flow_forward(x.double(), double(self.flow.weights()), self.flow.spec, p.double())
                ).detach()
                for x, p in zip(self.x.split(8192), self.encoding.split(8192), strict=True)
            ]
        )

    def fast(self, impl: Any) -> Tensor:
        return self.flow(self.x, self.positions, impl=impl).log_likelihood

    def freia(self) -> Callable[[], Tensor]:
        theirs = self._theirs()
        return lambda: reference.log_likelihood(*theirs(self.x, [self.encoding]))

    def accelerated(self, condition: Tensor) -> Callable[[], Tensor]:
        """FrEIA's flow after `fastbgad.accelerate`, on the kernels, with float32 operands as that has it."""
        theirs = accelerate(self._theirs(), impl="triton").eval()
        return lambda: reference.log_likelihood(*theirs(self.x, [condition]))

    def positions_tensor(self) -> Tensor:
        return positional_rows(self.positions.height, self.positions.width, device=self.x.device)

    def _theirs(self) -> Any:
        theirs = freia_flow(self.flow.spec).float().to(self.x.device).requires_grad_(False)
        theirs.load_state_dict(self.flow.state_dict())
        return theirs


def flow_case(name: str, sizes: Sequence[tuple[int, int]], depth: int, device: torch.device) -> Case:
    """Return the case of maps of (channels, side) that go through a flow each."""
    levels = [Level.make(channels, side, depth, device) for channels, side in sizes]

    def of(*calls: Callable[[], Tensor]) -> Contender:
        return Contender(lambda: [call() for call in calls])

    def freia() -> Contender:
        _require_freia()
        return of(*(level.freia() for level in levels))

    def accelerated(condition: Callable[[Level], Tensor]) -> Contender:
        _require_freia()
        return of(*(level.accelerated(condition(level)) for level in levels))

    def single() -> Contender:
        flows = [copy.deepcopy(level) for level in levels]
        for level in flows:
            level.flow.matmul_precision = "float32"
        return of(*(partial(level.fast, "triton") for level in flows))

    def kernels() -> Contender:
        return of(*(partial(level.fast, "triton") for level in levels))

    def streams() -> Contender:
        if device.type != "cuda":
            raise SkippedError("streams need a GPU")
        side = [torch.cuda.Stream() for _ in levels]
        return graph_of(Contender(lambda: _side_by_side([partial(lv.fast, "triton") for lv in levels], side)), device)

    contenders = {
        EAGER: lambda: of(*(level.eager for level in levels)),
        FREIA: freia,
        PORTABLE: lambda: of(*(partial(level.fast, "torch") for level in levels)),
        KERNELS: kernels,
        GRAPH: lambda: graph_of(kernels(), device),
        **({STREAMS: streams} if len(levels) > 1 else {}),
        f"{KERNELS}, float32": single,
        DENSE: lambda: accelerated(lambda level: level.encoding),
        POSITIONS: lambda: accelerated(Level.positions_tensor),
    }
    return Case(
        name,
        lambda: [level.exact() for level in levels],
        contenders,
        5e-5,
        flops=sum(flow_flops(side * side, channels, depth) for channels, side in sizes),
        bytes=sum(flow_bytes(side * side, channels) for channels, side in sizes),
    )


def compiled_flow_case(name: str, sizes: Sequence[tuple[int, int]], depth: int, device: torch.device) -> Case:
    """Return `flow_case` with FrEIA under torch.compile, which takes its time, and the kernels beside it."""
    case = flow_case(name, sizes, depth, device)
    levels = [Level.make(channels, side, depth, device) for channels, side in sizes]

    def compiled() -> Contender:
        if device.type != "cuda":
            raise SkippedError("compiling for a CPU needs a C++ compiler")
        calls = [torch.compile(level.eager, dynamic=False) for level in levels]
        return Contender(lambda: [call() for call in calls])

    case.contenders = {COMPILED: compiled, KERNELS: case.contenders[KERNELS], GRAPH: case.contenders[GRAPH]}
    return case


def _side_by_side(calls: Sequence[Callable[[], Tensor]], streams: Sequence[torch.cuda.Stream]) -> list[Tensor]:
    """Run each call on a stream of its own; what follows on the current stream waits for all of them."""
    current = torch.cuda.current_stream()
    found = []
    for call, stream in zip(calls, streams, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            found.append(call())
    for stream in streams:
        current.wait_stream(stream)
    return found


def _require_freia() -> None:
    if importlib.util.find_spec("FrEIA") is None:
        raise SkippedError("FrEIA is not installed; CONTRIBUTING says how to carry its wheel")
