"""Everything there is to do on a GPU, in one command: equivalence, tuning, benchmarks, and one file with the results.

    make gpu                      or, where torch and triton are installed:
    python3 -m pip install --no-deps --no-build-isolation -e . && python3 benchmarks/gpu.py

1. The equivalence tests of every kernel run on the GPU. An operation whose tests fail is not timed.
2. Tile sizes are tuned and written to kernels/configs/<gpu>.json, where the kernels find them.
3. Contenders take turns; one whose results differ from the float64 oracle is reported as failed and not timed.

The results are written to benchmarks/results/<gpu>/<date>-<commit>.json after every step: a run that is cut short loses
nothing that was measured. It needs torch, triton, timm, numpy, scipy, safetensors and pytest, no network, and with the
default budget less than nine minutes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from gpu_cases import Case, Contender, SkippedError, cases  # noqa: E402
from gpu_timing import Timer  # noqa: E402

from fastbgad.environment import machine, versions  # noqa: E402
from fastbgad.files import write_json  # noqa: E402
from fastbgad.kernels.tiles import slug  # noqa: E402
from fastbgad.kernels.tune import output_of  # noqa: E402
from fastbgad.roofline import measure_ceilings  # noqa: E402

# Whose tests speak for which operation.
TESTS = {
    "log_likelihood": ("test_log_likelihood.py",),
    "flow": ("test_flow_pack.py", "test_flow_triton.py", "test_flow_wide.py", "test_accelerate.py"),
    "spp_loss": ("test_spp_loss_triton.py",),
    "boundary": ("test_boundary_triton.py",),
    "score_map": ("test_score_map_triton.py",),
}


def equivalence() -> dict[str, Any]:
    """Runs the tests marked "equivalence"; per operation how many passed and what failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [str(ROOT / "tests" / name) for names in TESTS.values() for name in names]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "equivalence", f"--junitxml={report}", *files]
        if importlib.util.find_spec("xdist") is not None:
            # Most of the time goes into compiling kernels, on the host.
            command += ["-n", str(min(8, len(os.sched_getaffinity(0))))]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not report.exists():
            tail = (run.stdout + run.stderr)[-2000:]
            return {operation: {"passed": 0, "failed": [f"the tests did not run: {tail}"]} for operation in TESTS}
        found: dict[str, Any] = {operation: {"passed": 0, "failed": []} for operation in TESTS}
        for test in ElementTree.parse(report).iter("testcase"):
            module = f"{test.get('classname', '').split('.')[-1]}.py"
            operation = next((name for name, modules in TESTS.items() if module in modules), None)
            if operation is None:
                continue
            problem = next((child for child in test if child.tag in ("failure", "error")), None)
            if problem is not None:
                found[operation]["failed"].append(f"{test.get('name')}: {(problem.get('message') or '')[:300]}")
            elif not any(child.tag == "skipped" for child in test):
                found[operation]["passed"] += 1
    for operation in found.values():
        if not operation["passed"] and not operation["failed"]:
            operation["failed"].append("no test ran")
    return found


def tune(seconds: float) -> dict[str, Any]:
    """Tunes into kernels/configs and returns what the command printed last."""
    command = [sys.executable, "-m", "fastbgad.kernels.tune", "--seconds", str(int(seconds)), "--rounds", "10"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1.3 * seconds + 60)
    except subprocess.TimeoutExpired:
        return {"returncode": None, "output": "stopped: it took too long; entries tuned until then are kept"}
    return {"returncode": run.returncode, "output": (run.stdout + run.stderr)[-12000:]}


def measure(case: Case, timer: Timer, rounds: int, warmup: int, limits: Mapping[str, float]) -> dict[str, Any]:
    """Prepares, checks and times the contenders of a case."""
    exact = [value.double() for value in case.exact()]
    entries: dict[str, dict[str, Any]] = {}
    ready: dict[str, Contender] = {}
    for name, prepare in case.contenders.items():
        try:
            contender = prepare()
            results = contender.results(contender.call())
            error = max(whole_error(value, truth) for value, truth in zip(results, exact, strict=True))
        except SkippedError as reason:
            entries[name] = {"skipped": str(reason)}
        except Exception as problem:  # a contender that cannot run must not keep the others from being measured
            entries[name] = {"failed": f"{type(problem).__name__}: {str(problem)[:500]}"}
        else:
            entries[name] = {"relative_error": error}
            if error < case.tolerance:
                ready[name] = contender
            else:
                entries[name]["failed"] = f"differs from the oracle by {error:.1e}, more than {case.tolerance:.0e}"
    times = timer.interleaved({name: contender.call for name, contender in ready.items()}, rounds, warmup)
    for name, contender in ready.items():
        entries[name] |= times[name]
        if "graph" not in name:
            entries[name]["peak_bytes"] = timer.peak_bytes(contender.call)
    baseline = next(iter(case.contenders))
    result: dict[str, Any] = {"name": case.name, "baseline": baseline, "notes": case.notes, "contenders": entries}
    if baseline in ready:
        for name in ready:
            entries[name]["speed"] = times[baseline]["median_us"] / times[name]["median_us"]
    if limits and (case.flops or case.bytes):
        floor = 1e6 * max(case.flops / limits["matrix_flops_per_second"], case.bytes / limits["copy_bytes_per_second"])
        result["floor_us"] = floor
        for name in ready:
            entries[name]["fraction_of_floor"] = floor / times[name]["median_us"]
    return result


def whole_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """|value - exact| / |exact|; infinite for NaN."""
    error = float((value.double() - exact).norm() / exact.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """All cases for a terminal."""
    lines = []
    for case in results:
        floor = f", floor {case['floor_us']:.0f} us" if "floor_us" in case else ""
        lines.append(f"\n{case['name']} (against {case.get('baseline', '-')}{floor})")
        if "refused" in case:
            lines.append(f"  not timed: {case['refused']}")
        for name, entry in case.get("contenders", {}).items():
            if "median_us" in entry:
                memory = entry.get("peak_bytes")
                lines.append(
                    f"  {name:<34} {entry['median_us']:>12.1f} us  ({entry['low_us']:.1f} to {entry['high_us']:.1f})"
                    f"  {entry.get('speed', float('nan')):>7.2f}x  error {entry['relative_error']:.0e}"
                    + (f"  {memory / 2**20:.0f} MiB" if memory is not None else "")
                )
            else:
                reason = f"skipped: {entry['skipped']}" if "skipped" in entry else f"FAILED: {entry['failed']}"
                lines.append(f"  {name:<34} {reason}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0 if everything that ran passed, 1 if an equivalence check failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--budget", type=float, default=500.0, help="seconds for everything (500)")
    parser.add_argument("--out", type=Path, help="folder of the result file; default benchmarks/results/<gpu>")
    parser.add_argument("--no-tests", action="store_true", help="skip the equivalence tests (nothing is refused then)")
    parser.add_argument("--no-tune", action="store_true", help="keep the tile sizes as they are")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes on the CPU through the interpreter, no tuning"
    )
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("error: there is no CUDA GPU here; --dry-run shows what would be done", file=sys.stderr)
        return 2
    if options.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        print("error: --dry-run runs kernels in the interpreter: set TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    return run(options, say=lambda text: print(text, flush=True))


def run(options: argparse.Namespace, say: Callable[[str], object]) -> int:
    """All steps; the result file grows with each."""
    start = time.monotonic()
    device = torch.device("cpu" if options.dry_run else "cuda")
    gpu = "dry_run" if options.dry_run else slug(torch.cuda.get_device_name(device))
    commit = output_of("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or "unknown"
    now = datetime.datetime.now(datetime.UTC)
    path = (options.out or ROOT / "benchmarks" / "results" / gpu) / f"{now:%Y-%m-%d-%H%M}-{commit}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "measured": not options.dry_run,
        "date": f"{now:%Y-%m-%d %H:%M} UTC",
        "commit": commit,
        "changed_files": bool(output_of("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")),
        "machine": machine(),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": versions(),
        "cases": [],
    }

    def keep() -> None:
        result["seconds"] = time.monotonic() - start
        write_json(path, result)

    def left() -> float:
        return options.budget - (time.monotonic() - start)

    failed: dict[str, list[str]] = {}
    if not options.no_tests:
        say("equivalence tests ...")
        result["equivalence"] = equivalence()
        failed = {name: found["failed"] for name, found in result["equivalence"].items() if found["failed"]}
        for name, found in result["equivalence"].items():
            say(f"  {name}: {found['passed']} passed, {len(found['failed'])} failed")
            for problem in found["failed"][:5]:
                say(f"    {problem}")
        keep()
    limits: dict[str, float] = {}
    if not options.dry_run:
        limits = result["ceilings"] = measure_ceilings(device)._asdict()
        terabytes, teraflops = (1e-12 * limits[key] for key in ("copy_bytes_per_second", "matrix_flops_per_second"))
        say(f"ceilings: copy {terabytes:.2f} TB/s, float16 product {teraflops:.0f} TFLOP/s")
        if not options.no_tune:
            say("tuning ...")
            result["tuning"] = tune(0.4 * left())
            say(result["tuning"]["output"][-6000:])
            keep()
    timer = Timer(device)
    for case in cases(device, options.dry_run):
        if options.only not in case.name:
            continue
        if case.operation in failed:
            result["cases"].append({"name": case.name, "refused": f"the equivalence tests of {case.operation} failed"})
        elif left() < 0:
            result["cases"].append({"name": case.name, "refused": f"the budget of {options.budget:.0f} s was used up"})
        else:
            result["cases"].append(measure(case, timer, *((2, 0) if options.dry_run else (case.rounds, 3)), limits))
        say(table(result["cases"][-1:]))
        keep()
    wrong = [
        name
        for case in result["cases"]
        for name, entry in case.get("contenders", {}).items()
        if "failed" in entry and "fastbgad" in name
    ]
    keep()
    say(f"\n{path}, {time.monotonic() - start:.0f} s")
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
