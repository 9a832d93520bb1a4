"""Does the runs that have no result yet, beside any number of other processes that do the same."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import stamped

from fastbgad.errors import FastBGADError, InterruptedTraining
from fastbgad.experiments.running.claims import Claims
from fastbgad.system.environment import machine

from .bench import Bench, decisions, labels_of, split_counts
from .gallery import keep_pictures
from .grid import Run
from .results import DamagedResultError, Result, is_done, write_result
from .sets import reason_of

CLAIMS = "claims"
MakeBench = Callable[[Run], tuple[Bench, dict[str, str]]]
"""Opens the category of a run with its features; also returns what is to be recorded of these."""
Report = Callable[[str], None]


@dataclass
class Outcome:
    """Outcome of the runs."""

    done: list[Result] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Title of a run, or name of a category -> why it failed."""
    elsewhere: list[Run] = field(default_factory=list)
    """Runs that another process holds."""


def missing_runs(out: Path, runs: Sequence[Run], report: Report) -> list[Run]:
    """Return the runs without a result; a damaged result is reported and counts as missing."""
    missing = []
    for run in runs:
        try:
            done = is_done(out, run)
        except DamagedResultError as error:
            report(f"damaged, done again: {error}")
            done = False
        if not done:
            missing.append(run)
    return missing


def do_missing(out: Path, runs: Sequence[Run], make: MakeBench, report: Report) -> Outcome:
    """Do the runs that lack a result, and return what became of them.

    A run that fails is recorded and the rest is done. Runs that share features are done together, those first that no
    other process works on.

    Raises:
        InterruptedTraining, KeyboardInterrupt: on Ctrl-C; results so far are kept.
        OutputError: nothing can be written to `out`.
    """
    outcome, claims = Outcome(), Claims(out / CLAIMS)
    total = len(runs)
    for group in _groups(missing_runs(out, runs, report), claims):
        try:
            bench, about = make(group[0])
        except FastBGADError as error:
            outcome.failed[f"{group[0].category} with {group[0].features}"] = reason_of(error)
            report(f"failed: {group[0].category} with {group[0].features}: {reason_of(error)}")
            continue
        with closing(bench):
            for run in group:
                claim = claims.take(run.key)
                if claim is None:
                    outcome.elsewhere.append(run)
                    continue
                with claim:
                    # Another process may have finished it since this one looked.
                    if _is_whole(out, run):
                        claim.release(done=True)
                        continue
                    try:
                        result = _measured(out, run, bench, about)
                    except InterruptedTraining:
                        raise
                    except Exception as error:  # whatever goes wrong with one contender, the others are measured
                        outcome.failed[run.title] = reason_of(error)
                        report(f"failed: {run.title}: {reason_of(error)}")
                        continue
                    write_result(out, result)
                    claim.release(done=True)
                    outcome.done.append(result)
                    report(f"[{len(outcome.done)} of {total}] {summary_line(result)}")
    outcome.elsewhere = [run for run in outcome.elsewhere if not _is_whole(out, run)]
    return outcome


def _is_whole(out: Path, run: Run) -> bool:
    try:
        return is_done(out, run)
    except DamagedResultError:
        return False


def _groups(runs: Sequence[Run], claims: Claims) -> Iterator[list[Run]]:
    """Yield runs that share features, groups that no process works on first."""
    groups: dict[tuple[str, str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    while groups:
        held = claims.held()
        free = (group for group, members in groups.items() if not any(run.key in held for run in members))
        yield groups.pop(next(free, next(iter(groups))))


def _measured(out: Path, run: Run, bench: Bench, about: dict[str, str]) -> Result:
    started = time.perf_counter()
    split, scores = bench.run(run)
    labels = labels_of(split)
    result = Result(
        run,
        bench.metrics(split, scores),
        None if scores.sides is None else decisions(scores.sides, labels),
        scores.training_seconds,
        scores.scoring_seconds,
        split_counts(run, split),
        scores.points,
        {**about, **scores.facts, **_origin(), "wall_seconds": round(time.perf_counter() - started, 1)},
    )
    keep_pictures(out, run, bench, split, scores.maps)
    return result


def _origin() -> dict[str, Any]:
    """Return when, where and with what versions a result was made."""
    stamp = stamped({})
    return {
        "date": datetime.date.today().isoformat(),
        "commit": stamp["commit"],
        "processor": machine()["processor"],
        "threads": torch.get_num_threads(),
        "versions": stamp["versions"],
    }


def summary_line(result: Result) -> str:
    """Return the figures of a run in one line."""
    found = result.metrics
    return (
        f"{result.run.title}: image {found['image_auroc']:.3f}, pixel {found['pixel_auroc']:.3f}, "
        f"AUPRO {found['aupro']:.3f}, recall {found['recall_at_1_percent']:.2f}; "
        f"training {result.training_seconds:.1f} s, scoring {result.scoring_seconds:.1f} s"
    )
