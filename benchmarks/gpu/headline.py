"""Time what the README shows of a GPU: the flow of a large image, training steps, the loss of a million rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastbgad.bench.roofline import measure_ceilings

from .case import KERNELS, Case, measure
from .context import Context, Found, Items
from .flow_cases import flow_case
from .row_cases import boundary_case, log_likelihood_case, loss_case, score_map_case
from .training_cases import training_case

LEVELS = ((40, 256), (72, 128), (200, 64))
THREE_LEVELS = "flow, three levels of a 1024-pixel image"


def items(context: Context, kernels_only: bool = False) -> Items:
    """Return the cases, the most important ones first.

    Args:
        context: of the run.
        kernels_only: leave out every contender but the baseline and the kernels.
    """
    limits: dict[str, float] = {}

    def run(make: Callable[[], Case]) -> Found:
        if context.driver == "cuda" and not limits:
            limits.update(measure_ceilings(context.device)._asdict())
        case = make()
        if kernels_only:
            kept = {name for name in case.contenders if KERNELS in name} | {next(iter(case.contenders))}
            case.contenders = {name: prepare for name, prepare in case.contenders.items() if name in kept}
        found = measure(case, context, limits)
        return found | ({"ceilings": dict(limits)} if limits else {})

    return {name: partial(run, make) for name, make in cases(context.device, context.tiny)}


def cases(device: torch.device, tiny: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Name every case, and the function that makes it."""
    levels = ((8, 3), (9, 4)) if tiny else LEVELS
    depth, steps, many = (2, 40, 70) if tiny else (8, 4096, 1_000_000)
    yield THREE_LEVELS, partial(flow_case, THREE_LEVELS, levels, depth, device)
    for channels, side in levels:
        name = f"training step, {steps} rows of {channels} channels"
        yield name, partial(training_case, channels, side, steps, depth, device)
    yield f"loss with boundary and gradient, {many} rows", partial(loss_case, many, device)
    for channels, side in levels:
        name = f"flow, {side * side} rows of {channels} channels"
        yield name, partial(flow_case, name, [(channels, side)], depth, device)
    yield f"loss with boundary and gradient, {steps} rows", partial(loss_case, steps, device)
    yield f"log-likelihood and gradients, {many} rows", partial(log_likelihood_case, many, 8 if tiny else 40, device)
    for rows in (70,) if tiny else (4096, 1_000_000, 4_000_000):
        yield f"boundary, {rows} rows", partial(boundary_case, rows, device)
    yield "anomaly map and image score", partial(score_map_case, 20 if tiny else 1024, device)
