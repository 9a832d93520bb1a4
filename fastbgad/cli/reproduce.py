"""What `fastbgad reproduce` does: plans, finds the data, runs the missing cells, prints and writes the results."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from ..backbones.packaged import is_installed
from ..backbones.weights import resolve_weights
from ..data import Category
from ..errors import ConfigError
from ..experiments.plan.cells import Cell, Dataset
from ..experiments.plan.plan import Plan, cells_of
from ..experiments.plan.protocol import make_plan, table_names
from ..experiments.plan.protocol_file import dataset_facts, protocol_source, read_protocol
from ..experiments.plan.setup import Setup
from ..experiments.plan.sources import Sources, find_sources
from ..experiments.results.outputs import print_plans, write_outputs
from ..experiments.running.cell_runner import CellRunner
from ..experiments.running.dry_run import forecast, print_forecast
from ..experiments.running.ledger import Ledger
from ..experiments.running.worker import MakeRunner, Outcome, Report, Runner, jobs_of, work
from ..progress import Progress
from ..render import console
from ..system.environment import machine, versions
from ..system.ranks import Rank, device_of, find_rank, threads_of
from ..wording import count, indented
from .reproduce_options import Reproduce

_SHOWN = 20


def reproduce(command: Reproduce) -> int:
    """Runs the missing cells of tables and sweeps, prints and writes them; 2 if cells failed or are missing."""
    place = find_rank()
    setup = settled(command.setup())
    plans = plans_of(command, setup)
    sources = find_sources(command.data)
    if command.dry_run:
        return _dry_run(command, plans, setup, sources) if place.is_first else 0
    device = device_of(place, command.device)
    threads = threads_of(place)
    if threads is not None:
        torch.set_num_threads(threads)
    ledger, cells = Ledger(command.out, setup), cells_of(plans)
    if not place.is_first:
        # Only the first process speaks, and only its exit code says that cells failed: torchrun would stop the others
        # in the middle of their work.
        _run(command, ledger, cells, sources, device, place, None)
        return 0
    facts = record_launch(command, ledger, plans, place)
    ledger.results(cells)  # sets damaged ones aside, so that they are counted as missing
    _print_head(ledger, plans, device, place)
    with console.cell_bar(len(cells)) as on_cells:
        outcome = _run(command, ledger, cells, sources, device, place, on_cells)
    show_results(ledger, plans, facts)
    return _print_troubles(ledger, cells, outcome)


def _dry_run(command: Reproduce, plans: Sequence[Plan], setup: Setup, sources: Sources) -> int:
    found = forecast(plans, Ledger(command.out, setup, read_only=True), sources)
    print_forecast(plans, found)
    return 2 if found.blocked else 0


def settled(setup: Setup) -> Setup:
    """Return the setup with the weights that its backbone is going to have.

    Pretrained weights may turn out to be those of a package. Decided here, that is part of the setup: cells with the
    one and the other never share a ledger.
    """
    if setup.weights != "pretrained" or not is_installed(setup.backbone):
        return setup
    return replace(setup, weights=resolve_weights(setup.backbone, setup.weights)[0])


def plans_of(command: Reproduce, setup: Setup) -> tuple[Plan, ...]:
    """The plans of the tables and sweeps that are named, or of all tables that have the categories and methods chosen.

    Raises:
        ConfigError: a name, category or method is unknown, or nothing is left to run.
    """
    seeds: tuple[int, ...] | None = command.seeds or None
    if seeds is not None and len(seeds) == 1:
        if seeds[0] < 1:
            raise ConfigError(f"--seeds is {seeds[0]}; give how many seeds, at least 1, or several seeds")
        seeds = tuple(range(seeds[0]))
    plans: list[Plan] = []
    errors: list[ConfigError] = []
    for name in dict.fromkeys(command.names or table_names()):
        try:
            plan = make_plan(
                name,
                seeds=seeds,
                categories=_categories_for(name, command.categories),
                methods=command.methods or None,
                peers=command.peers,
                num_anomalies=command.num_anomalies,
                training=setup.training,
            )
        except ConfigError as error:
            # Of all tables, some need not have the category or method that was chosen.
            if command.names:
                raise
            errors.append(error)
        else:
            plans.append(plan)
    if not plans:
        raise errors[0]
    return tuple(plans)


def _categories_for(name: str, chosen: Sequence[str]) -> tuple[str, ...] | None:
    """Those of the chosen categories that are of the protocol's data set, or of none: then they are misspelt."""
    if not chosen:
        return None
    others = {dataset: dataset_facts(dataset).images for dataset in get_args(Dataset)}
    own = others.pop(read_protocol(name).dataset)
    foreign = {category for images in others.values() for category in images} - set(own)
    return tuple(category for category in chosen if category not in foreign) or tuple(chosen)


def _run(
    command: Reproduce,
    ledger: Ledger,
    cells: Sequence[Cell],
    sources: Sources,
    device: torch.device,
    place: Rank,
    on_cells: Report | None,
) -> Outcome:
    open_category = partial(sources.open, check=command.check)
    make_runner = runner_maker(ledger, device, command.workers)
    return work(ledger, cells, open_category, make_runner, place=place, on_cells=on_cells)


def runner_maker(ledger: Ledger, device: torch.device, workers: int) -> MakeRunner:
    """What makes the runners of categories for a run."""

    def make(category: Category, dataset: Dataset, on_progress: Callable[[Progress], None]) -> Runner:
        return CellRunner(
            ledger.setup, category, dataset,
            device=device, workers=workers, pictures=ledger.pictures, on_progress=on_progress,
        )  # fmt: skip

    return make


def show_results(ledger: Ledger, plans: Sequence[Plan], facts: Mapping[str, Any]) -> None:
    """Prints the tables and sweeps, and writes the files that are made of them."""
    results = ledger.results(cells_of(plans))
    print_plans(plans, results)
    files = write_outputs(ledger.folder, plans, results, ledger.setup, facts)
    print(f"page: {files[-1]}")


def record_launch(command: Reproduce, ledger: Ledger, plans: Sequence[Plan], place: Rank) -> dict[str, Any]:
    """Writes into the run's manifest what was asked for, by which protocols and seeds, where and with what.

    Returns:
        The same.
    """
    started = datetime.now(UTC)
    options = {name: _plain(value) for name, value in asdict(command).items()}
    facts = {
        "options": options,
        "processes": place.world,
        "launcher": place.launcher or "none",
        "machine": machine(),
        "versions": versions(),
        "protocols": [_protocol_facts(plan, name) for plan, name in zip(plans, _names(command, plans), strict=True)],
    }
    ledger.record_launch(f"{started:%Y%m%dT%H%M%S.%f}-{socket.gethostname()}-{os.getpid()}", facts)
    return facts


def _names(command: Reproduce, plans: Sequence[Plan]) -> list[str]:
    """How each plan was named: a file of the user's own by its path."""
    return list(dict.fromkeys(command.names)) if command.names else [plan.name for plan in plans]


def _protocol_facts(plan: Plan, name: str) -> dict[str, Any]:
    cells = plan.cells
    return {
        "name": plan.name,
        "title": plan.title,
        "dataset": plan.dataset,
        "seeds": sorted({cell.seed for cell in cells}),
        "methods": list(dict.fromkeys(cell.method for cell in cells)),
        "categories": list(dict.fromkeys(cell.category for cell in cells)),
        "num_anomalies": sorted({cell.num_anomalies for cell in cells}),
        "cells": len(cells),
        "trainings": len(jobs_of(cells)),
        "protocol": protocol_source(name),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _print_head(ledger: Ledger, plans: Sequence[Plan], device: torch.device, place: Rank) -> None:
    cells = cells_of(plans)
    missing = ledger.missing(cells)
    world = f", first of {place.world} processes" if place.world > 1 else ""
    print(
        f"{', '.join(plan.name for plan in plans)}: {len(cells)} cells, {len(cells) - len(missing)} done; "
        f"{len(jobs_of(missing))} trainings to run on {device}{world}",
        flush=True,
    )


def _print_troubles(ledger: Ledger, cells: Sequence[Cell], outcome: Outcome) -> int:
    """Names the cells that have no result, and why; returns the exit code."""
    missing = ledger.missing(cells)
    if not missing:
        return 0
    reasons: dict[str, list[Cell]] = {}
    for job in jobs_of(missing):
        reason = outcome.unopened.get(job.place) or outcome.failed.get(job.key)
        reason = reason or "nobody ran them, or their results were damaged; repeat the command"
        reasons.setdefault(reason, []).extend(job.cells)
    print(f"{len(missing)} of {len(cells)} cells have no result; the same command tries them again:")
    for reason, members in reasons.items():
        titles = list(dict.fromkeys(job.title for job in jobs_of(members)))
        more = f" and {len(titles) - _SHOWN} more" if len(titles) > _SHOWN else ""
        names = "; ".join(titles[:_SHOWN]) + more
        print(f"  - {count(len(members), 'cell')} ({names}): {indented(reason)}")
    return 2
