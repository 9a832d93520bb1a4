"""Time contenders that compute the same thing, each checked against float64 first."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .context import Context, Found, first_line
from .timing import Timer, as_graph

EAGER, FREIA, COMPILED = "eager FrEIA", "FrEIA 0.2 eager", "compiled FrEIA"
PORTABLE, KERNELS = "fastbgad torch", "fastbgad triton"
GRAPH = f"{KERNELS}, CUDA graph"


class SkippedError(Exception):
    """A contender that cannot take part here; the message says why."""


@dataclass
class Contender:
    """A call to time, and what it computes.

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
        exact: the reference's results in float64.
        contenders: name -> function that prepares one (and may raise `SkippedError`); the first is the baseline.
        tolerance: relative error of each result as a whole.
        flops, bytes: what the operation needs at least, where that is known.
        rounds: timed calls of each contender.
        notes: what a reader should know.
    """

    name: str
    exact: Callable[[], Sequence[Tensor]]
    contenders: dict[str, Callable[[], Contender]]
    tolerance: float
    flops: int = 0
    bytes: int = 0
    rounds: int = 30
    notes: list[str] = field(default_factory=list)


def graph_of(contender: Contender, device: torch.device) -> Contender:
    """Return the contender's work as one CUDA graph; raises `SkippedError` without a GPU."""
    if device.type != "cuda":
        raise SkippedError("CUDA graphs need a GPU")
    return Contender(as_graph(contender.call), contender.results)


def measure(case: Case, context: Context, limits: Mapping[str, float]) -> Found:
    """Prepare, check and time the contenders of a case.

    A contender that fails, or differs, is recorded and not timed; the others are. Returns the case as the result file
    has it, with "outcome": "measured", or "wrong" if one of fastbgad's own contenders failed.
    """
    timer = Timer(context.device)
    exact = [value.double() for value in case.exact()] if context.values and not context.launch_only else None
    entries: dict[str, dict[str, Any]] = {}
    ready: dict[str, Contender] = {}
    for name, prepare in case.contenders.items():
        if context.launch_only and KERNELS not in name:
            continue
        if not context.may(name):
            entries[name] = {"failed": "it crashed the process; see the record of that"}
            continue
        entries[name] = _checked(name, prepare, exact, case.tolerance, ready, context)
    baseline = next(iter(case.contenders))
    result: Found = {"name": case.name, "baseline": baseline, "notes": case.notes, "contenders": entries}
    wrong = [name for name, entry in entries.items() if "failed" in entry and "fastbgad" in name]
    result["outcome"] = "wrong" if wrong else "measured"
    if context.launch_only:
        return result
    if not context.may("timing"):  # run again, it would crash again
        for name in ready:
            entries[name]["failed"] = "timing crashed the process; see the record of that"
        return result | {"outcome": "wrong"}
    rounds, warmup = (2, 0) if context.tiny else (case.rounds, 3)
    times = timer.interleaved({name: contender.call for name, contender in ready.items()}, rounds, warmup)
    for name, contender in ready.items():
        entries[name] |= times[name]
        if "graph" not in name:
            entries[name]["peak_bytes"] = timer.peak_bytes(contender.call)
    if baseline in ready:
        for name in ready:
            entries[name]["speed"] = times[baseline]["median_us"] / times[name]["median_us"]
    if limits and (case.flops or case.bytes):
        floor = 1e6 * max(case.flops / limits["matrix_flops_per_second"], case.bytes / limits["copy_bytes_per_second"])
        result["floor_us"] = floor
        for name in ready:
            entries[name]["fraction_of_floor"] = floor / times[name]["median_us"]
    return result


def _checked(
    name: str,
    prepare: Callable[[], Contender],
    exact: Sequence[Tensor] | None,
    tolerance: float,
    ready: dict[str, Contender],
    context: Context,
) -> dict[str, Any]:
    """Return what one call of a contender shows, and put it among the ready ones if it is right."""
    try:
        contender = prepare()
        results = contender.results(contender.call())
        if exact is None:  # nothing computes values here
            ready[name] = contender
            return {"relative_error": 0.0, "unchecked": True}
        error = max(whole_error(value, truth) for value, truth in zip(results, exact, strict=True))
    except SkippedError as reason:
        return {"skipped": str(reason)}
    except Exception as problem:  # a contender that cannot run must not keep the others from being measured
        if context.spoiled():
            raise
        return {"failed": first_line(problem), "traceback": traceback.format_exc()}
    if error < tolerance:
        ready[name] = contender
        return {"relative_error": error}
    return {"relative_error": error, "failed": f"differs from the reference by {error:.1e}, more than {tolerance:.0e}"}


def whole_error(value: Tensor, exact: Tensor) -> float:
    """Return |value - exact| / |exact|; infinite for NaN."""
    error = float((value.double() - exact).norm() / exact.norm().clamp(min=1e-30))
    return error if error == error else float("inf")
