"""Runs the cells that a ledger lacks, beside any number of other processes that do the same.

A job is a training with all missing cells that it serves. A process takes a category, opens it once, and claims and
runs its jobs one by one; it prefers a category on which nobody else works, so that features are rarely extracted twice.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ...config import METHOD_NAMES
from ...data import Category
from ...errors import ConfigError, FastBGADError
from ...progress import Progress
from ...system.ranks import Rank
from ...train.fit import InterruptedTraining
from ..plan.cells import PEERS, Cell, CellResult, Dataset
from ..plan.sources import Place as CategoryPlace
from ..plan.sources import places_of
from .claims import launch_age
from .ledger import Ledger

POLL = 3.0
"""Seconds between two looks at what other processes are doing."""


class Runner(Protocol):
    """Runs cells of one category, and keeps what they have in common; `cell_runner.CellRunner` is one."""

    def run(self, cells: Sequence[Cell]) -> list[CellResult]:
        """The results of cells that share a training; raises `FastBGADError`."""

    def close(self) -> None:
        """Frees the features."""


MakeRunner = Callable[[Category, Dataset, Callable[[Progress], None]], Runner]
OpenCategory = Callable[[Dataset, str], Category]
Report = Callable[[int, str], None]
"""Told how many cells have a result by now, and what is being done."""


@dataclass(frozen=True)
class Job:
    """A training and the cells it serves."""

    key: str
    cells: tuple[Cell, ...]

    @property
    def place(self) -> CategoryPlace:
        """The category it belongs to."""
        return self.cells[0].dataset, self.cells[0].category

    @property
    def title(self) -> str:
        """For people: data set, category, method and seed."""
        cell = self.cells[0]
        return f"{cell.dataset} {cell.category} · {(METHOD_NAMES | PEERS)[cell.method]}, seed {cell.seed}"


def jobs_of(cells: Iterable[Cell]) -> tuple[Job, ...]:
    """Groups cells by the training that serves them, in the order of each group's first cell."""
    groups: dict[str, list[Cell]] = {}
    for cell in dict.fromkeys(cells):
        groups.setdefault(cell.training_key, []).append(cell)
    return tuple(Job(key, tuple(members)) for key, members in groups.items())


@dataclass
class Outcome:
    """What a worker came across.

    Attributes:
        ran: cells that this process measured.
        failed: of each training that failed since the launch, in any process, the message.
        unopened: of each category that this process could not open, the message.
    """

    ran: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    unopened: dict[CategoryPlace, str] = field(default_factory=dict)


def work(
    ledger: Ledger,
    cells: Sequence[Cell],
    open_category: OpenCategory,
    make_runner: MakeRunner,
    *,
    place: Rank | None = None,
    on_cells: Report | None = None,
    poll: float = POLL,
) -> Outcome:
    """Runs the missing cells, as far as nobody else does, and keeps each result in the ledger.

    Returns when every cell has a result, failed or cannot be run here, and nobody else works on any: if a process dies
    meanwhile, those that wait take over.

    Args:
        ledger: results, claims, failures.
        cells: what is wanted.
        open_category: opens a category of a data set, once per process.
        make_runner: makes the runner of a category, given a callback for its progress.
        place: of this process among those launched together.
        on_cells: called whenever something has been done.
        poll: seconds between two looks at what others do.

    Raises:
        InterruptedTraining: Ctrl-C, or SIGTERM; results so far are kept and claims given back.
        OutputError: the ledger cannot be written.
    """
    worker = _Worker(ledger, cells, open_category, make_runner, place or Rank(), on_cells or (lambda done, text: None))
    try:
        with _sigterm_as_interrupt():
            return worker.run(poll)
    except (KeyboardInterrupt, InterruptedTraining) as interruption:
        done = len(worker.cells) - len(ledger.missing(worker.cells))
        raise InterruptedTraining(
            f"interrupted; {done} of {len(worker.cells)} cells have results, which are kept in {ledger.folder}: the "
            "same command goes on from there"
        ) from interruption


class _Worker:
    def __init__(
        self,
        ledger: Ledger,
        cells: Sequence[Cell],
        open_category: OpenCategory,
        make_runner: MakeRunner,
        place: Rank,
        report: Report,
    ) -> None:
        self.ledger, self.open_category, self.make_runner, self.report = ledger, open_category, make_runner, report
        self.cells = tuple(dict.fromkeys(cells))
        self.launched = ledger.clock() - launch_age(place)
        self.tried: set[str] = set()
        self.done, self.title = 0, ""
        self.outcome = Outcome()
        places = places_of(self.cells)
        start = len(places) * place.number // place.world
        self.places = places[start:] + places[:start]

    def run(self, poll: float) -> Outcome:
        # Damaged results are set aside now; later it is enough to see which files are there.
        self.ledger.results(self.cells)
        while True:
            left, busy = self._left()
            place = self._choose(left, busy)
            if place is not None:
                self._run_category(place, [job for job in left if job.place == place])
            elif any(job.key in busy for job in left):
                waiting = sum(len(job.cells) for job in left if job.key in busy)
                self.report(self.done, f"waiting for {waiting} cells of other processes")
                time.sleep(poll)
            else:
                break
        keys = [job.key for job in jobs_of(self.ledger.missing(self.cells))]
        self.outcome.failed |= {key: f.message for key, f in self.ledger.failures(keys, self.launched).items()}
        return self.outcome

    def _left(self) -> tuple[list[Job], set[str]]:
        """The jobs that are neither done nor failed, with the cells they lack; and the keys that others work on."""
        busy = self.ledger.claimed()
        missing = self.ledger.missing(self.cells)
        self.done = len(self.cells) - len(missing)
        jobs = jobs_of(missing)
        failed = self.ledger.failures((job.key for job in jobs), self.launched)
        return [job for job in jobs if job.key not in failed], busy

    def _choose(self, left: Sequence[Job], busy: set[str]) -> CategoryPlace | None:
        """The next category with something to do: one that nobody works on, or else any, to help there."""
        free = {job.place for job in left if self._may_try(job) and job.key not in busy}
        taken = {job.place for job in left if job.key in busy}
        ordered = [place for place in self.places if place in free]
        return next((place for place in ordered if place not in taken), ordered[0] if ordered else None)

    def _may_try(self, job: Job) -> bool:
        return job.key not in self.tried and job.place not in self.outcome.unopened

    def _run_category(self, place: CategoryPlace, jobs: Sequence[Job]) -> None:
        with closing(_Lazy(lambda: self._make(place))) as runner:
            for job in jobs:
                claim = self.ledger.claim(job.key) if self._may_try(job) else None
                if claim is None:
                    continue
                with claim:
                    self._run_job(job, runner)
                    if not self.ledger.missing(job.cells):
                        claim.release(done=True)

    def _make(self, place: CategoryPlace) -> Runner:
        self.report(self.done, f"{place[0]} {place[1]} · opening")
        try:
            category = self.open_category(*place)
        except FastBGADError as error:
            self.outcome.unopened[place] = str(error)
            raise _UnopenedError(str(error)) from error
        return self.make_runner(category, place[0], self._show)

    def _run_job(self, job: Job, runner: Runner) -> None:
        """Runs a job that this process has claimed. What goes wrong with it is recorded; the rest goes on."""
        # Another process may have done, or failed at, it before the claim was taken.
        there = self.ledger.results(job.cells)
        cells = [cell for cell in job.cells if cell not in there]
        if not cells or self.ledger.failures([job.key], self.launched):
            return
        self.tried.add(job.key)
        self.title = job.title
        self.report(self.done, self.title)
        try:
            for result in runner.run(cells):
                self.ledger.write(result)
            lacking = self.ledger.missing(cells)
            if lacking:
                raise ConfigError(f"no result came of {', '.join(cell.key for cell in lacking)}")
        except InterruptedTraining:
            raise
        except _UnopenedError:
            return
        except (FastBGADError, MemoryError, torch.OutOfMemoryError) as error:
            self.ledger.fail(job.key, str(error) or type(error).__name__)
        missing = self.ledger.missing(self.cells)
        self.outcome.ran += len(cells) - len(set(cells) & set(missing))
        self.done = len(self.cells) - len(missing)
        self.report(self.done, self.title)

    def _show(self, progress: Progress) -> None:
        self.report(self.done, f"{self.title} · {progress.stage} {progress.done}/{progress.total}")


class _UnopenedError(FastBGADError):
    """The category cannot be opened; that is recorded by itself, not as a failure of each of its jobs."""


class _Lazy:
    """A runner that is made when it is first needed: other processes may have taken all jobs of a category."""

    def __init__(self, make: Callable[[], Runner]) -> None:
        self._make = make
        self._runner: Runner | None = None
        self._error: FastBGADError | None = None

    def run(self, cells: Sequence[Cell]) -> list[CellResult]:
        if self._error is not None:
            raise self._error
        if self._runner is None:
            try:
                self._runner = self._make()
            except FastBGADError as error:
                # A backbone that cannot be had is not asked for again with every job.
                self._error = error
                raise
        return self._runner.run(cells)

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Batch systems and torchrun stop a process with SIGTERM; it then gives its claims back as after Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
