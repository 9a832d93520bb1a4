"""Cells and results for tests of what is made around them: nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fastbgad.data import Category
from fastbgad.experiments.plan.cells import METRICS, Cell, CellResult


def some_cells(categories: Sequence[str] = ("carpet", "screw"), seeds: int = 2) -> tuple[Cell, ...]:
    """For each category and seed three trainings: NFAD with two tests, and BGAD with two draws of known anomalies."""
    return tuple(
        Cell("mvtec", category, method, seed, 2, known_types=(f"{category}_{known}",))
        for category in categories
        for seed in range(seeds)
        for method in ("nfad", "bgad")
        for known in ("a", "b")
    )


def result_of(cell: Cell, value: float = 0.5) -> CellResult:
    """A result whose metrics are all the same."""
    metrics = dict.fromkeys(METRICS, value)
    return CellResult(cell, metrics, metrics, [metrics], 2.0, ["crack/000.png"], 6, 3)


def empty_category(dataset: str, name: str) -> Category:
    """A category without images, in place of one that is opened."""
    return Category(name, Path(name), dataset, (), ())


class FakeRunner:
    """Gives results without training, and notes what it was asked for."""

    def __init__(self, name: str, run: Callable[[Sequence[Cell]], list[CellResult]] | None = None) -> None:
        self.name, self._run = name, run
        self.asked: list[tuple[Cell, ...]] = []
        self.closed = False

    def run(self, cells: Sequence[Cell]) -> list[CellResult]:
        self.asked.append(tuple(cells))
        return [result_of(cell) for cell in cells] if self._run is None else self._run(cells)

    def close(self) -> None:
        self.closed = True
