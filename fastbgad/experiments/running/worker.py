"""Work on the cells that a ledger lacks, beside any number of other processes that do the same.

A training serves one or several cells. A process takes a category, opens it once, and claims and runs its trainings one
by one; it prefers a category on which nobody else works, so that features are rarely extracted twice.
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
from ...errors import ConfigError, FastBGADError, InterruptedTraining
from ...progress import Progress
from ...system.ranks import Rank
from ..plan import PEERS, CategoryKey, Cell, CellResult, Dataset, categories_of
from .claims import launch_age
from .ledger import Ledger

POLL = 3.0
"""Seconds between two checks of what other processes are doing."""


class Runner(Protocol):
    """Interface of an object that runs cells of one category, such as `cell_runner.CellRunner`."""

    def run(self, cells: Sequence[Cell]) -> list[CellResult]:
        """Return the results of cells that share a training; raise `FastBGADError` where that fails."""

    def close(self) -> None:
        """Free the features."""


MakeRunner = Callable[[Category, Dataset, Callable[[Progress], None]], Runner]
OpenCategory = Callable[[Dataset, str], Category]
Report = Callable[[int, str], None]
"""Called with the number of cells that have a result, and what is being done."""


@dataclass(frozen=True)
class Training:
    """A training and cells that it serves."""

    key: str
    cells: tuple[Cell, ...]

    @property
    def category(self) -> CategoryKey:
        """The data set and category that it belongs to."""
        return self.cells[0].dataset, self.cells[0].category

    @property
    def title(self) -> str:
        """Data set, category, method and seed, for readers."""
        cell = self.cells[0]
        return f"{cell.dataset} {cell.category} · {(METHOD_NAMES | PEERS)[cell.method]}, seed {cell.seed}"


def trainings_of(cells: Iterable[Cell]) -> tuple[Training, ...]:
    """Group cells by the training that serves them, in the order of each group's first cell."""
    groups: dict[str, list[Cell]] = {}
    for cell in dict.fromkeys(cells):
        groups.setdefault(cell.training_key, []).append(cell)
    return tuple(Training(key, tuple(members)) for key, members in groups.items())


@dataclass
class Outcome:
    """Failures that a worker knows of.

    Attributes:
        failed: of each training that failed since the launch, in any process, the message.
        unopened: of each category that this process could not open, the message.
    """

    failed: dict[str, str] = field(default_factory=dict)
    unopened: dict[CategoryKey, str] = field(default_factory=dict)


def work(
    ledger: Ledger,
    cells: Sequence[Cell],
    open_category: OpenCategory,
    make_runner: MakeRunner,
    *,
    rank: Rank | None = None,
    on_cells: Report | None = None,
    poll: float = POLL,
) -> Outcome:
    """Run the missing cells that no other process works on, and write each result into the ledger.

    Return when every cell has a result, failed or cannot be run here, and no other process works on any. If a process
    dies meanwhile, one that waits takes its work over.

    Args:
        ledger: results, claims, failures.
        cells: to run where they are missing.
        open_category: opens a category of a data set, once per process.
        make_runner: makes the runner of a category, given a callback for its progress.
        rank: of this process among those launched together.
        on_cells: called whenever something has been done.
        poll: seconds between two checks of what others do.

    Raises:
        InterruptedTraining: Ctrl-C, or SIGTERM; results so far are kept and claims given back.
        OutputError: the ledger cannot be written.
    """
    worker = _Worker(ledger, cells, open_category, make_runner, rank or Rank(), on_cells or (lambda done, text: None))
    try:
        with _sigterm_as_interrupt():
            return worker.run(poll)
    except (KeyboardInterrupt, InterruptedTraining) as interruption:
        done = len(worker.cells) - len(ledger.missing(worker.cells))
        raise InterruptedTraining(
            f"interrupted; {done} of {len(worker.cells)} cells have results, which are kept in {ledger.folder}: the "
            "same command resumes there"
        ) from interruption


class _Worker:
    def __init__(
        self,
        ledger: Ledger,
        cells: Sequence[Cell],
        open_category: OpenCategory,
        make_runner: MakeRunner,
        rank: Rank,
        report: Report,
    ) -> None:
        self.ledger, self.open_category, self.make_runner, self.report = ledger, open_category, make_runner, report
        self.cells = tuple(dict.fromkeys(cells))
        self.launched = ledger.clock() - launch_age(rank)
        self.tried: set[str] = set()
        self.done, self.title = 0, ""
        self.outcome = Outcome()
        categories = categories_of(self.cells)
        start = len(categories) * rank.number // rank.world
        self.categories = categories[start:] + categories[:start]

    def run(self, poll: float) -> Outcome:
        # Damaged results are renamed now; later it is enough to see which files are there.
        self.ledger.results(self.cells)
        while True:
            left, busy = self._left()
            category = self._choose(left, busy)
            if category is not None:
                self._run_category(category, [training for training in left if training.category == category])
            elif any(training.key in busy for training in left):
                waiting = sum(len(training.cells) for training in left if training.key in busy)
                self.report(self.done, f"waiting for {waiting} cells of other processes")
                time.sleep(poll)
            else:
                break
        keys = [training.key for training in trainings_of(self.ledger.missing(self.cells))]
        failures = self.ledger.failures(keys, self.launched)
        self.outcome.failed |= {key: failure.message for key, failure in failures.items()}
        return self.outcome

    def _left(self) -> tuple[list[Training], set[str]]:
        """Return the trainings that are neither done nor failed, with their missing cells, and the claimed keys."""
        busy = self.ledger.claimed()
        missing = self.ledger.missing(self.cells)
        self.done = len(self.cells) - len(missing)
        trainings = trainings_of(missing)
        failed = self.ledger.failures((training.key for training in trainings), self.launched)
        return [training for training in trainings if training.key not in failed], busy

    def _choose(self, left: Sequence[Training], busy: set[str]) -> CategoryKey | None:
        """Return the next category with something to do, first one that nobody works on; None if there is none."""
        free = {training.category for training in left if self._may_try(training) and training.key not in busy}
        taken = {training.category for training in left if training.key in busy}
        ordered = [category for category in self.categories if category in free]
        return next((category for category in ordered if category not in taken), ordered[0] if ordered else None)

    def _may_try(self, training: Training) -> bool:
        return training.key not in self.tried and training.category not in self.outcome.unopened

    def _run_category(self, category: CategoryKey, trainings: Sequence[Training]) -> None:
        with closing(_LazyRunner(lambda: self._make(category))) as runner:
            for training in trainings:
                claim = self.ledger.claim(training.key) if self._may_try(training) else None
                if claim is None:
                    continue
                with claim:
                    self._run_training(training, runner)
                    if not self.ledger.missing(training.cells):
                        claim.release(done=True)

    def _make(self, key: CategoryKey) -> Runner:
        dataset, name = key
        self.report(self.done, f"{dataset} {name} · opening")
        try:
            category = self.open_category(dataset, name)
        except FastBGADError as error:
            self.outcome.unopened[key] = str(error)
            raise _UnopenedError(str(error)) from error
        return self.make_runner(category, dataset, self._show)

    def _run_training(self, training: Training, runner: Runner) -> None:
        """Run a training that this process has claimed; record its failure, so that the others can be run."""
        # Another process may have done it, or failed at it, before the claim was taken.
        results = self.ledger.results(training.cells)
        cells = [cell for cell in training.cells if cell not in results]
        if not cells or self.ledger.failures([training.key], self.launched):
            return
        self.tried.add(training.key)
        self.title = training.title
        self.report(self.done, self.title)
        try:
            for result in runner.run(cells):
                self.ledger.write(result)
            missing = self.ledger.missing(cells)
            if missing:
                raise ConfigError(f"no result came of {', '.join(cell.key for cell in missing)}")
        except InterruptedTraining:
            raise
        except _UnopenedError:
            return
        except (FastBGADError, MemoryError, torch.OutOfMemoryError) as error:
            self.ledger.fail(training.key, str(error) or type(error).__name__)
        self.done = len(self.cells) - len(self.ledger.missing(self.cells))
        self.report(self.done, self.title)

    def _show(self, progress: Progress) -> None:
        self.report(self.done, f"{self.title} · {progress.stage} {progress.done}/{progress.total}")


class _UnopenedError(FastBGADError):
    """The category cannot be opened. That is recorded once, not as a failure of each of its trainings."""


class _LazyRunner:
    """A runner that is made when it is first needed: other processes may have taken all trainings of a category."""

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
                # Do not look for an unavailable backbone again with every training.
                self._error = error
                raise
        return self._runner.run(cells)

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, by which batch systems and torchrun stop a process: claims are given back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
