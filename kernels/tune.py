"""Finds the fastest tile sizes of every kernel on this GPU and stores them where the kernels look for them.

    python -m fastbgad.kernels.tune                                  # all kernels, into the package's configs folder
    python -m fastbgad.kernels.tune --kernel flow_forward --out my_gpu.json

Every candidate's outputs are compared with those of the default tiles first; one that differs, or that this GPU cannot
launch, is refused with its reason. The rest take turns, so that a change of the clock meets all of them. A file
written elsewhere than in the configs folder is taken into use by `fastbgad.kernels.tile_sizes.use_tiles(path)`.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .failure import reason
from .tile_sizes import CONFIGS, DEFAULT, TilesError, default_tiles, forget, read_json, read_tuned, slug, write_json
from .triton_version import triton_version, why_not_this_triton
from .variants import MODULES, TuningCase

Tiles = Mapping[str, int]
# Given a function that works on the device, one that measures it: each call returns microseconds of one run.
Stopwatch = Callable[[Callable[[], object]], Callable[[], float]]

# A gain below this is noise: the default stays.
SMALLEST_GAIN = 1.02
# Candidates this many times slower than the best are not measured more than three times.
HOPELESS = 1.3
# The entries that users wait for most, in this order: the finest level has most rows. All others come after them.
MOST_VALUABLE = (
    ("flow_forward", "C64 float16 raster"),
    ("flow_backward", "C64 float16"),
    ("flow_forward", "C64 float16"),
    ("flow_forward", "C128 float16 raster"),
    ("flow_weight_gradient", "C64 float16"),
    ("flow_forward", "C256 float16 raster"),
    ("flow_backward", "C128 float16"),
    ("flow_backward", "C256 float16"),
)
# How long one measurement of a CUDA graph should take: long against the clock's resolution of about a microsecond.
MEASUREMENT_SECONDS = 2e-3


class Refused(NamedTuple):
    """A candidate that was not timed."""

    tiles: Tiles
    obstacle: str


class Tuned(NamedTuple):
    """The outcome of one case."""

    kernel: str
    key: str
    default: Tiles
    chosen: Tiles
    default_microseconds: float | None  # None where the default cannot run on this GPU
    microseconds: float
    refused: Sequence[Refused]


def tune_case(
    case: TuningCase, device: torch.device, stopwatch: Stopwatch, rounds: int, deadline: float = float("inf")
) -> Tuned | None:
    """Measures one case; None where not even one candidate runs.

    Args:
        case: what to tune.
        device: where.
        stopwatch: how runs are timed.
        rounds: measurements of each candidate, in turn; fewer once `deadline` has passed.
        deadline: reading of `time.monotonic` at which to stop, after at least three rounds.
    """
    default = default_tiles().get(case.kernel, {}).get(case.key)
    if default is None:
        raise TilesError(f"{DEFAULT} has no entry {case.kernel} / {case.key} to start from")
    candidates = [default, *(tiles for tiles in case.candidates if dict(tiles) != dict(default))]
    run = case.prepare(device)
    outcomes = _first_runs(run, candidates, device)
    # The default is the measure of the others; where this GPU cannot run it, the first that runs is.
    expected = next((outcome for outcome in outcomes if not isinstance(outcome, str)), None)
    if expected is None:
        return None
    refused: list[Refused] = []
    measure: list[Callable[[], float]] = []
    runnable: list[Tiles] = []
    for tiles, outcome in zip(candidates, outcomes, strict=True):
        obstacle = outcome if isinstance(outcome, str) else _difference(outcome, expected, case.tolerance)
        if obstacle:
            refused.append(Refused(tiles, obstacle))
        else:
            runnable.append(tiles)
            measure.append(stopwatch(functools.partial(run, tiles)))
    del outcomes, expected

    times: list[list[float]] = [[] for _ in measure]
    for round_ in range(rounds):
        if round_ >= 3 and time.monotonic() > deadline:
            break
        best_so_far = min((statistics.median(series) for series in times if series), default=0.0)
        for series, once in zip(times, measure, strict=True):
            # Three rounds are enough to know that a candidate is far behind.
            if round_ < 3 or statistics.median(series) < HOPELESS * best_so_far:
                series.append(once())
    medians = [statistics.median(series) for series in times]
    best = min(range(len(medians)), key=medians.__getitem__)
    default_time = medians[0] if runnable[0] is default else None
    if default_time is not None and default_time < SMALLEST_GAIN * medians[best]:
        best = 0
    return Tuned(case.kernel, case.key, default, runnable[best], default_time, medians[best], refused)


def _first_runs(
    run: Callable[[Tiles], Sequence[Tensor]], candidates: Sequence[Tiles], device: torch.device
) -> list[Sequence[Tensor] | str]:
    """The outputs of every candidate, or why there are none. On a GPU this is where the kernels are compiled."""

    def first_run(tiles: Tiles) -> Sequence[Tensor] | str:
        try:
            with torch.cuda.device(device if device.type == "cuda" else -1):
                return run(tiles)
        except torch.AcceleratorError:
            raise  # nothing can be launched on this device any more
        except Exception as error:  # out of shared memory, no such instruction, ...: a finding about these tiles
            return reason(error)

    if device.type != "cuda":  # Triton's interpreter runs one kernel at a time
        return [first_run(tiles) for tiles in candidates]
    with ThreadPoolExecutor(min(len(candidates), len(os.sched_getaffinity(0)))) as pool:
        outcomes = list(pool.map(first_run, candidates))
    torch.cuda.synchronize(device)
    return outcomes


def _difference(outputs: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> str:
    """How the outputs differ from the expected ones beyond the tolerance; "" if they do not."""
    for i, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        if output.shape != wanted.shape or output.dtype != wanted.dtype:
            return f"output {i} has another shape or type than with the default tiles"
        if not wanted.numel():
            continue
        if not wanted.is_floating_point():
            if not torch.equal(output, wanted):
                return f"output {i} differs from that of the default tiles"
            continue
        found, exact = output.double(), wanted.double()
        scale = float(exact.nan_to_num(0, 0, 0).abs().max())
        if not torch.allclose(found, exact, rtol=0, atol=tolerance * scale, equal_nan=True):
            error = float((found - exact).abs().max()) / (scale or 1)
            return f"output {i} differs from that of the default tiles by {error:.1e}, more than {tolerance:.0e}"
    return ""


def graph_stopwatch(run: Callable[[], object]) -> Callable[[], float]:
    """Times replays of a CUDA graph of several runs: what the device takes, without the launches from Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        run()
        start.record()
        run()
        stop.record()
    stop.synchronize()
    repeats = max(1, min(100, int(MEASUREMENT_SECONDS / (1e-3 * start.elapsed_time(stop) + 1e-9))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    graph.replay()

    def measure() -> float:
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return 1e3 * start.elapsed_time(stop) / repeats

    return measure


def tune(
    cases: Sequence[TuningCase],
    device: torch.device,
    stopwatch: Stopwatch,
    *,
    rounds: int = 20,
    seconds: float = float("inf"),
    say: Callable[[str], object] = print,
    keep: Callable[[Tuned], object] = lambda result: None,
    before: Callable[[TuningCase], object] = lambda case: None,
) -> list[Tuned]:
    """Tunes the cases one after the other, each within its share of the time that is left of `seconds`.

    A share bounds the timed rounds, not the compilation. Cases that do not begin in time are left out, and said to be.
    Each result is handed to `keep` at once: an interruption costs no more than the case at hand. `before` is called
    before each case that is not left out.
    """
    end = time.monotonic() + seconds
    results = []
    for i, case in enumerate(cases):
        now, where = time.monotonic(), f"[{i + 1}/{len(cases)}] {case.kernel} / {case.key}"
        if now > end:
            say(f"{where}: left out, {seconds:.0f} seconds have passed")
            continue
        before(case)
        now = time.monotonic()
        with torch.no_grad():
            result = tune_case(case, device, stopwatch, rounds, now + max(0.0, end - now) / (len(cases) - i))
        if result is None:
            say(f"{where}: no candidate runs on this GPU")
            continue
        results.append(result)
        keep(result)
        say(f"{where}: {_short(result.chosen)}, {result.microseconds:.1f} us")
        for tiles, obstacle in result.refused:
            say(f"    refused {_short(tiles)}: {obstacle}")
    return results


class Precompiling:
    """Run every candidate once in processes of their own, so that its compiled kernel lies in Triton's cache.

    Compiling takes seconds a candidate and holds the interpreter's lock; measuring takes a second or two a case.
    Nothing is compiled while a case is measured: these processes launch what they compile on the same GPU. What fails
    here fails again, and is reported, where the candidates are measured.
    """

    def __init__(self, kernels: Sequence[str], processes: int) -> None:
        self._kernels = tuple(kernels)
        self._pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))

    def run(self, case: TuningCase) -> None:
        """Return when the candidates of a case have been compiled, or cannot be."""
        tasks = [
            (self._kernels, case.kernel, case.key, dict(tiles))
            for tiles in (default_tiles()[case.kernel][case.key], *case.candidates)
        ]
        for future in [self._pool.submit(_compile, task) for task in tasks]:
            future.exception()

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _compile(task: tuple[Sequence[str], str, str, Tiles]) -> None:
    kernels, kernel, key, tiles = task
    try:
        _prepared(tuple(kernels), kernel, key)(tiles)
        torch.cuda.synchronize()
    except Exception:  # reported where the candidate is measured
        return


@functools.lru_cache(maxsize=1)
def _prepared(kernels: Sequence[str], kernel: str, key: str) -> Callable[[Tiles], Sequence[Tensor]]:
    (case,) = (case for case in collect(kernels) if (case.kernel, case.key) == (kernel, key))
    return case.prepare(torch.device("cuda", torch.cuda.current_device()))


def collect(kernels: Sequence[str]) -> list[TuningCase]:
    """Return the tuning cases of these kernel modules, the most valuable ones first."""
    modules = (importlib.import_module(f"{__package__}.variants.{name}") for name in kernels)
    cases = [case for module in modules if hasattr(module, "tuning_cases") for case in module.tuning_cases()]
    value = {entry: place for place, entry in enumerate(MOST_VALUABLE)}
    return sorted(cases, key=lambda case: value.get((case.kernel, case.key), len(value)))  # others stay in their order


def store(path: Path, results: Sequence[Tuned], measured_on: Mapping[str, Any]) -> None:
    """Writes the results to `path`; entries of the same GPU that were not tuned now stay."""
    content: dict[str, Any] = {"tiles": {}, "microseconds": {}}
    if path.exists():
        read_tuned(path)
        before = read_json(path)
        if before.get("measured_on", {}).get("gpu") == measured_on.get("gpu"):
            content = {key: dict(before.get(key, {})) for key in content}
    for result in results:
        times = {"default": result.default_microseconds, "chosen": round(result.microseconds, 3)}
        content["tiles"].setdefault(result.kernel, {})[result.key] = dict(result.chosen)
        content["microseconds"].setdefault(result.kernel, {})[result.key] = times
    write_json(path, {"measured_on": dict(measured_on), **content})
    forget()


def result_table(results: Sequence[Tuned]) -> str:
    """Default tiles, chosen tiles, microseconds and gain of each case, for a terminal."""
    cells = [("kernel", "default", "us", "chosen", "us", "gain")]
    for result in results:
        before = result.default_microseconds
        cells.append(
            (
                f"{result.kernel} / {result.key}",
                _short(result.default),
                "cannot run" if before is None else f"{before:.1f}",
                _short(result.chosen),
                f"{result.microseconds:.1f}",
                "-" if before is None else f"{before / result.microseconds:.2f}x",
            )
        )
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in cells)


def _short(tiles: Tiles) -> str:
    return " ".join(f"{name}={value}" for name, value in tiles.items())


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the measurements hold for."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": output_of(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index}"
        ),
        "torch": torch.__version__,
        "triton": triton_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": output_of("git", "-C", str(CONFIGS), "rev-parse", "HEAD"),
    }


def output_of(*command: str) -> str | None:
    """What a command prints; None where it is not installed or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _require_writable(path: Path) -> None:
    """Before minutes of measuring rather than after them."""
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise TilesError(f"cannot write {path}: {error.strerror}; name another file with --out FILE") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 tuned, 2 cannot tune here."""
    parser = argparse.ArgumentParser(
        prog="python -m fastbgad.kernels.tune", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--kernel", nargs="+", choices=MODULES, default=list(MODULES), metavar="NAME", help=", ".join(MODULES)
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write; default: configs/<gpu>.json in the package"
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="measurements of each candidate (20)")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), metavar="T", help="begin no case after this time"
    )
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except (TilesError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    if options.rounds < 1:
        raise TilesError("--rounds must be at least 1")
    if obstacle := why_not_this_triton(triton_version()):
        raise TilesError(obstacle)
    import triton  # not at the top: where it is missing, the line above says what to do

    if not torch.cuda.is_available():
        raise TilesError("tuning measures the kernels on the GPU they will run on, and there is no CUDA GPU here")
    if triton.knobs.runtime.interpret:
        raise TilesError("TRITON_INTERPRET is set, so kernels are interpreted, not compiled; unset it")
    device = torch.device("cuda", torch.cuda.current_device())
    out = options.out or CONFIGS / f"{slug(torch.cuda.get_device_name(device))}.json"
    _require_writable(out)
    cases = collect(options.kernel)
    print(f"tuning {len(cases)} entries for {torch.cuda.get_device_name(device)} into {out}")
    machine = describe_machine(device)
    compiling = Precompiling(options.kernel, min(12, len(os.sched_getaffinity(0))))
    try:
        results = tune(
            cases, device, graph_stopwatch, rounds=options.rounds, seconds=options.seconds,
            keep=lambda result: store(out, [result], machine), before=compiling.run,
        )  # fmt: skip
    finally:
        compiling.close()
    print(result_table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
