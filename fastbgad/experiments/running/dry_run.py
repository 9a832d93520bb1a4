"""Forecast of a run: how many cells and trainings, how long they may take, and which data are missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from ...data import Category
from ...errors import DataError, FastBGADError, MetricError
from ...render.console import print_table
from ...wording import count, duration, indented
from ..plan import CategoryKey, Cell, CellResult, Plan, Sources, cells_of, split_of
from .ledger import Ledger
from .worker import Training, trainings_of


@dataclass(frozen=True)
class Forecast:
    """Work and cost of a run.

    Attributes:
        done: cells that have a result.
        trainings: trainings to run, with the missing cells that they serve.
        blocked: the cells that cannot be run, by the reason why.
        seconds: estimated time with one process, from trainings that are done; None if there are none.
    """

    done: frozenset[Cell]
    trainings: tuple[Training, ...]
    blocked: dict[str, tuple[Cell, ...]]
    seconds: float | None

    @property
    def to_run(self) -> frozenset[Cell]:
        """The cells that would be run."""
        return frozenset(cell for training in self.trainings for cell in training.cells)


def forecast(plans: Sequence[Plan], ledger: Ledger, sources: Sources) -> Forecast:
    """Forecast a run from the results in the ledger and from the names, not the contents, of the images."""
    cells = cells_of(plans)
    done = frozenset(ledger.results(cells))
    missing = [cell for cell in cells if cell not in done]
    blocked = data_problems(missing, sources)
    blocked_cells = {cell for members in blocked.values() for cell in members}
    trainings = trainings_of(cell for cell in missing if cell not in blocked_cells)
    return Forecast(done, trainings, blocked, estimate_seconds(ledger.everything(), trainings))


def data_problems(cells: Iterable[Cell], sources: Sources) -> dict[str, tuple[Cell, ...]]:
    """Return the cells that cannot be run, by the reason: a missing category, an unknown type, too few anomalies."""
    categories: dict[CategoryKey, Category | str] = {}
    blocked: dict[str, list[Cell]] = {}
    for cell in cells:
        key = (cell.dataset, cell.category)
        if key not in categories:
            try:
                categories[key] = sources.open(*key, check="none")
            except FastBGADError as error:
                categories[key] = str(error)
        category = categories[key]
        problem = category if isinstance(category, str) else _split_problem(cell, category)
        if problem is not None:
            blocked.setdefault(problem, []).append(cell)
    return {problem: tuple(members) for problem, members in blocked.items()}


def _split_problem(cell: Cell, category: Category) -> str | None:
    try:
        split_of(cell, category)
    except (DataError, MetricError) as error:
        return str(error)
    return None


def estimate_seconds(results: Iterable[CellResult], trainings: Sequence[Training]) -> float | None:
    """Estimate how long trainings take one after the other, from others of the same method, or else of any.

    Returns:
        Seconds; None if there are no results.
    """
    by_method: dict[str, dict[str, float]] = {}
    for result in results:
        # Cells of one training share its time.
        by_method.setdefault(result.cell.method, {})[result.cell.training_key] = result.seconds
    if not by_method:
        return None
    means = {method: fmean(times.values()) for method, times in by_method.items()}
    overall = fmean(seconds for times in by_method.values() for seconds in times.values())
    return sum(means.get(training.cells[0].method, overall) for training in trainings)


def print_forecast(plans: Sequence[Plan], expected: Forecast) -> None:
    """Print the numbers of cells of each table and sweep, the total cost, and what cannot be run."""
    rows: list[tuple[object, ...]] = []
    for plan in plans:
        to_run = [cell for cell in plan.cells if cell in expected.to_run]
        done = sum(cell in expected.done for cell in plan.cells)
        rows.append((plan.name, len(plan.cells), done, len(to_run), len(plan.cells) - done - len(to_run)))
    if len(plans) > 1:
        every = cells_of(plans)
        blocked = len(every) - len(expected.done) - len(expected.to_run)
        rows.append(("all, each cell once", len(every), len(expected.done), len(expected.to_run), blocked))
    print_table("Dry run: nothing is trained", ("", "cells", "done", "to run", "cannot be run"), rows)
    if expected.seconds is None:
        cost = "how long they take is not known before one is done"
    else:
        cost = f"about {duration(expected.seconds)} with one process, going by the trainings that are done"
    if expected.trainings:
        print(f"{count(len(expected.to_run), 'cell')} to run by {count(len(expected.trainings), 'training')}; {cost}")
    for problem, cells in expected.blocked.items():
        print(f"{count(len(cells), 'cell')} cannot be run: {indented(problem)}")
