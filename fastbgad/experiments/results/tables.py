"""Tables and sweeps in the terminal, and as CSV with one line per number."""

from __future__ import annotations

import csv
import io

from ...render.console import print_table
from ...wording import count
from ..plan import METRICS
from .matrix import Matrix, matrix_of
from .summary import SELECTIONS, Measured, Summary, SweepSummary, TableSummary
from .texts import count_text, method_text, ours_text, published_text, signed, value_text

_NUMBERS = ("seeds", "cells", "cells_planned")
TABLE_COLUMNS = (
    *("table", "dataset", "setting", "row", "method", "metric", "selection"),
    *("published", "published_std", "ours", "ours_std", "difference"),
    *_NUMBERS,
)
SWEEP_COLUMNS = (
    *("sweep", "dataset", "method", "value", "metric", "selection"),
    *("ours", "ours_std"),
    *_NUMBERS,
)
PUBLISHED_ONLY = "published only"
"""The selection of numbers that were not planned to be measured here."""
_LEGEND = "last: after the last epoch, best: the best epoch on the test set"


def csv_text(summary: Summary) -> str:
    """Return the content of a CSV file: metrics in [0, 1] with six decimals, empty where there is no number.

    Every number of ours has a line with the selection "last" and one with "best"; a number that is published only has
    one line, whose selection is "published only".
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(SWEEP_COLUMNS if isinstance(summary, SweepSummary) else TABLE_COLUMNS)
    writer.writerows(_sweep_lines(summary) if isinstance(summary, SweepSummary) else _table_lines(summary))
    return buffer.getvalue()


def _table_lines(summary: TableSummary) -> list[list[object]]:
    plan, lines = summary.plan, []
    for row in summary.rows:
        key = [plan.name, plan.dataset, row.setting, row.row, row.method, row.metric]
        number = [_plain(row.published), _plain(row.published_std)]
        if row.measured is None:
            lines.append([*key, PUBLISHED_ONLY, *number, "", "", "", 0, 0, 0])
            continue
        for selection in SELECTIONS:
            ours, seeds_and_cells = _numbers(row.measured, selection)
            lines.append([*key, selection, *number, *ours, _plain(row.difference(selection)), *seeds_and_cells])
    return lines


def _sweep_lines(summary: SweepSummary) -> list[list[object]]:
    plan, lines = summary.plan, []
    for row in summary.rows:
        key = [plan.name, plan.dataset, row.method, value_text(row.value), row.metric]
        for selection in SELECTIONS:
            ours, seeds_and_cells = _numbers(row.measured, selection)
            lines.append([*key, selection, *ours, *seeds_and_cells])
    return lines


def _numbers(measured: Measured, selection: str) -> tuple[list[object], list[object]]:
    estimate = measured.of(selection)
    return [_plain(estimate.mean), _plain(estimate.std)], [estimate.seeds, measured.cells, measured.cells_planned]


def _plain(value: float | None) -> object:
    return "" if value is None else round(value, 6)


def print_summary(summary: Summary) -> None:
    """Print the table or sweep, in percent, with the last epoch and the best on test apart.

    Raises:
        MissingDependencyError: rich is not installed.
    """
    if isinstance(summary, SweepSummary):
        _print_sweep(summary)
    else:
        _print_table(summary)


def _print_table(summary: TableSummary) -> None:
    for metric in summary.metrics:
        matrix = matrix_of(summary, metric, "last")
        lines = []
        for line in matrix.lines:
            for column, row in zip(matrix.columns, line.entries, strict=True):
                if row is None or row.measured is None:
                    continue
                numbers = [published_text(row)]
                for selection in SELECTIONS:
                    numbers += [ours_text(row.measured, selection), signed(row.difference(selection))]
                lines.append([line.full_text, column.text, *numbers, _extent(row.measured)])
        if lines:
            title = f"{summary.plan.title} ({summary.plan.name}) · {METRICS[metric]}, % · {_LEGEND}"
            print_table(title, ["Row", "Method", "Paper", "Last", "Diff.", "Best", "Diff.", "Measured"], lines)
        _print_published_only(summary, matrix)


def _print_published_only(summary: TableSummary, matrix: Matrix) -> None:
    numbers = [number for number, column in enumerate(matrix.columns) if not column.is_measured]
    if not numbers:
        return
    lines = [[line.full_text, *(published_text(line.entries[n]) for n in numbers)] for line in matrix.lines]
    columns = ["Row", *(matrix.columns[n].text for n in numbers)]
    print_table(f"{summary.plan.name} · {METRICS[matrix.metric]}, % · {PUBLISHED_ONLY}", columns, lines)


def _print_sweep(summary: SweepSummary) -> None:
    plan, lines = summary.plan, []
    for row in summary.rows:
        numbers = [ours_text(row.measured, selection) for selection in SELECTIONS]
        first = [value_text(row.value), method_text(row.method), METRICS[row.metric]]
        lines.append([*first, *numbers, _extent(row.measured)])
    title = f"{plan.title} ({plan.name}), % · {_LEGEND}"
    print_table(title, [plan.label, "Method", "Metric", "Last", "Best", "Measured"], lines)


def _extent(measured: Measured) -> str:
    return count_text(measured, "last") or count(measured.seeds_planned, "seed")
