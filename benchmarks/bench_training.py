"""One epoch of training: the official loop's arithmetic against fastbgad's operations, on the same weights and rows.

    pytest benchmarks/bench_training.py

The official loop, re-stated: each sub-epoch runs the encoder again, builds the encoding of every row, shuffles the
rows of a batch and takes a step per 4096 of them with FrEIA's flow. Here features are extracted once, the flow gathers
its rows and Adam is fused. Both take the same steps on the same rows, with the first meta epoch's loss L_ml, and their
last losses must agree before anything is timed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from harness import DEVICE, KERNELS, PORTABLE, Comparison, Contender, kernels_or_skip, run
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fastbgad import reference
from fastbgad.backbones import create_backbone
from fastbgad.flow import ConditionalFlow
from fastbgad.flow_spec import FlowSpec
from fastbgad.ops import Impl, PositionalRows
from tests.flows import freia_flow

OFFICIAL = "official loop's arithmetic"
BACKBONE, PIXELS, CHUNK, LR = "resnet18", 256, 4096, 2e-4
# Of the last step's losses: float32 roundings that Adam carries from step to step.
TOLERANCE = {OFFICIAL: 1e-3, PORTABLE: 1e-3, KERNELS: 1e-2}


class Epoch:
    """Images, a frozen encoder, and the flows' first weights."""

    def __init__(self, images: int, sub_epochs: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (images, 3, PIXELS, PIXELS)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(DEVICE)
        self.sub_epochs = sub_epochs
        self.backbone = create_backbone(BACKBONE, (1, 2, 3), "random", seed=0).to(DEVICE)
        specs = [FlowSpec(channels) for channels in self.backbone.channels]
        self.theirs = nn.ModuleList(freia_flow(spec, seed=i).float() for i, spec in enumerate(specs)).to(DEVICE)
        self.ours = nn.ModuleList(ConditionalFlow(spec) for spec in specs).to(DEVICE)
        self.ours.load_state_dict(self.theirs.state_dict())

    def chunks(self, rows: int, sub_epoch: int) -> Iterator[Tensor]:
        """The rows of each step, the same for everybody."""
        generator = torch.Generator().manual_seed(sub_epoch)
        return iter(torch.randperm(rows, generator=generator).to(DEVICE).split(CHUNK))

    def official(self) -> float:
        flows = copy.deepcopy(self.theirs)
        optimizer = torch.optim.Adam([p for p in flows.parameters() if p.requires_grad], lr=LR)
        last = 0.0
        for sub_epoch in range(self.sub_epochs):
            with torch.no_grad():
                features = self.backbone(self.images)
            for flow, maps in zip(flows, features, strict=True):
                batch, channels, height, width = maps.shape
                x = maps.permute(0, 2, 3, 1).reshape(-1, channels)
                encoding = reference.positional_encoding(128, height, width, torch.float32).to(DEVICE)
                condition = encoding.permute(1, 2, 0).reshape(-1, 128).repeat(batch, 1)
                for rows in self.chunks(len(x), sub_epoch):
                    z, log_det = flow(x[rows], [condition[rows]])
                    loss = -logsigmoid(reference.log_likelihood(z, log_det)).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    last = loss.item()
        return last

    def fast(self, impl: Impl) -> float:
        flows = copy.deepcopy(self.ours)
        optimizers = [
            torch.optim.Adam([p for p in flow.parameters() if p.requires_grad], lr=LR, fused=True) for flow in flows
        ]
        with torch.no_grad():
            features = self.backbone(self.images)
        levels = []
        for maps in features:
            x = maps.permute(0, 2, 3, 1).flatten(0, 2)
            levels.append((x, PositionalRows(*maps.shape[2:])))
        loss = torch.zeros(())
        for sub_epoch in range(self.sub_epochs):
            for flow, optimizer, (x, positions) in zip(flows, optimizers, levels, strict=True):
                for rows in self.chunks(len(x), sub_epoch):
                    loss = -logsigmoid(flow(x, positions, rows=rows, impl=impl).log_likelihood).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        return loss.item()


def training_epoch(images: int, sub_epochs: int, **options) -> Comparison:
    epoch = functools.cache(lambda: Epoch(images, sub_epochs))

    def prepare(name: str) -> Contender:
        if name == KERNELS:
            kernels_or_skip()
        calls: dict[str, Callable[[], float]] = {
            OFFICIAL: lambda: epoch().official(),
            PORTABLE: lambda: epoch().fast("torch"),
            KERNELS: lambda: epoch().fast("triton"),
        }
        call = calls[name]

        def error() -> float:
            truth = epoch().official()
            return abs(call() - truth) / abs(truth)

        return Contender(call, None if name == OFFICIAL else error, TOLERANCE[name])

    return Comparison(
        f"training epoch, {BACKBONE}, {images} images of {PIXELS} pixels, {sub_epochs} sub-epochs",
        OFFICIAL,
        {name: partial(prepare, name) for name in (OFFICIAL, PORTABLE, KERNELS)},
        sizes={"images": images, "sub_epochs": sub_epochs},
        images=images * sub_epochs,
        **options,
    )


def comparisons() -> list[Comparison]:
    return [training_epoch(4, 8, rounds=2, warmup=0)]


@pytest.mark.parametrize("comparison", comparisons(), ids=lambda comparison: comparison.name)
def test_training(comparison: Comparison, benchmark, capsys) -> None:
    run(comparison, benchmark, capsys)
