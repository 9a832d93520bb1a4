"""Measurements of every benchmark: check each contender, time the correct ones side by side, keep the figures.

A `Comparison` names its contenders and how each is prepared. `measure` prepares them, compares each with the reference
and times the ones that pass, one call of each in turn. A contender that differs is reported as failed and never timed.
One that cannot take part here is reported as skipped, with the reason.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.checkout import commit_of
from interleave import interleaved, medians, ratios

from fastbgad.bench.memory import peak_bytes
from fastbgad.ops import Impl, why_not_native
from fastbgad.ops.dispatch import why_not_triton
from fastbgad.system.environment import cpu_facts, machine, versions

RESULTS = Path(__file__).parent / "results"
# Of the same contender wherever it takes part.
FREIA, FREIA_COMPILED, ORACLE = "FrEIA 0.2 eager", "FrEIA 0.2 compiled", "oracle float32"
PORTABLE, PORTABLE_COMPILED, KERNELS = "fastbgad torch", "fastbgad torch compiled", "fastbgad triton"
NATIVE = "fastbgad native"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class SkippedError(Exception):
    """A contender that cannot take part here; the message says why."""


@dataclass
class Contender:
    """A call to time, and its error.

    Attributes:
        call: one run.
        error: runs it once and returns its largest relative error; None where the contender is itself the measure.
        tolerance: the largest error with which it is timed.
        scale: how many such calls the whole work takes, where only a part is timed; times are multiplied by it.
    """

    call: Callable[[], object]
    error: Callable[[], float] | None = None
    tolerance: float = 0.0
    scale: float = 1.0


@dataclass
class Comparison:
    """One table: contenders that compute the same thing.

    Attributes:
        name: operation and size, the same in every run: results and baselines are kept under it.
        baseline: the contender that the others are held against.
        ours: the contenders that are fastbgad's, best last; the last that takes part is tracked.
        contenders: name -> function that prepares one, and may raise `SkippedError`.
        sizes: what a plot may have on its axis, such as rows, channels, pixels, batch.
        images: images per call, where a call is about images.
        memory: whether to measure peak memory as well, in calls of their own.
        track: whether `make bench-check` follows the ratio of ours to the baseline.
        band: by what share that ratio may fall at least before it counts; the noise of repeats widens it.
    """

    name: str
    baseline: str
    contenders: dict[str, Callable[[], Contender]]
    ours: tuple[str, ...] = (PORTABLE, KERNELS)
    sizes: dict[str, int] = field(default_factory=dict)
    images: int | None = None
    rounds: int = 9
    warmup: int = 1
    memory: bool = False
    track: bool = False
    band: float = 0.15


def measure(
    comparison: Comparison, only: tuple[str, ...] | None = None, ready: dict[str, Contender] | None = None
) -> dict[str, Any]:
    """Prepare, check and time the contenders (or `only` some), and return a result that fits JSON.

    `ready` is filled with the contenders that were timed.

    Returns:
        {"name", "baseline", "sizes", "images", "rounds", "contenders": {name: entry}}, where an entry is
        {"median_ms", "fastest_ms", "speed" (times the baseline's), "error", "images_per_s", "peak_mib"}, or
        {"failed": reason}, or {"skipped": reason}.
    """
    entries: dict[str, dict[str, Any]] = {}
    ready = {} if ready is None else ready
    torch._dynamo.reset()  # what earlier comparisons compiled
    for name, prepare in comparison.contenders.items():
        if only is not None and name not in only:
            continue
        try:
            contender = prepare()
            error = contender.error() if contender.error is not None else 0.0
        except SkippedError as reason:
            entries[name] = {"skipped": str(reason)}
            continue
        except Exception as problem:  # one contender's failure must not cost the others their figures
            entries[name] = {"failed": f"{type(problem).__name__}: {_first_line(problem)}"}
            continue
        if not error <= contender.tolerance:
            entries[name] = {"failed": f"differs from the oracle by {error:.1e}, more than {contender.tolerance:.0e}"}
            continue
        ready[name] = contender
        entries[name] = {"error": error}
    calls = {name: contender.call for name, contender in ready.items()}
    synchronize = torch.cuda.synchronize if DEVICE.type == "cuda" else None
    times = interleaved(calls, comparison.rounds, comparison.warmup, synchronize)
    times = {name: [ready[name].scale * second for second in seconds] for name, seconds in times.items()}
    middle = medians(times)
    speed = ratios(times, comparison.baseline) if comparison.baseline in times else {}
    for name, seconds in times.items():
        entry = entries[name]
        entry.update(median_ms=1e3 * middle[name], fastest_ms=1e3 * min(seconds))
        if name in speed:
            entry["speed"] = speed[name]
        if comparison.images is not None:
            entry["images_per_s"] = comparison.images / middle[name]
        if comparison.memory:
            peak = peak_bytes(calls[name], DEVICE)
            entry["peak_mib"] = None if peak is None else peak / 2**20
    return {
        "name": comparison.name,
        "baseline": comparison.baseline,
        "sizes": comparison.sizes,
        "images": comparison.images,
        "rounds": comparison.rounds,
        "contenders": entries,
    }


def tracked(comparison: Comparison, result: Mapping[str, Any]) -> str | None:
    """Return the contender of ours whose ratio counts: the last one that was timed."""
    timed = [name for name in comparison.ours if "speed" in result["contenders"].get(name, {})]
    return timed[-1] if timed else None


def table(result: Mapping[str, Any]) -> str:
    """Return the result as plain text."""
    entries: Mapping[str, Mapping[str, Any]] = result["contenders"]
    width = max(len(name) for name in ("contender", *entries))
    lines = [
        f"{'contender':<{width}}  {'median ms':>11}  {'fastest ms':>11}  {'speed':>8}  {'error':>8}  {'peak MiB':>9}"
    ]
    for name, entry in entries.items():
        if "median_ms" not in entry:
            lines.append(f"{name:<{width}}  {'; '.join(f'{how}: {why}' for how, why in entry.items())}")
            continue
        speed = f"{entry['speed']:.2f}x" if "speed" in entry else "-"
        peak = f"{entry['peak_mib']:.0f}" if entry.get("peak_mib") is not None else "-"
        lines.append(
            f"{name:<{width}}  {entry['median_ms']:>11.3f}  {entry['fastest_ms']:>11.3f}  {speed:>8}  "
            f"{entry['error']:>8.0e}  {peak:>9}"
        )
    return "\n".join([*lines, f"speed: median against {result['baseline']!r}, {result['rounds']} interleaved rounds"])


recorded: list[dict[str, Any]] = []  # of this pytest run; conftest.py writes them with --save-results


def run(comparison: Comparison, benchmark: Any, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Measure a comparison, print the table, and hand our contender to pytest-benchmark: the body of a benchmark.

    A contender of ours that fails fails the benchmark, after the table was printed.
    """
    ready: dict[str, Contender] = {}
    result = measure(comparison, ready=ready)
    with capsys.disabled():
        print(f"\n{comparison.name}; {where()}\n{table(result)}")
    recorded.append(stamped(result))
    best = tracked(comparison, result)
    benchmark.extra_info.update({key: value for key, value in result.items() if key != "name"}, where=where())
    if best is not None:
        benchmark.pedantic(ready[best].call, rounds=3, warmup_rounds=1)  # ours always does the whole work: no scale
    failed = [f"{name}: {entry['failed']}" for name, entry in result["contenders"].items() if "failed" in entry]
    if any(text.startswith((*comparison.ours, comparison.baseline)) for text in failed):
        pytest.fail("; ".join(failed))
    if best is None:
        pytest.skip(f"nothing to compare: {table(result)}")
    return result


def where() -> str:
    """Return the machine in a few words."""
    facts = machine()
    if DEVICE.type == "cuda":
        return facts["gpu"]
    return f"{facts['processor']}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def machine_kind() -> str:
    """Return the part of the machine that ratios depend on, as a file name: the GPU, or the processor and threads."""
    if DEVICE.type == "cuda":
        return _slug(torch.cuda.get_device_name())
    capability = torch.backends.cpu.get_cpu_capability()
    return _slug(f"{machine()['processor']} {_generation()} {capability} {torch.get_num_threads()} threads")


def _generation() -> str:
    """Return family and model of an x86 processor: virtual machines hide the rest of its name. Empty elsewhere."""
    facts = cpu_facts()
    return f"{facts.get('cpu family', '')} {facts.get('model', '')}" if facts else ""


def stamped(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result with date, commit, machine and versions."""
    installed = versions()
    peers = ("torch", "numpy", "triton", "timm")
    return {
        **result,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "machine": where(),
        "versions": {name: installed[name] for name in peers if name in installed},
    }


def cpu_ceilings() -> dict[str, float]:
    """Measure the best rates of this CPU: bytes per second of a copy, operations per second of a float32 product."""
    source = torch.zeros(64 << 20)
    target = torch.empty_like(source)
    a, b = torch.randn(2, 2048, 2048)
    times = medians(interleaved({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, rounds=9))
    return {
        "copy_bytes_per_second": 2 * source.nbytes / times["copy"],
        "matrix_flops_per_second": 2 * 2048**3 / times["product"],
    }


def kernels_or_skip() -> None:
    """Raise `SkippedError` where Triton's kernels cannot be timed."""
    if DEVICE.type != "cuda":
        raise SkippedError("the kernels need a CUDA GPU")
    reason = why_not_triton(torch.empty(0, device=DEVICE))
    if reason is not None:
        raise SkippedError(reason)


def native_or_skip() -> None:
    """Raise `SkippedError` where compiled C++ cannot be timed."""
    reason = "compiled C++ runs on a CPU" if DEVICE.type == "cuda" else why_not_native()
    if reason is not None:
        raise SkippedError(reason)


def implementations(ours: Callable[[Impl], Callable[..., Any]]) -> dict[str, Callable[[], Callable[..., Any]]]:
    """Return fastbgad's contenders of an operation, name -> function that prepares one; `ours(impl)` gives the call."""

    def kernels() -> Callable[..., Any]:
        kernels_or_skip()
        return ours("triton")

    return {
        PORTABLE: lambda: ours("torch"),
        PORTABLE_COMPILED: lambda: compiled(ours("torch")),
        KERNELS: kernels,
    }


def compiled(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return the call under torch.compile; raise `SkippedError` where there is no compiler for it."""
    import shutil

    if DEVICE.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise SkippedError("torch.compile for a CPU needs a C++ compiler")
    return torch.compile(call, dynamic=False)


def _commit() -> str:
    commit, changed = commit_of(RESULTS.parents[1])
    return f"{commit}-dirty" if changed else commit


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _first_line(problem: Exception) -> str:
    return (str(problem).strip().splitlines() or ["no message"])[0]
