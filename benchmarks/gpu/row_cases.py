"""Operations on rows and maps: log-likelihood, loss, boundary and anomaly map."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastbgad import reference
from fastbgad.ops import boundary, log_likelihood, score_map, spp_loss

from .case import GRAPH, KERNELS, PORTABLE, Case, Contender, graph_of


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
        GRAPH: lambda: graph_of(kernels(), device),
    }
    size = "1M rows" if rows == 1_000_000 else f"{rows} rows"
    return Case(
        f"log-likelihood and gradients, {size} of {channels} channels",
        exact,
        contenders,
        1e-6,
        bytes=4 * rows * (3 * channels + 4),
    )


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
        GRAPH: lambda: graph_of(kernels(), device),
    }
    return Case(f"loss with boundary and gradient, {rows} rows", exact, contenders, 1e-4)


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
        GRAPH: lambda: graph_of(contender("triton"), device),
    }
    exact = lambda: [reference.boundary(lp.double(), anomalous, 0.01, 0.1, 10.0)[0]]  # noqa: E731
    return Case(f"boundary, {rows} rows", exact, contenders, 1e-6)


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
        GRAPH: lambda: graph_of(contender(partial(fast, "triton")), device),
    }
    size = sum(lp.numel() for lp in levels)
    return Case(
        f"anomaly map and image score, 4 images of {pixels} pixels",
        exact,
        contenders,
        1e-4,
        bytes=4 * (size + 4 * pixels * pixels),
    )
