"""Run everything that needs a GPU, stage by stage, on a machine with nothing of fastbgad installed.

    python3 -m benchmarks.gpu --out OUT                          all stages, eight minutes at most
    python3 -m benchmarks.gpu --out OUT --stage smoke,headline   the first look, four minutes at most

Stages, in order, each within its own budget (seconds) and what the whole run has left:

{stages}

Every result is a line of OUT/records.jsonl before the next begins: whatever ends the run, those lines are there, and
the same command with the other stages adds to them. OUT/log.txt holds what the child processes print, OUT/tiles.json
the tuned tile sizes. `python3 -m benchmarks.gpu.collect OUT` makes of it the files that are committed.

Exit status: 0 all right; 1 something was wrong, failed, crashed or hung (it is in the records); 2 cannot run here.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import carried
from .checkout import checkout
from .context import Context
from .records import TROUBLES, Record, Records
from .stages import ROOT, Stage, stages
from .supervisor import Supervisor
from .table import WIDTH, line, summary

SECONDS = 470.0
# Not worth starting a stage for.
FEWEST_SECONDS = 5.0
LOG = "log.txt"
# What a result is called that says nothing of a GPU: times are of a CPU, and on the stand-in driver nothing ran.
WITHOUT_A_GPU: dict[str, dict[str, str]] = {
    "cuda": {},
    "interpreter": {"measured": "rehearsed"},
    "stand-in": {"measured": "rehearsed", "right": "launched"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    known = {stage.name: stage for stage in stages()}
    names = [name.strip() for name in options.stage.split(",") if name.strip()] if options.stage else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        return _refuse(f"there is no stage {unknown[0]!r}; the stages are {', '.join(known)}")
    if options.driver == "cuda":
        import torch

        if not torch.cuda.is_available():
            return _refuse("there is no CUDA GPU here; --driver stand-in or interpreter walks through the stages")
    try:
        records = Records(options.out)
        log = (options.out / LOG).open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        return _refuse(f"cannot write into {options.out}: {error.strerror}; name another folder with --out")
    os.environ.pop("TRITON_INTERPRET", None)  # the jobs that want the interpreter say so
    if not options.launch_only:
        try:
            os.environ |= carried.environment()
        except carried.CarriedError as error:
            print(f"without carried kernels: {error}", flush=True)
    # An end from outside ends the children too, and says what there is so far.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with log:
        chosen = [stage for name, stage in known.items() if name in names]
        return _run(chosen, options, records, lambda text: print(text, file=log), lambda text: print(text, flush=True))


def _run(
    chosen: Sequence[Stage],
    options: argparse.Namespace,
    records: Records,
    log: Callable[[str], object],
    say: Callable[[str], object],
) -> int:
    start = time.monotonic()
    end = start + options.seconds
    records.add({"stage": "run", "outcome": "begins", **_facts(options, chosen)})
    found: list[Record] = []
    try:
        for stage in chosen:
            now = time.monotonic()
            seconds = min(options.stage_seconds or stage.seconds, end - now)
            if options.launch_only:
                seconds = end - now
            if seconds < FEWEST_SECONDS:
                left_out: Record = {"stage": stage.name, "item": stage.name, "outcome": "left out"}
                left_out["message"] = f"the {options.seconds:.0f} s of the run were used up"
                records.add(left_out)
                found.append(left_out)
                say(line(left_out))
                continue
            say(textwrap.fill(f"{stage.name}: {stage.about}; at most {seconds:.0f} s", WIDTH))
            records.add({"stage": stage.name, "outcome": "begins", "budget": round(seconds, 1)})

            def keep(result: dict[str, Any], stage: Stage = stage) -> None:
                outcome = WITHOUT_A_GPU[options.driver].get(result["outcome"], result["outcome"])
                result = {"stage": stage.name, "at": round(time.monotonic() - start, 1), **result, "outcome": outcome}
                records.add(result)
                found.append(result)
                if stage.name != "tests" or outcome in TROUBLES:  # of the hundreds of tests the troubles will do
                    say(line(result))

            context = Context(
                options.driver,
                options.out.resolve(),
                tiny=options.driver != "cuda" and not options.launch_only,
                launch_only=options.launch_only,
                only=options.only,
            )
            Supervisor(ROOT, keep, log, stage.processes).run(stage.jobs(context), now + seconds)
            took = time.monotonic() - now
            records.add({"stage": stage.name, "outcome": "ends", "seconds": round(took, 1)})
            say(f"{stage.name}: {took:.0f} s\n")
    except KeyboardInterrupt:
        say("interrupted; what was found so far is in the records")
    records.add({"stage": "run", "outcome": "ends", "seconds": round(time.monotonic() - start, 1)})
    say(summary(found))
    say(f"\n{records.path}: {len(found)} results in {time.monotonic() - start:.0f} s")
    return 1 if any(result["outcome"] in TROUBLES for result in found) else 0


def _facts(options: argparse.Namespace, chosen: Sequence[Stage]) -> Record:
    """Return facts of the run for readers of its records."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "driver": options.driver,
        "measured": options.driver == "cuda",
        "stages": [stage.name for stage in chosen],
        "carried": carried.describe(),
        **checkout(ROOT),
    }


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(
        textwrap.fill(
            stage.about, WIDTH, initial_indent=f"  {stage.name:<9} {stage.seconds:>4.0f}  ", subsequent_indent=" " * 18
        )
        for stage in stages()
    )
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu",
        description=(__doc__ or "").format(stages=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="output folder (runs/gpu)")
    parser.add_argument("--stage", default="", metavar="A,B", help="only these stages; all of them by default")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="only items whose name holds one of these"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (%(default).0f)")
    parser.add_argument("--stage-seconds", type=float, help="for each stage, in place of its own budget")
    parser.add_argument(
        "--driver",
        choices=("cuda", "interpreter", "stand-in"),
        default="cuda",
        help="without a GPU, at tiny sizes: interpreter checks values on the CPU, stand-in compiles and runs nothing",
    )
    parser.add_argument("--launch-only", action="store_true", help=argparse.SUPPRESS)
    return parser


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
