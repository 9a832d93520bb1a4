"""Plans of tables and sweeps: rows and points, and the cells whose mean each of them is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .cells import Cell, Dataset, Value


@dataclass(frozen=True)
class RowPlan:
    """One row of a table for one method: for each seed the mean over its cells, then mean and deviation over seeds."""

    setting: str
    """As in published.csv: multi_class, one_class, hard_subsets or unseen_subsets."""
    row: str
    """As in published.csv: a category, category:type, category:mean, or mean."""
    method: str
    """As in published.csv: NFAD, BGAD_wo, BGAD_dagger, BGAD, PaDiM, ..."""
    cells: tuple[Cell, ...]
    comparable: bool = True
    """False where the published number was measured otherwise (a mean over more categories, another number of known
    anomalies): their difference would mean nothing."""


@dataclass(frozen=True)
class TablePlan:
    """One of the paper's tables."""

    name: str
    """As in published.csv."""
    title: str
    note: str
    """For readers, such as a choice of our protocol where the paper does not say."""
    dataset: Dataset
    rows: tuple[RowPlan, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell once, in the order of the rows."""
        return tuple(dict.fromkeys(cell for row in self.rows for cell in row.cells))


@dataclass(frozen=True)
class SweepPoint:
    """One value of a swept option, for one method."""

    method: str
    """A method of `fastbgad.config.METHOD_NAMES`."""
    value: Value
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class SweepPlan:
    """An ablation: one option takes several values, everything else is fixed."""

    name: str
    title: str
    label: str
    """Of the axis along which the values lie."""
    note: str
    dataset: Dataset
    logarithmic: bool
    points: tuple[SweepPoint, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell once, in the order of the points."""
        return tuple(dict.fromkeys(cell for point in self.points for cell in point.cells))


Plan = TablePlan | SweepPlan


def cells_of(plans: Iterable[Plan]) -> tuple[Cell, ...]:
    """Return the cells of several tables and sweeps, each once."""
    return tuple(dict.fromkeys(cell for plan in plans for cell in plan.cells))
