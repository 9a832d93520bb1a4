"""What a run would do: how many cells and trainings, how long they may take, and what of the data is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from ...data import Category
from ...errors import DataError, FastBGADError
from ...render.console import print_table
from ...wording import count, duration, indented
from ..plan.cell_split import split_of
from ..plan.cells import Cell, CellResult
from ..plan.plan import Plan, cells_of
from ..plan.sources import Sources
from .ledger import Ledger
from .worker import Job, jobs_of


@dataclass(frozen=True)
class Forecast:
    """What is known before anything is run.

    Attributes:
        done: cells that have a result.
        jobs: trainings that are to be run, with the cells they serve.
        blocked: of each reason why cells cannot be run, those cells.
        seconds: how long one process would take, from trainings that are done; None if there are none.
    """

    done: frozenset[Cell]
    jobs: tuple[Job, ...]
    blocked: dict[str, tuple[Cell, ...]]
    seconds: float | None

    @property
    def to_run(self) -> frozenset[Cell]:
        """The cells that would be run."""
        return frozenset(cell for job in self.jobs for cell in job.cells)


def forecast(plans: Sequence[Plan], ledger: Ledger, sources: Sources) -> Forecast:
    """Looks at the results that are there and at the names, not the contents, of the images."""
    cells = cells_of(plans)
    done = frozenset(ledger.results(cells))
    missing = [cell for cell in cells if cell not in done]
    blocked = data_problems(missing, sources)
    stopped = {cell for members in blocked.values() for cell in members}
    jobs = jobs_of(cell for cell in missing if cell not in stopped)
    return Forecast(done, jobs, blocked, estimate_seconds(ledger.everything(), jobs))


def data_problems(cells: Iterable[Cell], sources: Sources) -> dict[str, tuple[Cell, ...]]:
    """Why cells cannot be run: a category that is missing or incomplete, an unknown type, too few anomalies."""
    categories: dict[tuple[str, str], Category | str] = {}
    blocked: dict[str, list[Cell]] = {}
    for cell in cells:
        place = (cell.dataset, cell.category)
        if place not in categories:
            try:
                categories[place] = sources.open(*place, check="none")
            except FastBGADError as error:
                categories[place] = str(error)
        category = categories[place]
        problem = category if isinstance(category, str) else _split_problem(cell, category)
        if problem is not None:
            blocked.setdefault(problem, []).append(cell)
    return {problem: tuple(members) for problem, members in blocked.items()}


def _split_problem(cell: Cell, category: Category) -> str | None:
    try:
        split_of(cell, category)
    except DataError as error:
        return str(error)
    return None


def estimate_seconds(results: Iterable[CellResult], jobs: Sequence[Job]) -> float | None:
    """How long trainings will take one after the other, going by others of the same method, or else of any.

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
    return sum(means.get(job.cells[0].method, overall) for job in jobs)


def print_forecast(plans: Sequence[Plan], found: Forecast) -> None:
    """Per table and sweep the number of cells, in total the cost, and what cannot be run."""
    rows: list[tuple[object, ...]] = []
    for plan in plans:
        to_run = [cell for cell in plan.cells if cell in found.to_run]
        done = sum(cell in found.done for cell in plan.cells)
        rows.append((plan.name, len(plan.cells), done, len(to_run), len(plan.cells) - done - len(to_run)))
    if len(plans) > 1:
        every = cells_of(plans)
        blocked = len(every) - len(found.done) - len(found.to_run)
        rows.append(("all, each cell once", len(every), len(found.done), len(found.to_run), blocked))
    print_table("Dry run: nothing is trained", ("", "cells", "done", "to run", "cannot be run"), rows)
    if found.seconds is None:
        cost = "how long they take is not known before one is done"
    else:
        cost = f"about {duration(found.seconds)} with one process, going by the trainings that are done"
    if found.jobs:
        print(f"{count(len(found.to_run), 'cell')} to run by {count(len(found.jobs), 'training')}; {cost}")
    for problem, cells in found.blocked.items():
        print(f"{count(len(cells), 'cell')} cannot be run: {indented(problem)}")
