"""What `benchmarks/gpu.py` compares: one case per operation, each with its oracle and its contenders.

"eager FrEIA" is FrEIA's AllInOneBlock operation by operation, re-stated by the oracle in float32, so that there is a
comparison where FrEIA is not installed; where it is, FrEIA itself takes part too. TF32 is off, as it is by default.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from gpu_timing import as_graph
from roofline import flow_bytes, flow_flops
from torch import Tensor
from torch.nn.functional import interpolate

from fastbgad import accelerate, positional_rows, reference
from fastbgad.flow import ConditionalFlow
from fastbgad.flow_spec import FlowSpec
from fastbgad.ops import PositionalRows, boundary, log_likelihood, score_map, spp_loss
from tests.flows import double, freia_flow

EAGER, COMPILED, PORTABLE, KERNELS = "eager FrEIA", "compiled FrEIA", "fastbgad torch", "fastbgad triton"
FREIA = "FrEIA 0.2 eager"
DENSE, PLACES = "fastbgad accelerate, dense condition", "fastbgad accelerate, positional_rows"


class SkippedError(Exception):
    """A contender that cannot take part here; the message says why."""


@dataclass
class Contender:
    """What is timed, and what it computes.

    Attributes:
        call: one run; its work is done on the device when the stream has caught up.
        results: what a run returned, as the tensors that are compared with the case's `exact`.
    """

    call: Callable[[], Any]
    results: Callable[[Any], Sequence[Tensor]] = list


@dataclass
class Case:
    """One operation at one size.

    Attributes:
        name: operation and size.
        operation: which equivalence tests must have passed: "flow", "log_likelihood", "spp_loss",
            "boundary" or "score_map".
        exact: the oracle's results in float64.
        contenders: name -> function that prepares one (and may raise `SkippedError`); the first is the baseline.
        tolerance: relative error of each result as a whole.
        flops, bytes: what the operation needs at least, where that is known.
    """

    name: str
    operation: str
    exact: Callable[[], Sequence[Tensor]]
    contenders: dict[str, Callable[[], Contender]]
    tolerance: float
    flops: int = 0
    bytes: int = 0
    rounds: int = 30
    notes: list[str] = field(default_factory=list)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """All cases; `quick` makes them small enough for the interpreter."""
    levels = [(8, 3)] if quick else [(40, 256), (72, 128), (200, 64)]
    depth = 2 if quick else 8
    if not quick:
        yield flow_case("flow, three levels of a 1024-pixel image", levels, depth, device)
    for channels, side in levels:
        yield flow_case(f"flow, {side * side} rows of {channels} channels", [(channels, side)], depth, device)
    for channels, side in levels:
        yield training_case(channels, side, 40 if quick else 4096, depth, device)
    yield log_likelihood_case(*((70, 8) if quick else (1_000_000, 40)), device)
    for rows in (70,) if quick else (4096, 1_000_000):
        yield loss_case(rows, device)
    for rows in (70,) if quick else (4096, 1_000_000, 4_000_000):
        yield boundary_case(rows, device)
    yield score_map_case(20 if quick else 1024, device)


def _freia_installed() -> None:
    if importlib.util.find_spec("FrEIA") is None:
        raise SkippedError("FrEIA is not installed")


def _graph(contender: Contender, device: torch.device) -> Contender:
    if device.type != "cuda":
        raise SkippedError("CUDA graphs need a GPU")
    return Contender(as_graph(contender.call), contender.results)


# ---------------------------------------------------------------- flow, inference


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

    def places(self) -> Tensor:
        return positional_rows(self.positions.height, self.positions.width, device=self.x.device)

    def _theirs(self) -> Any:
        theirs = freia_flow(self.flow.spec).float().to(self.x.device).requires_grad_(False)
        theirs.load_state_dict(self.flow.state_dict())
        return theirs


def flow_case(name: str, sizes: Sequence[tuple[int, int]], depth: int, device: torch.device) -> Case:
    levels = [Level.make(channels, side, depth, device) for channels, side in sizes]

    def of(*calls: Callable[[], Tensor]) -> Contender:
        return Contender(lambda: [call() for call in calls])

    def compiled() -> Contender:
        if device.type != "cuda":
            raise SkippedError("compiling for a CPU needs a C++ compiler; this is a dry run")
        return of(*(torch.compile(level.eager, dynamic=False) for level in levels))

    def freia() -> Contender:
        _freia_installed()
        return of(*(level.freia() for level in levels))

    def accelerated(condition: Callable[[Level], Tensor]) -> Contender:
        _freia_installed()
        return of(*(level.accelerated(condition(level)) for level in levels))

    def single() -> Contender:
        flows = [copy.deepcopy(level) for level in levels]
        for level in flows:
            level.flow.precision = "float32"
        return of(*(partial(level.fast, "triton") for level in flows))

    def kernels() -> Contender:
        return of(*(partial(level.fast, "triton") for level in levels))

    contenders = {
        EAGER: lambda: of(*(level.eager for level in levels)),
        FREIA: freia,
        COMPILED: compiled,
        PORTABLE: lambda: of(*(partial(level.fast, "torch") for level in levels)),
        KERNELS: kernels,
        f"{KERNELS}, CUDA graph": lambda: _graph(kernels(), device),
        f"{KERNELS}, float32": single,
        DENSE: lambda: accelerated(lambda level: level.encoding),
        PLACES: lambda: accelerated(Level.places),
    }
    return Case(
        name, "flow", lambda: [level.exact() for level in levels], contenders, 5e-5,
        flops=sum(flow_flops(side * side, channels, depth) for channels, side in sizes),
        bytes=sum(flow_bytes(side * side, channels) for channels, side in sizes),
    )  # fmt: skip


# ---------------------------------------------------------------- training step


class TrainingStep:
    """Forward, boundary, loss, backward and Adam of one chunk of gathered rows.

    The learning rate is zero: the work is the same and the weights stay those that are compared.
    """

    def __init__(self, channels: int, side: int, rows: int, depth: int, device: torch.device, fast: bool) -> None:
        spec = FlowSpec(channels, coupling_layers=depth)
        self.flow = ConditionalFlow(spec, seed=channels).to(device)
        generator = torch.Generator().manual_seed(rows)
        self.store = torch.randn(side * side, channels, generator=generator).to(device)
        self.rows = torch.randint(0, side * side, (rows,), generator=generator).to(device)
        self.anomalous = (torch.rand(rows, generator=generator) < 0.1).to(device)
        self.positions = PositionalRows(side, side)
        self.encoding = self.positions.dense(side * side, torch.float32, device)
        self.channels = channels
        self.parameters = [p for p in self.flow.parameters() if p.requires_grad]
        options: dict[str, Any] = {"fused": True, "capturable": True} if fast and device.type == "cuda" else {}
        self.optimizer = torch.optim.Adam(self.parameters, lr=0.0, **options)

    def eager(self) -> None:
        """As the official code has it: materialised rows and encoding, boolean indices, counts read by the host."""
        x, p = self.store[self.rows], self.encoding[self.rows]
        z, log_det = reference.flow_forward(x, self.flow.weights(), self.flow.spec, p)
        loss = reference.spp_loss(reference.log_likelihood(z, log_det), self.anomalous, self.channels, focal=True)
        self._update(loss.total)

    def fast(self, impl: Any) -> None:
        lp = self.flow(self.store, self.positions, rows=self.rows, impl=impl).log_likelihood
        self._update(spp_loss(lp, self.anomalous, self.channels, focal=True, impl=impl).total)

    def _update(self, total: Tensor) -> None:
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()

    def gradients(self) -> list[Tensor]:
        """All gradients as one vector: a hidden unit that rounds to the other side of its ReLU moves a few entries."""
        return [torch.cat([p.grad.reshape(-1) for p in self.parameters if p.grad is not None])]

    def exact(self) -> list[Tensor]:
        layers = double(self.flow.weights())
        z, log_det = reference.flow_forward(
            self.store[self.rows].double(), layers, self.flow.spec, self.encoding[self.rows].double()
        )
        loss = reference.spp_loss(reference.log_likelihood(z, log_det), self.anomalous, self.channels, focal=True)
        names = ("global_scale", "global_offset", "w1", "b1", "w2", "b2")  # in the order of the parameters
        leaves = [getattr(layer, name) for layer in layers for name in names]
        return [torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss.total, leaves)])]


def training_case(channels: int, side: int, rows: int, depth: int, device: torch.device) -> Case:
    def contender(fast: bool, impl: str = "") -> Contender:
        step = TrainingStep(channels, side, rows, depth, device, fast)
        call = partial(step.fast, impl) if fast else step.eager
        return Contender(call, lambda _: step.gradients())

    contenders = {
        EAGER: lambda: contender(False),
        PORTABLE: lambda: contender(True, "torch"),
        KERNELS: lambda: contender(True, "triton"),
        f"{KERNELS}, CUDA graph": lambda: _graph(contender(True, "triton"), device),
    }
    exact = TrainingStep(channels, side, rows, depth, device, False).exact
    case = Case(f"training step, {rows} rows of {channels} channels", "flow", exact, contenders, 3e-2)
    case.notes.append("gradients are compared without equal ReLU masks here; the equivalence tests compare them with")
    return case


# ---------------------------------------------------------------- log-likelihood, loss, boundary, anomaly map


def log_likelihood_case(rows: int, channels: int, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(rows)
    z = torch.randn(rows, channels, generator=generator).to(device).requires_grad_()
    log_det, upstream = (torch.randn(rows, generator=generator).to(device) for _ in range(2))
    log_det = (channels * log_det).requires_grad_()

    def run(operation: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        lp = operation(*inputs)
        return [lp.detach(), *torch.autograd.grad(lp, inputs, upstream.to(lp.dtype))]

    def contender(operation: Callable[..., Tensor]) -> Contender:
        return Contender(lambda: run(operation, z, log_det))

    def exact() -> list[Tensor]:
        return run(reference.log_likelihood, *(t.detach().double().requires_grad_() for t in (z, log_det)))

    def kernels() -> Contender:
        return contender(partial(log_likelihood, impl="triton"))

    contenders = {
        "plain expression": lambda: contender(reference.log_likelihood),
        PORTABLE: lambda: contender(partial(log_likelihood, impl="torch")),
        KERNELS: kernels,
        f"{KERNELS}, CUDA graph": lambda: _graph(kernels(), device),
    }
    size = "1M rows" if rows == 1_000_000 else f"{rows} rows"
    return Case(
        f"log-likelihood and gradients, {size} of {channels} channels", "log_likelihood", exact, contenders, 1e-6,
        bytes=4 * rows * (3 * channels + 4),
    )  # fmt: skip


def loss_case(rows: int, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(rows)
    lp = (4 * torch.randn(rows, generator=generator) - 3).to(device).requires_grad_()
    anomalous = (torch.rand(rows, generator=generator) < 0.1).to(device)

    def contender(loss: Callable[..., Any]) -> Contender:
        def call() -> list[Tensor]:
            terms = loss(lp, anomalous, 40, focal=True)
            (gradient,) = torch.autograd.grad(terms.total, lp)
            return [torch.stack([term.detach() for term in terms[:4]]), gradient]

        return Contender(call)

    def exact() -> list[Tensor]:
        leaf = lp.detach().double().requires_grad_()
        terms = reference.spp_loss(leaf, anomalous, 40, focal=True)
        (gradient,) = torch.autograd.grad(terms.total, leaf)
        return [torch.stack([term.detach() for term in terms[:4]]), gradient]

    def kernels() -> Contender:
        return contender(partial(spp_loss, impl="triton"))

    contenders = {
        "plain, boolean indexing": lambda: contender(reference.spp_loss),
        PORTABLE: lambda: contender(partial(spp_loss, impl="torch")),
        KERNELS: kernels,
        f"{KERNELS}, CUDA graph": lambda: _graph(kernels(), device),
    }
    return Case(f"loss with boundary and gradient, {rows} rows", "spp_loss", exact, contenders, 1e-4)


def boundary_case(rows: int, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(rows)
    lp = torch.randn(rows, generator=generator).to(device)
    anomalous = (torch.rand(rows, generator=generator) < 0.1).to(device)

    def contender(impl: Any) -> Contender:
        def call() -> list[Tensor]:
            return [boundary(lp, anomalous, impl=impl).b_n]

        return Contender(call)

    contenders = {
        "plain, boolean indexing and a sort": lambda: contender("reference"),
        PORTABLE: lambda: contender("torch"),
        KERNELS: lambda: contender("triton"),
        f"{KERNELS}, CUDA graph": lambda: _graph(contender("triton"), device),
    }
    exact = lambda: [reference.boundary(lp.double(), anomalous, 0.01, 0.1, 10.0)[0]]  # noqa: E731
    return Case(f"boundary, {rows} rows", "boundary", exact, contenders, 1e-6)


def score_map_case(pixels: int, device: torch.device) -> Case:
    sides = [max(1, pixels // stride) for stride in (4, 8, 16)]
    generator = torch.Generator().manual_seed(pixels)
    levels = [(torch.randn(4, side, side, generator=generator) - 2).to(device) for side in sides]
    level_max, offset = torch.full((3,), 0.5, device=device), torch.tensor(3.0, device=device)

    def plain() -> list[Tensor]:
        maps = [
            interpolate(torch.exp(lp - m)[:, None], size=(pixels, pixels), mode="bilinear", align_corners=True)[:, 0]
            for lp, m in zip(levels, level_max, strict=True)
        ]
        total = offset - (maps[0] + maps[1] + maps[2])
        return [total, total.amax(dim=(1, 2))]

    def fast(impl: Any) -> list[Tensor]:
        return list(score_map(levels, (pixels, pixels), level_max, offset, impl=impl))

    def exact() -> list[Tensor]:
        lp = [level.double().cpu() for level in levels]
        total = reference.score_map(lp, (pixels, pixels), level_max.double().cpu(), offset.double().cpu()).to(device)
        return [total, total.amax(dim=(1, 2))]

    def contender(call: Callable[[], list[Tensor]]) -> Contender:
        return Contender(call)

    contenders = {
        "three interpolate calls": lambda: contender(plain),
        PORTABLE: lambda: contender(partial(fast, "torch")),
        KERNELS: lambda: contender(partial(fast, "triton")),
        f"{KERNELS}, CUDA graph": lambda: _graph(contender(partial(fast, "triton")), device),
    }
    size = sum(lp.numel() for lp in levels)
    return Case(
        f"anomaly map and image score, 4 images of {pixels} pixels", "score_map", exact, contenders, 1e-4,
        bytes=4 * (size + 4 * pixels * pixels),
    )  # fmt: skip
