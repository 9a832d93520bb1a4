"""The stages of a run, in order: what is most likely to be wanted comes first, what may take long comes last."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from . import pytest_events
from .context import Context
from .supervisor import ChildJob

ROOT = Path(__file__).resolve().parents[2]
TILES = "tiles.json"

# Whose tests speak for which operation; each file runs in a process of its own.
EQUIVALENCE = {
    "flow": (
        "kernels/flow/test_pack.py",
        "ops/flow/test_registered.py",
        "ops/flow/test_wide.py",
        "compat/freia/test_accelerate.py",
    ),
    "training steps": ("train/test_graph.py",),
    "spp_loss": ("ops/spp_loss/test_registered.py",),
    "boundary": ("ops/boundary/test_registered.py",),
    "log_likelihood": ("ops/log_likelihood/test_dispatcher.py",),
    "score_map": ("ops/score_map/test_registered.py",),
}


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: as `--stage` takes it.
        seconds: its budget, within what the whole run has left.
        jobs: what runs in child processes, given the context.
        processes: children at a time; 1 where something is timed.
        about: what it gives, for --help.
    """

    name: str
    seconds: float
    jobs: Callable[[Context], Sequence[ChildJob]]
    processes: int
    about: str


def stages() -> list[Stage]:
    """Return all stages in order."""
    cores = len(os.sched_getaffinity(0))
    several = max(1, min(8, cores))
    return [
        Stage(
            "smoke",
            85,
            partial(_shared, "smoke", 60, several),
            several,
            "the machine; every kernel and mode once, against float64",
        ),
        Stage(
            "headline",
            145,
            partial(_single, "headline", 60),
            1,
            "the README's figures: flow of a 1024-px image, training steps, loss",
        ),
        Stage(
            "whole",
            120,
            partial(_single, "whole", 100),
            1,
            "a category trained on the card and on the CPU; fastbgad bench",
        ),
        Stage("tests", 90, _tests, max(several, 2), "all tests marked equivalence, a process per file"),
        Stage("tune", 150, _tuning, 1, "tile sizes, most valuable first; headline again with them"),
        Stage("compiled", 100, partial(_single, "compiled", 90), 1, "FrEIA under torch.compile"),
    ]


def _worker(module: str, context: Context, share: tuple[int, int] | None) -> Callable[..., list[str]]:
    def command(items: Sequence[str] | None, skip: Sequence[tuple[str, str]]) -> list[str]:
        wanted: object = items
        if items is None and share is not None:
            wanted = {"share": share[0], "of": share[1]}
        here = replace(context, skip=list(skip)).as_json()
        return [
            sys.executable,
            "-X",
            "faulthandler",
            "-m",
            f"{__package__}.worker",
            module,
            here,
            *([] if wanted is None else [json.dumps(wanted)]),
        ]

    return command


def _environment(context: Context) -> Mapping[str, str]:
    return {"TRITON_INTERPRET": "1"} if context.driver == "interpreter" else {}


def _single(module: str, item_seconds: float, context: Context) -> list[ChildJob]:
    return [ChildJob(module, _worker(module, context, None), item_seconds, _environment(context))]


def _shared(module: str, item_seconds: float, processes: int, context: Context) -> list[ChildJob]:
    """Every process takes its share of the items."""
    return [
        ChildJob(f"{module} {i}", _worker(module, context, (i, processes)), item_seconds, _environment(context))
        for i in range(processes)
    ]


def _tuning(context: Context) -> list[ChildJob]:
    """Tuning, and behind it the headline with what it found."""
    again = replace(context, tiles=str(context.out / TILES))
    jobs = [ChildJob("tune", _worker("tuning", context, None), 100, _environment(context))]
    return [*jobs, ChildJob("headline, tuned", _worker("headline_tuned", again, None), 60, _environment(context))]


def _tests(context: Context) -> list[ChildJob]:
    return [
        ChildJob(f"tests of {operation}", partial(_pytest, context, name), 60, _environment(context))
        for operation, names in EQUIVALENCE.items()
        for name in names
    ]


def _pytest(context: Context, name: str, items: Sequence[str] | None, skip: Sequence[tuple[str, str]]) -> list[str]:
    """The tests of one file; those that are left travel in the environment of `env`."""
    plugins = ["-p", f"{__package__}.pytest_events", "-p", "no:cacheprovider"]
    optimized: list[str] = []
    if not context.values:  # nothing computes values, so nothing is asserted
        plugins = ["-p", f"{__package__}.pytest_stand_in", *plugins, "--assert=plain"]
        optimized = ["-O"]
    command = [
        sys.executable,
        *optimized,
        "-X",
        "faulthandler",
        "-m",
        "pytest",
        "-q",
        "-m",
        "equivalence",
        *plugins,
        str(ROOT / "tests" / name),
    ]
    return command if items is None else ["env", f"{pytest_events.WANTED}={json.dumps(list(items))}", *command]
