"""Training steps of the flow, against the official form operation by operation."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbgad import reference
from fastbgad.flow_spec import FlowSpec
from fastbgad.model.flow import ConditionalFlow
from fastbgad.ops import PositionalRows, spp_loss
from tests.flows import double

from .case import COMPILED, EAGER, GRAPH, KERNELS, PORTABLE, Case, Contender, SkippedError, graph_of


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
        lp = self.log_likelihood(self.store[self.rows], self.encoding[self.rows])
        self._update(reference.spp_loss(lp, self.anomalous, self.channels, focal=True).total)

    def log_likelihood(self, x: Tensor, p: Tensor) -> Tensor:
        z, log_det = reference.flow_forward(x, self.flow.weights(), self.flow.spec, p)
        return reference.log_likelihood(z, log_det)

    def fast(self, impl: Any) -> None:
        lp = self.flow(self.store, self.positions, rows=self.rows, impl=impl).log_likelihood
        self._update(spp_loss(lp, self.anomalous, self.channels, focal=True, impl=impl).total)

    def on_rows(self, rows: Tensor, first_phase: bool) -> None:
        """Take the step that `fastbgad.train.graph.CapturedSteps` captures."""
        self.rows = rows
        self.fast("triton")

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
    """Return the case of one optimizer step on `rows` rows, gathered from a map of side x side."""

    def fast(impl: str) -> Contender:
        step = TrainingStep(channels, side, rows, depth, device, True)
        return Contender(partial(step.fast, impl), lambda _: step.gradients())

    def eager() -> Contender:
        step = TrainingStep(channels, side, rows, depth, device, False)
        return Contender(step.eager, lambda _: step.gradients())

    contenders = {
        EAGER: eager,
        PORTABLE: lambda: fast("torch"),
        KERNELS: lambda: fast("triton"),
        GRAPH: lambda: graph_of(fast("triton"), device),
    }
    exact = TrainingStep(channels, side, rows, depth, device, False).exact
    case = Case(f"training step, {rows} rows of {channels} channels", exact, contenders, 3e-2)
    case.notes.append("gradients are compared without equal ReLU masks here; the equivalence tests compare them with")
    return case


def compiled_training_case(name: str, channels: int, side: int, rows: int, depth: int, device: torch.device) -> Case:
    """Return `training_case` with the official form under torch.compile, and the kernels beside it."""
    case = training_case(channels, side, rows, depth, device)
    case.name = name

    def compiled() -> Contender:
        if device.type != "cuda":
            raise SkippedError("compiling for a CPU needs a C++ compiler")
        step = TrainingStep(channels, side, rows, depth, device, False)
        step.log_likelihood = torch.compile(step.log_likelihood, dynamic=False)  # type: ignore[method-assign]
        return Contender(step.eager, lambda _: step.gradients())

    case.contenders = {COMPILED: compiled, KERNELS: case.contenders[KERNELS], GRAPH: case.contenders[GRAPH]}
    return case
