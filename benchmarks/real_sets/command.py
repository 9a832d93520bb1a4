"""The two commands of `benchmarks/real.py`: do the runs, and write the page."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from page_output import differences, write_files

from fastbgad.backbones import Backbone
from fastbgad.config import PRESETS
from fastbgad.errors import ConfigError

from .backbones import build, features_named
from .bench import Bench
from .gallery import write_gallery
from .grid import LEFT_OUT, METHODS, Run, checked, plan, plan_convergence
from .report import PLOTS, page_files, readme_table
from .results import collect, read_collection, write_collection
from .sets import find_categories, open_set
from .work import Outcome, do_missing, missing_runs


def run_command(options: argparse.Namespace) -> int:
    """Do the missing runs, or list them with --dry-run; return 1 if any failed."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.data is None:
        raise ConfigError("no data set is given: say --data DIR, the folder of the categories, or --page")
    folders = find_categories(options.data)
    names = checked("category", options.categories or list(folders), folders)
    runs = _planned(options, names)
    if not runs:
        raise ConfigError("no run fits these choices; look at --only, --methods and --features")
    if options.dry_run:
        missing = missing_runs(options.out, runs, print)
        print("\n".join(f"missing: {run.title}" for run in missing))
        print(f"{len(missing)} of {len(runs)} runs are missing in {options.out}")
        return 0
    make = _BenchMaker(options, folders)
    outcome = do_missing(options.out, runs, make, functools.partial(print, flush=True))
    return _ended(outcome, options.methods)


def _planned(options: argparse.Namespace, names: Sequence[str]) -> list[Run]:
    seeds = options.seeds or ([0] if options.convergence else [0, 1, 2])
    if min(seeds) < 0 or min(options.image_size) < 1 or options.peer_epochs < 1 or options.passes < 1:
        raise ConfigError("seeds are at least 0; image sizes, --peer-epochs and --passes at least 1")
    if options.convergence:
        runs = plan_convergence(names, options.features, options.image_size, seeds)
    else:
        methods = checked("method", options.methods or list(METHODS), [*METHODS, *LEFT_OUT])
        runs = plan(
            names,
            options.features,
            options.image_size,
            options.schedule,
            [method for method in methods if method not in LEFT_OUT],
            seeds,
            options.peer_epochs,
        )
    return [run for run in runs if options.only in str(run.path)]


class _BenchMaker:
    """Preparation of runs: opens categories and builds backbones, each backbone once.

    Gabor features learn statistics of the category, so every category has a backbone of its own there; so has a
    standardized one.
    """

    def __init__(self, options: argparse.Namespace, folders: dict[str, Path]) -> None:
        self._options, self._folders = options, folders

    def __call__(self, run: Run) -> tuple[Bench, dict[str, str]]:
        """Return the bench for a run, and facts about its features; raise `FastBGADError` if there is none."""
        category = open_set(run.category, self._folders[run.category])
        backbone, about = self._backbone(run.features)
        presets = {name: PRESETS[name]() for name in self._options.schedule}
        bench = Bench(category, backbone, run.size, presets=presets, convergence_passes=self._options.passes)
        return bench, about

    def _backbone(self, features: str) -> tuple[Backbone, dict[str, str]]:
        return build(features_named(features), self._options.weights)


def _ended(outcome: Outcome, methods: Sequence[str] | None) -> int:
    print(f"done: {len(outcome.done)} runs")
    if outcome.elsewhere:
        print(f"{len(outcome.elsewhere)} more are being done by other processes")
    for method, reason in LEFT_OUT.items():
        if methods is None or method in methods:
            print(f"left out: {reason}")
    for title, reason in outcome.failed.items():
        print(f"failed: {title}: {reason}", file=sys.stderr)
    return int(bool(outcome.failed))


def write_page(options: argparse.Namespace) -> int:
    """Collect results, write the page and its gallery, and print the table for the README; --check only compares."""
    kept = options.folder / "results" / "real"
    if not options.check:
        results, problems = collect(options.out)
        for problem in problems:
            print(f"left out: {problem}", file=sys.stderr)
        if results:
            write_collection(kept / f"{options.name}.json", results)
            gallery, problems = write_gallery(options.out, [result.run for result in results])
            for problem in problems:
                print(f"left out: {problem}", file=sys.stderr)
            print(f"wrote {gallery}, which is not to be committed")
    files = sorted(kept.glob("*.json"))
    if not files:
        raise ConfigError(
            f"there are no figures: {options.out} holds no result and {kept} no file; run with --data DIR"
        )
    pages = page_files([(path.stem, read_collection(path)) for path in files])
    if options.check:
        found = differences(pages, options.folder, PLOTS)
        for line in found:
            print(f"error: {line}; run `python benchmarks/real.py --page`", file=sys.stderr)
        return int(bool(found))
    write_files(pages, options.folder, PLOTS)
    print(f"wrote {options.folder / 'REAL.md'} and {len(pages) - 1} plots; for the README:\n")
    print(readme_table([result for path in files for result in read_collection(path)]))
    return 0
