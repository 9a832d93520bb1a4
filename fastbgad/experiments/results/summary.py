"""Summaries of results: rows of tables and points of sweeps, with published number, ours and their difference."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..plan import METRICS, Cell, CellResult, Plan, SweepPlan, TablePlan, Value

if TYPE_CHECKING:
    from ..plan.published import PublishedNumber

SELECTIONS: dict[str, str] = {"last": "After the last epoch", "best": "Best on test"}
"""Selections of the epoch and their headings. "best" takes each metric's best epoch on the test set, as the official
code does: this uses the test labels and is no estimate of what a user would get."""


@dataclass(frozen=True)
class Estimate:
    """Mean and deviation over seeds; None where too few are complete."""

    mean: float | None
    """Over the complete seeds: per seed the mean over its cells."""
    std: float | None
    """Sample standard deviation over those seeds (n - 1 in the denominator); None with fewer than two."""
    seeds: int
    """Number of complete seeds, all of whose cells have a result."""


@dataclass(frozen=True)
class Measured:
    """One metric of one row of a table or one point of a sweep, as far as it is measured."""

    last: Estimate
    """After the last meta epoch."""
    best: Estimate
    """Of the best meta epoch on the test set; without a mean for methods that are measured once."""
    seeds_planned: int
    cells: int
    """Cells with a result."""
    cells_planned: int

    def of(self, selection: str) -> Estimate:
        """Return the estimate of a key of `SELECTIONS`."""
        return {"last": self.last, "best": self.best}[selection]

    @property
    def is_complete(self) -> bool:
        """True if every planned cell has a result."""
        return self.cells == self.cells_planned


@dataclass(frozen=True)
class TableRow:
    """One metric of one method in one row of a table, all numbers in [0, 1]."""

    setting: str
    row: str
    method: str
    metric: str
    published: float | None
    published_std: float | None
    measured: Measured | None
    """None for a number that is published only."""
    comparable: bool = True
    """False where ours is a mean over fewer categories than the published number."""

    def difference(self, selection: str) -> float | None:
        """Return ours minus published; None where either is missing or they are not comparable."""
        ours = None if self.measured is None else self.measured.of(selection).mean
        return None if ours is None or self.published is None or not self.comparable else ours - self.published


@dataclass(frozen=True)
class TableSummary:
    """One table, with published numbers and ours.

    Attributes:
        plan: of the table.
        rows: in the plan's order of rows, then of methods (the published order, then ours), then of `METRICS`.
        metrics: those the table publishes, in the order of `METRICS`; all of them where it publishes none.
        left_out: rows that are published but were not planned, such as those of other categories.
    """

    plan: TablePlan
    rows: tuple[TableRow, ...]
    metrics: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method once, as published.csv writes it."""
        return tuple(dict.fromkeys(row.method for row in self.rows))


@dataclass(frozen=True)
class SweepRow:
    """One metric at one point of a sweep."""

    method: str
    """A method of `fastbgad.config.METHOD_NAMES`."""
    value: Value
    metric: str
    measured: Measured


@dataclass(frozen=True)
class SweepSummary:
    """One sweep: its points in the plan's order, then in the order of `METRICS`."""

    plan: SweepPlan
    rows: tuple[SweepRow, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method once."""
        return tuple(dict.fromkeys(row.method for row in self.rows))


Summary = TableSummary | SweepSummary


def summarize(plan: Plan, results: Mapping[Cell, CellResult], published: Sequence[PublishedNumber] = ()) -> Summary:
    """Summarize the results of a table or sweep.

    Args:
        plan: the rows or points, and the cells of each.
        results: by cell; cells of other plans are ignored, missing ones are counted.
        published: the numbers of this table; other tables' are ignored.
    """
    if isinstance(plan, SweepPlan):
        return summarize_sweep(plan, results)
    return summarize_table(plan, results, published)


def summarize_sweep(plan: SweepPlan, results: Mapping[Cell, CellResult]) -> SweepSummary:
    """Return the means and deviations of every point."""
    rows = [
        SweepRow(point.method, point.value, metric, measure(point.cells, results, metric))
        for point in plan.points
        for metric in METRICS
    ]
    return SweepSummary(plan, tuple(rows))


def summarize_table(
    plan: TablePlan, results: Mapping[Cell, CellResult], published: Sequence[PublishedNumber]
) -> TableSummary:
    """Return the means and deviations of every row beside the published numbers; see `summarize`."""
    numbers = {number.key: number for number in published if number.table == plan.name}
    planned = {(row.setting, row.row, row.method): row for row in plan.rows}
    keys = dict.fromkeys((row.setting, row.row) for row in plan.rows)
    methods = dict.fromkeys([*(method for _, _, method, _ in numbers), *(row.method for row in plan.rows)])
    rows = []
    for setting, row in keys:
        for method in methods:
            row_plan = planned.get((setting, row, method))
            for metric in METRICS:
                number = numbers.get((setting, row, method, metric))
                if row_plan is None and number is None:
                    continue
                measured = None if row_plan is None else measure(row_plan.cells, results, metric)
                value, std = (None, None) if number is None else (number.value, number.std)
                comparable = row_plan is None or row_plan.comparable
                rows.append(TableRow(setting, row, method, metric, value, std, measured, comparable))
    metrics = {metric for _, _, _, metric in numbers} or set(METRICS)
    left_out = dict.fromkeys(f"{setting} {row}" for setting, row, _, _ in numbers if (setting, row) not in keys)
    return TableSummary(plan, tuple(rows), tuple(metric for metric in METRICS if metric in metrics), tuple(left_out))


def measure(cells: Sequence[Cell], results: Mapping[Cell, CellResult], metric: str) -> Measured:
    """Return one metric over cells of several seeds; a seed counts only if all its cells have a result."""
    by_seed: dict[int, list[Cell]] = {}
    for cell in dict.fromkeys(cells):
        by_seed.setdefault(cell.seed, []).append(cell)
    last, best = [], []
    for members in by_seed.values():
        measured = [results[cell] for cell in members if cell in results]
        if len(measured) < len(members):
            continue
        last.append(statistics.fmean(result.last[metric] for result in measured))
        selected = [result.best[metric] for result in measured if result.best is not None]
        if len(selected) == len(members):
            best.append(statistics.fmean(selected))
    planned = [cell for members in by_seed.values() for cell in members]
    present = sum(cell in results for cell in planned)
    return Measured(_estimate(last), _estimate(best), len(by_seed), present, len(planned))


def _estimate(values: Sequence[float]) -> Estimate:
    return Estimate(
        mean=statistics.fmean(values) if values else None,
        std=statistics.stdev(values) if len(values) > 1 else None,
        seeds=len(values),
    )
